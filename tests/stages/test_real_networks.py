"""Real networks over real photographs, through the command line: what only a working whole gets right."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import milan_ray
from milan_ray import cli
from milan_ray.exemplars import masks
from milan_ray.models.registry import OUTPUTS
from milan_ray.schema import EXEMPLARS, LEVELS, SKIPPED
from milan_ray.storage import Storage

IMAGES = 60


@pytest.fixture(scope="module")
def photographs(shared, tmp_path_factory) -> tuple[Path, Path, list[int]]:
    """A folder of photographs, each of another class; the file of labels; their classes in the order of image ids."""
    source = shared / "data/images/imagenet_sample_1000"
    labels = source.with_suffix(".csv")
    if not labels.is_file():
        pytest.skip("needs ../shared/data/images/imagenet_sample_1000.csv and the photographs beside it")
    root = tmp_path_factory.mktemp("imagenet")
    (root / "photographs").mkdir()
    with labels.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    chosen = sorted(rows[:: len(rows) // IMAGES][:IMAGES], key=lambda row: row["file"])
    for row in chosen:
        shutil.copy(source / row["file"], root / "photographs")
    shutil.copy(labels, root)
    return root / "photographs", root / labels.name, [int(row["class_index"]) for row in chosen]


def dissect(shared: Path, photographs: tuple[Path, Path, list[int]], run: Path, name: str, file: str, *layers: str):
    weights = shared / "data/weights" / file
    if not weights.is_file():
        pytest.skip(f"needs ../shared/data/weights/{file}")
    folder, labels, _ = photographs
    arguments = ["exemplars", "--model", name, "--weights", str(weights), "--layers", *layers]
    arguments += ["--probe", str(folder), "--labels", str(labels), "--storage", str(run)]
    return cli.main(arguments)


def check_layer(storage: Storage, model: str, layer: str, units: int) -> dict[str, list]:
    """What holds for any layer of a real network: every unit with all its ranks, in order, and sensible masks."""
    assert storage.read(LEVELS, ["unit"], model=model, layer=layer)["unit"].to_pylist() == list(range(units))
    found = storage.read(EXEMPLARS, model=model, layer=layer).to_pydict()
    assert found["unit"] == np.repeat(np.arange(units), 15).tolist()
    assert found["rank"] == list(range(15)) * units
    activations = np.array(found["activation"]).reshape(units, 15)
    assert (np.diff(activations, axis=1) <= 0).all()
    ids = np.array(found["image_id"]).reshape(units, 15)
    assert all(len(set(row)) == 15 for row in ids)
    assert ids.min() >= 0 and ids.max() < IMAGES
    return found


def test_squeezenet_over_photographs_finds_what_it_was_trained_for(ray_session, shared, photographs, tmp_path, capsys):
    name = "squeezenet1_0/imagenet"
    run = tmp_path / "run"
    status = dissect(shared, photographs, run, name, "squeezenet1_0_deepcompression.pth", "features.12", OUTPUTS)
    assert status == 0, capsys.readouterr().err
    storage = Storage(run)
    assert [keys["layer"] for keys in storage.partitions(EXEMPLARS)] == ["features.12", OUTPUTS]
    assert len(storage.read(SKIPPED, model=name)) == 0

    found = check_layer(storage, name, "features.12", 512)
    sizes = masks.unpack(found["mask"], (224, 224)).reshape(512, 15, -1).mean(axis=2)
    assert (sizes[:, 0] > 0).mean() > 0.9
    # 1 % of all positions lie above the level, so the best images have far more than that, and never all.
    assert 0.01 < np.median(sizes[:, 0]) < 0.6

    outputs = check_layer(storage, name, OUTPUTS, 1000)
    best = np.array(outputs["image_id"]).reshape(1000, 15)[:, :3]
    own = [image in best[label] for image, label in enumerate(photographs[2])]
    assert np.mean(own) > 0.9

    assert (run / "report/index.html").is_file()
    assert len(list((run / "report").rglob("*.html"))) > 1


@pytest.mark.slow
def test_mobilenet_over_photographs_has_masks_where_its_relu6_does_not_saturate(
    ray_session, shared, photographs, tmp_path
):
    name = "mobilenet_v2/imagenet"
    assert dissect(shared, photographs, tmp_path, name, "mobilenet_v2_tf2_ptq.pth", "features.18") == 0
    storage = Storage(tmp_path)
    found = check_layer(storage, name, "features.18", 1280)
    levels = storage.read(LEVELS, model=name, layer="features.18")["level"].to_numpy()
    best = np.array(found["activation"]).reshape(1280, 15)[:, 0]
    shown: np.ndarray = masks.unpack(found["mask"], (224, 224)).reshape(1280, 15, -1)[:, 0].max(axis=1)
    # The last layer of these weights is often at its limit on more than 1 % of positions: nothing lies above such a
    # level.
    assert best.max() == levels.max() == 6
    assert (levels <= best).all()
    assert 0 < (levels < best).sum() < 1280
    assert shown[levels < best].mean() > 0.95
    assert (tmp_path / "report/index.html").is_file()


LAYOUTS = Path(__file__).parents[1] / "plugins/layout_models.py"
FEW = 16
GRIDS = {
    "swin": {"features.1": (56, 56), "features.3": (28, 28)},
    "convnext": {"stages.0": (56, 56), "stages.1": (28, 28)},
    "hiera": {"blocks.0": (56, 56), "blocks.2": (28, 28)},
    "dinov3": {"blocks.0": (14, 14), "blocks.3.mlp.fc1": (14, 14)},
    "vit": {"blocks.0": (16, 8), "blocks.0.mlp.fc1": (16, 8)},
}


@pytest.fixture(scope="module")
def few(photographs, tmp_path_factory) -> Path:
    """A folder of the first photographs."""
    folder = tmp_path_factory.mktemp("few")
    for file in sorted(photographs[0].iterdir())[:FEW]:
        shutil.copy(file, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("network", GRIDS)
def test_notebook_and_job_find_the_same_of_networks_of_any_layout(few, tmp_path, network):
    """Images, activations and masks, over photographs; positions as many as the network has."""
    pytest.importorskip("timm")
    name, storage, layers = f"layouts/{network}", Storage(tmp_path), GRIDS[network]
    arguments = ["exemplars", "--model", name, "--plugin", str(LAYOUTS), "--probe", str(few), "--k", "5"]
    assert cli.main([*arguments, "--storage", str(tmp_path), "--no-report"]) == 0
    found = milan_ray.dissect(name, str(few), k=5, plugins=[str(LAYOUTS)])
    assert list(layers) == list(found._exemplars)
    for layer, grid in layers.items():
        own, job = found._exemplars[layer], storage.read(EXEMPLARS, model=name, layer=layer).to_pydict()
        entries = storage.metadata(EXEMPLARS, model=name, layer=layer)
        assert entries is not None and tuple(json.loads(entries["layout"])["grid"]) == grid
        rows = job["unit"], job["rank"]
        assert len(rows[0]) == (own.ids >= 0).sum()
        assert own.ids[rows].tolist() == job["image_id"] and own.activations[rows].tolist() == job["activation"]
        view = (256, 128) if network == "vit" else (224, 224)
        packed = [own.masks[place] for place in zip(*rows, strict=True)]
        assert (masks.unpack(packed, view) == masks.unpack(job["mask"], view)).all()
