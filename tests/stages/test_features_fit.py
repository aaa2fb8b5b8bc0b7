"""Feature sets that are fitted to a layer: any shards, held-out images, files, figures, bad input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from milan_ray.config import ExemplarConfig, Resources
from milan_ray.engine.references import ModelRef, ProbeRef, model, probe
from milan_ray.engine.stage import run_stage
from milan_ray.errors import MilanError
from milan_ray.models.features.given import file_features
from milan_ray.models.features.statistics import explained_variance
from milan_ray.probe.base import ImageRef, LatentProbe
from milan_ray.schema import FEATURES_FIT
from milan_ray.scoring.simulation import held_out
from milan_ray.stages.features_fit import FeaturesFit, FitConfig, FitJob
from milan_ray.storage import Storage

PLUGIN = str(Path(__file__).resolve().parents[1] / "plugins/tiny_models.py")
KEYS = {"model": "tiny/cnn", "layer": "2"}
pytestmark = pytest.mark.usefixtures("ray_session")


def fit(
    root: Path, photos: Path, config: FitConfig, *, layer: str = "2", name: str = "tiny/cnn", shard: int | None = 32,
    actors: int | None = None,
) -> Storage:  # fmt: skip
    storage = Storage(root)
    job = FitJob(ModelRef(name, layers=(layer,), plugins=(PLUGIN,)), ProbeRef((str(photos),)), config)
    run_stage(FeaturesFit(job, ExemplarConfig(batch_size=16, shard_size=shard)), storage, Resources(actors=actors))
    return storage


def figures(storage: Storage, name: str, split: str = "train") -> dict[str, object]:
    rows = storage.read(FEATURES_FIT, **KEYS, features=name).to_pylist()
    (row,) = [row for row in rows if row["split"] == split]
    return row


@pytest.fixture(scope="module")
def network(photos) -> dict[str, torch.Tensor]:
    """What the network does, without the package: outputs of layer 2 after its ReLU (90, 8, 6, 6), and their ids."""
    spec = model(ModelRef("tiny/cnn", layers=("2",), plugins=(PLUGIN,)))
    source = probe(ProbeRef((str(photos),)))
    assert not isinstance(source, LatentProbe)
    rows = source.manifest().to_pylist()
    views = [spec.preprocess.view(source.read(ImageRef(r["image_id"], r["root"], r["path"])).image) for r in rows]
    net = spec.load()
    with torch.inference_mode():
        inputs = spec.prepare(torch.from_numpy(np.stack(views)))
        names = sorted({row["class_label"] for row in rows})
        labels = torch.tensor([names.index(row["class_label"]) for row in rows])
        maps = net[:4](inputs).clone()  # its second ReLU works in place
    return {"maps": maps, "labels": labels, "head": net[4:]}


def rows_of(maps: torch.Tensor) -> torch.Tensor:
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])


def split_of(network: dict[str, torch.Tensor], share: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    held = torch.from_numpy(held_out(np.arange(90), share))
    return rows_of(network["maps"][~held]), rows_of(network["maps"][held])


def test_components_are_numpys_of_the_images_that_are_not_held_out(photos, network, tmp_path):
    storage = fit(tmp_path, photos, FitConfig("pca", (3,), held_out=0.3))
    train, held = split_of(network, 0.3)
    x = train.double().numpy()
    vectors = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)[2][:3]
    features = file_features(str(figures(storage, "pca-3")["file"]))
    assert (features.path, features.count, features.width) == ("2#pca-3", 3, 8)
    encoder = features.build()
    np.testing.assert_allclose(np.abs(encoder.encoder.numpy() @ vectors.T), np.eye(3), atol=1e-5)
    np.testing.assert_allclose(encoder.input_bias.numpy(), x.mean(axis=0), atol=1e-5)
    for split, rows in (("train", train), ("held-out", held)):
        row = figures(storage, "pca-3", split)
        assert row["positions"] == len(rows) and row["images"] == len(rows) // 36
        assert row["explained_variance"] == pytest.approx(explained_variance(encoder, rows), abs=1e-5)
        assert row["l0"] == 3 and row["dead"] == 0 and row["k"] is None


def test_accuracy_is_that_of_the_network_with_the_reconstruction_in_the_layer(photos, network, tmp_path):
    storage = fit(tmp_path, photos, FitConfig("pca", (1, 8), held_out=0.3))
    held = torch.from_numpy(held_out(np.arange(90), 0.3))
    maps, labels = network["maps"][held], network["labels"][held]
    train = rows_of(network["maps"][~held])

    def right(rows: torch.Tensor) -> float:
        with torch.inference_mode():
            spliced = rows.unflatten(0, (len(maps), 6, 6)).permute(0, 3, 1, 2).relu()  # the ReLU follows the layer
            return float((network["head"](spliced).argmax(dim=1) == labels).double().mean())

    for name in ("pca-1", "pca-8"):
        row = figures(storage, name, "held-out")
        one = file_features(str(row["file"])).build()
        assert row["spliced_accuracy"] == pytest.approx(right(one.reconstruct(rows_of(maps))))
        assert row["accuracy"] == pytest.approx(right(rows_of(maps)))
        assert row["mean_accuracy"] == pytest.approx(right(train.mean(dim=0).expand(len(maps) * 36, -1)))
        assert figures(storage, name)["accuracy"] is None


@pytest.mark.parametrize("method", ["pca"])
def test_any_shards_and_actors_fit_the_same_features(photos, tmp_path, method):
    config = FitConfig(method, (3,), epochs=None if method == "pca" else 2)
    one = fit(tmp_path / "one", photos, config)
    two = fit(tmp_path / "two", photos, config, actors=1)
    other = fit(tmp_path / "other", photos, config, shard=80)
    found = [file_features(str(figures(storage, f"{method}-3")["file"])).build() for storage in (one, two, other)]
    assert torch.equal(found[0].encoder, found[1].encoder)
    torch.testing.assert_close(found[0].encoder, found[2].encoder, rtol=1e-4, atol=1e-5)


def test_sets_are_made_once_and_again_where_files_are_missing_or_anothers(photos, tmp_path, capsys):
    config = FitConfig("pca", (2, 3), out=str(tmp_path / "sets"))
    storage = fit(tmp_path / "run", photos, config)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "sets").iterdir()}
    assert {path.name for path in written} == {f"pca-{n}{end}" for n in (2, 3) for end in (".safetensors", ".yaml")}
    assert not storage.files("_work")
    capsys.readouterr()
    fit(tmp_path / "run", photos, config)
    assert "up to date" in capsys.readouterr().err
    (tmp_path / "sets/pca-2.yaml").unlink()
    fit(tmp_path / "run", photos, config)
    again = {path: path.stat().st_mtime_ns for path in (tmp_path / "sets").iterdir()}
    assert again[tmp_path / "sets/pca-3.yaml"] == written[tmp_path / "sets/pca-3.yaml"]
    assert again[tmp_path / "sets/pca-2.yaml"] != written[tmp_path / "sets/pca-2.yaml"]
    fit(tmp_path / "else", photos, FitConfig("pca", (2,), held_out=0.5, out=str(tmp_path / "sets")))
    fit(tmp_path / "run", photos, config)
    line = (tmp_path / "sets/pca-2.yaml").read_text().splitlines()[0]
    assert line == f"# milan_ray_fit: {storage.config_of(FEATURES_FIT, **KEYS, features='pca-2')}"


def test_a_layer_without_positions_has_one_output_for_each_image(photos, tmp_path):
    storage = fit(tmp_path, photos, FitConfig("pca", (2,), held_out=0), layer="6")
    (row,) = storage.read(FEATURES_FIT, model="tiny/cnn", layer="6", features="pca-2").to_pylist()
    assert (row["images"], row["positions"], row["split"]) == (90, 90, "train")
    assert row["accuracy"] is not None


@pytest.mark.parametrize(
    ("config", "layer", "name", "sentence"),
    [
        (FitConfig("pca", (9,)), "2", "tiny/cnn", "8 principal components at most"),
        (FitConfig("topk-sae", (16,), k=17), "2", "tiny/cnn", "--k 17 of --width 16"),
        (FitConfig("pca", (2,)), "nan", "tiny/broken", "NaN or infinite values"),
        (FitConfig("pca", (2,)), "9", "tiny/cnn", "unknown layer '9'"),
        (FitConfig("pca", (4,), held_out=0.99), "6", "tiny/cnn", "too few for 4 features"),
    ],
)
def test_what_cannot_be_fitted_is_refused_in_one_sentence(photos, tmp_path, config, layer, name, sentence):
    with pytest.raises(MilanError, match=sentence):
        fit(tmp_path, photos, config, layer=layer, name=name)
    assert not Storage(tmp_path).partitions(FEATURES_FIT)


def test_numbers_that_cannot_be_are_refused():
    for wrong in ({"widths": (0,)}, {"held_out": 1.0}, {"name": "a#b"}):
        with pytest.raises(MilanError):
            FitConfig("pca", **wrong)
    with pytest.raises(MilanError, match="give one of pca, nmf"):
        FitConfig("ica")
