"""Features of a layer are dissected as units are: inside the same pass, with the same states."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from milan_ray.config import ExemplarConfig, Resources
from milan_ray.engine.references import ModelRef, ProbeRef, model, probe
from milan_ray.errors import MilanError
from milan_ray.exemplars import feature_maps, forward, masks
from milan_ray.exemplars.pooled import matrix
from milan_ray.models.features.dictionary import Dictionary, Weights
from milan_ray.models.features.saelens import write_saelens
from milan_ray.probe.base import ImageRef, LatentProbe
from milan_ray.schema import EXEMPLARS, LEVELS, POOLED
from milan_ray.stages.exemplars import Exemplars
from milan_ray.storage import Storage

PLUGIN = str(Path(__file__).resolve().parents[1] / "plugins/tiny_features.py")
pytestmark = pytest.mark.usefixtures("ray_session")
CONFIG = ExemplarConfig(k=4, batch_size=16, shard_size=40, pooled=True)


def run(path: Path, photos: Path, *layers: str, config: ExemplarConfig = CONFIG, actors: int | None = None) -> Storage:
    storage = Storage(path)
    ref = ModelRef("tiny/cnn", layers=layers, plugins=(PLUGIN,))
    Exemplars([ref], ProbeRef((str(photos),)), config).run(storage, Resources(actors=actors))
    return storage


@pytest.fixture(scope="module")
def both(ray_session, photos, tmp_path_factory) -> Storage:
    return run(tmp_path_factory.mktemp("both"), photos, "0", "0#same", "0#rectified")


@pytest.mark.parametrize("table", [EXEMPLARS, LEVELS])
def test_features_that_are_the_units_have_the_units_tables(both, table):
    units, features = (both.read(table, model="tiny/cnn", layer=layer) for layer in ("0", "0#same"))
    assert units.drop_columns(["layer"]) == features.drop_columns(["layer"])
    assert set(features["layer"].to_pylist()) == {"0#same"}


def test_pooled_activations_of_features_that_are_the_units_are_the_units(both):
    units, features = (both.read(POOLED, model="tiny/cnn", layer=layer) for layer in ("0", "0#same"))
    assert units["max"].equals(features["max"]) and units["image_id"].equals(features["image_id"])
    np.testing.assert_allclose(matrix(units["mean"]), matrix(features["mean"]), rtol=1e-5, atol=1e-6)


def test_rectified_features_equal_a_naive_loop(both, photos):
    spec = model(ModelRef("tiny/cnn", layers=("0#rectified",), plugins=(PLUGIN,)))
    source = probe(ProbeRef((str(photos),)))
    assert not isinstance(source, LatentProbe)
    rows = source.manifest().to_pylist()
    views = np.stack(
        [spec.preprocess.view(source.read(ImageRef(r["image_id"], r["root"], r["path"])).image) for r in rows]
    )
    import tiny_features  # registered by now

    with torch.inference_mode():
        network = spec.load()
        assert isinstance(network, torch.nn.Sequential)
        output = network[:1](spec.prepare(torch.from_numpy(views)))
        maps = tiny_features.RECTIFIED.forward(output.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    largest, flat = maps.amax(dim=(2, 3)).numpy(), maps.numpy().transpose(1, 0, 2, 3).reshape(maps.shape[1], -1)
    levels = np.quantile(flat.astype(float), 0.99, axis=1, method="hazen")
    found = both.read(LEVELS, model="tiny/cnn", layer="0#rectified")
    np.testing.assert_allclose(found["level"].to_numpy(), levels, rtol=1e-4, atol=1e-6)
    assert set(found["positions"].to_pylist()) == {flat.shape[1]}
    exemplars = both.read(EXEMPLARS, model="tiny/cnn", layer="0#rectified").to_pylist()
    wanted = [
        (unit, rank, int(image))
        for unit in range(maps.shape[1])
        for rank, image in enumerate(np.argsort(-largest[:, unit], kind="stable")[:4])
        if largest[image, unit] > 0
    ]
    assert [(row["unit"], row["rank"], row["image_id"]) for row in exemplars] == wanted
    masked = masks.unpack([row["mask"] for row in exemplars], (24, 24))
    maps_of = torch.stack([maps[row["image_id"], row["unit"]] for row in exemplars])
    np.testing.assert_array_equal(
        masked, masks.masks(maps_of, torch.tensor(levels[[r["unit"] for r in exemplars]]).float(), (24, 24))
    )


def test_a_feature_that_never_fires_has_no_exemplars(both):
    import tiny_features

    units = set(both.read(EXEMPLARS, ["unit"], model="tiny/cnn", layer="0#rectified")["unit"].to_pylist())
    assert units == set(range(tiny_features.COUNT)) - {tiny_features.DEAD}
    assert both.read(LEVELS, model="tiny/cnn", layer="0#rectified")["level"][tiny_features.DEAD].as_py() == 0


def test_tables_do_not_depend_on_the_features_made_at_a_time(both, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_maps, "PIECE_BYTES", 4 * 20 * 12 * 12 * 3)  # three images
    pieces = run(tmp_path, photos, "0", "0#same", "0#rectified")
    for table in (EXEMPLARS, LEVELS):
        for layer in ("0#same", "0#rectified"):
            one, other = (storage.read(table, model="tiny/cnn", layer=layer) for storage in (both, pieces))
            assert one.equals(other), layer


def test_masks_that_are_computed_again_are_the_same(both, photos, tmp_path):
    again = run(tmp_path, photos, "0#rectified", config=ExemplarConfig(k=4, batch_size=16, shard_size=40, map_budget=0))
    keys = {"model": "tiny/cnn", "layer": "0#rectified"}
    assert again.read(EXEMPLARS, **keys).equals(both.read(EXEMPLARS, **keys))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("0#broken", r"puts out torch\.float32 of shape \(\d+, 2\) for \d+ positions, not floats \(\d+, 6\)"),
        ("0#failing", "features 'failing' cannot be read from layer '0': ValueError: no such thing"),
        ("0#other", "were made for a layer of 5 units, and '0' of tiny/cnn has 6"),
        ("0#signed", "registered with rectified=True, and encode= puts out codes below zero"),
        ("0#sam", "0#same"),
        ("0#unfit", r"worse than its mean does: explained variance -1\d\d on the first 16"),
    ],
)
def test_features_that_do_not_fit_are_refused(photos, tmp_path, layer, message):
    with pytest.raises(MilanError, match=message):
        run(tmp_path, photos, layer)


def test_masks_of_sparse_features_are_those_of_dense_ones(photos, tmp_path, monkeypatch):
    """TopK of all features is ReLU; masks come from maps that are carried, or computed again some images at a time."""
    matrix = torch.cat([torch.eye(6), -torch.eye(6)])  # reconstructs everything
    sets = {
        "sparse": Dictionary(Weights(matrix, matrix), "topk", 12),
        "dense": Dictionary(Weights(matrix, matrix), "relu"),
    }
    folders = [str(tmp_path / name) for name in sets]
    for folder, dictionary in zip(folders, sets.values(), strict=True):
        write_saelens(dictionary, folder, {})
    monkeypatch.setattr(forward, "PIECE_BYTES", 4 * 12 * 12 * 12 * 3)
    tables = []
    for budget in (0, 2**28):
        storage = Storage(tmp_path / str(budget))
        ref = ModelRef("tiny/cnn", plugins=(PLUGIN,), features=tuple(f"0={folder}" for folder in folders))
        config = ExemplarConfig(k=4, batch_size=16, shard_size=40, map_budget=budget)
        Exemplars([ref], ProbeRef((str(photos),)), config).run(storage, Resources())
        read = [storage.read(EXEMPLARS, model="tiny/cnn", layer=f"0#{name}") for name in sets]
        tables += [table.drop_columns("layer") for table in read]
    assert all(table.equals(tables[0]) for table in tables) and len(tables[0]) > 12


def test_codes_that_are_not_finite_are_left_out_and_said(photos, tmp_path, capsys):
    storage = run(tmp_path, photos, "0#nan", config=ExemplarConfig(k=4, batch_size=16, shard_size=40))
    assert not len(storage.read(EXEMPLARS, model="tiny/cnn", layer="0#nan"))
    assert "NaN or infinite, in 6 of 6 units" in capsys.readouterr().err
