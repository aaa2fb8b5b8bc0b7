"""Generators on a real local Ray: tensors on disk in, exemplars of generated images out, and on to the report."""

from __future__ import annotations

import io
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from milan_ray.config import ExemplarConfig, Resources
from milan_ray.engine.references import ModelRef, ProbeRef, model
from milan_ray.engine.stage import run_stage
from milan_ray.errors import MilanError
from milan_ray.exemplars import masks
from milan_ray.report import write_report
from milan_ray.schema import ENCODINGS, EXEMPLARS, VIEWS
from milan_ray.stages.captioners import EncoderRef
from milan_ray.stages.encodings import Encodings
from milan_ray.stages.exemplars import Exemplars
from milan_ray.storage import Storage

PLUGINS = Path(__file__).resolve().parents[1] / "plugins"
PLUGIN = str(PLUGINS / "tiny_generators.py")
GENERATOR = ModelRef("tiny/generator", plugins=(PLUGIN,))
CONFIG = ExemplarConfig(k=4, batch_size=16, shard_size=40)
LAYERS = ("layer0", "layer1")


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 codes and classes as the reference keeps them: one .pth each."""
    folder = tmp_path_factory.mktemp("latents")
    generator = torch.Generator().manual_seed(0)
    torch.save(torch.randint(3, (100,), generator=generator), folder / "classes.pth")
    torch.save(torch.randn(100, 6, generator=generator), folder / "codes.pth")
    return folder


def run(path: Path, latents: Path, config: ExemplarConfig = CONFIG, request: ModelRef = GENERATOR) -> Storage:
    storage = Storage(path)
    Exemplars([request], ProbeRef((str(latents),)), config).run(storage, Resources())
    return storage


@pytest.fixture(scope="module")
def dissected(ray_session, latents: Path, tmp_path_factory: pytest.TempPathFactory) -> Storage:
    return run(tmp_path_factory.mktemp("run"), latents)


def generated(latents: Path) -> tuple[np.ndarray, torch.Tensor]:
    """Images uint8 (100, 24, 24, 3) and maps of layer0, without any of our machinery."""
    net: Any = model(GENERATOR).load()
    z, y = torch.load(latents / "codes.pth"), torch.load(latents / "classes.pth")
    y = F.one_hot(y, 3).float()
    with torch.inference_mode():
        hidden = net.first(z).view(-1, 5, 4, 4)
        maps = torch.tanh(2 * net.layer0.up(hidden) + net.layer0.shift(y)[:, :, None, None])
        images = (net(z, y)["image"] * 255).round().to(torch.uint8)
    rows = np.arange(24) * 16 // 24
    return images.permute(0, 2, 3, 1).numpy()[:, rows][:, :, rows], maps


def views(storage: Storage, layer: str = "layer0", name: str = "tiny/generator") -> dict[int, np.ndarray]:
    """The stored images of a layer's exemplars."""
    meta = storage.metadata(EXEMPLARS, model=name, layer=layer)
    assert meta is not None
    found = {}
    for keys in storage.partitions(VIEWS, probe=meta["probe"], view=meta["view"]):
        for row in storage.read(VIEWS, **keys).to_pylist():
            found[row["image_id"]] = np.asarray(Image.open(io.BytesIO(row["image"])))
    return found


def test_generator_exemplars_equal_a_naive_loop(dissected, latents):
    images, maps = generated(latents)
    pooled = maps.amax(dim=(2, 3)).numpy()
    levels = np.quantile(maps.permute(1, 0, 2, 3).reshape(7, -1).double().numpy(), 0.99, axis=1, method="hazen")
    stored = views(dissected)
    rows = dissected.read(EXEMPLARS, model="tiny/generator", layer="layer0").to_pylist()
    assert len(rows) == 7 * 4
    for row in rows:
        unit, image = row["unit"], row["image_id"]
        assert image == np.argsort(-pooled[:, unit], kind="stable")[row["rank"]]
        assert row["activation"] == pytest.approx(pooled[image, unit], rel=1e-5)
        expected = masks.masks(maps[image, unit][None], torch.tensor([levels[unit]]).float(), (24, 24))[0].numpy()
        assert (masks.unpack([row["mask"]], (24, 24))[0] != expected).sum() <= 1
        assert np.abs(stored[image].astype(int) - images[image]).max() <= 1


def test_generator_views_are_its_own_and_follow_its_weights(dissected, latents, tmp_path):
    shutil.copytree(dissected.root, tmp_path / "run")
    weights = tmp_path / "other.pth"
    weights.write_bytes(b"other")
    storage = run(tmp_path / "run", latents, request=replace(GENERATOR, weights=str(weights)))
    entries = [s.metadata(EXEMPLARS, model="tiny/generator", layer="layer0") for s in (dissected, storage)]
    keys = [entry["view"] for entry in entries if entry is not None]
    assert len(keys) == 2 and keys[0] != keys[1] and all(key.startswith("tiny/generator ") for key in keys)
    before = views(dissected)
    assert not any(i in before and np.array_equal(image, before[i]) for i, image in views(storage).items())


def test_generator_killed_before_its_views_draws_the_same_again(dissected, latents, tmp_path):
    shutil.copytree(dissected.root, tmp_path, dirs_exist_ok=True)
    storage = Storage(tmp_path)
    storage.remove(VIEWS.name)
    run(tmp_path, latents)
    expected = dissected.partitions(VIEWS)
    assert storage.partitions(VIEWS) == expected
    assert all(storage.read(VIEWS, **keys).equals(dissected.read(VIEWS, **keys)) for keys in expected)


def test_generator_exemplars_reach_encodings_and_report(dissected, tmp_path):
    encoder = EncoderRef("tiny", plugins=(str(PLUGINS / "tiny_models.py"),))
    run_stage(Encodings({"tiny/generator": LAYERS}, encoder), dissected, Resources())
    assert dissected.read(ENCODINGS, encoder="tiny", model="tiny/generator", layer="layer1").num_rows == 4 * 4
    write_report(dissected, tmp_path)
    assert len(list(tmp_path.rglob("*.jpg"))) >= len(views(dissected, "layer1"))


def test_generator_given_images_and_classifier_given_latents_are_refused(ray_session, photos, latents, tmp_path):
    with pytest.raises(MilanError, match="tiny/generator generates images from tensors"):
        run(tmp_path, photos)
    cnn = ModelRef("tiny/cnn", plugins=(str(PLUGINS / "tiny_models.py"),))
    with pytest.raises(MilanError, match="tiny/cnn takes images, but probe"):
        run(tmp_path, latents, request=cnn)


def test_parity_generators_through_the_pipeline(ray_session, golden, tmp_path):
    """The golden generator from its files to tables: ids, activations, masks and images of the reference."""
    request = ModelRef("golden/generator", str(golden / "toygen_seed13.pth"), ("layer0",), (PLUGIN,))
    probe = ProbeRef((str(golden / "toygen_inputs_seed17.npz"),))
    config = ExemplarConfig(batch_size=32, truncate_bytes=True, map_budget=0)  # masks from a second pass
    storage = Storage(tmp_path)
    Exemplars([request], probe, config).run(storage, Resources())
    table = storage.read(EXEMPLARS, model="golden/generator", layer="layer0")
    folder = golden / "exemplars/toygen/layer0"
    expected, packed = np.load(folder / "stats.npz"), np.load(folder / "masks_packed.npz")
    np.testing.assert_array_equal(table["image_id"].to_numpy().reshape(9, 15), expected["topk_ids"])
    np.testing.assert_allclose(table["activation"].to_numpy().reshape(9, 15), expected["topk_values"], rtol=1e-5)
    ours = masks.unpack(table["mask"].to_pylist(), (224, 224))
    theirs = np.unpackbits(packed["packed"], axis=-1).reshape(ours.shape).astype(bool)
    assert (ours & theirs).sum() >= 0.99 * (ours | theirs).sum()
    drawn = views(storage, "layer0", "golden/generator")
    stored = np.load(folder / "images_head.npz")["images"]
    for ids, images in zip(expected["topk_ids"], stored, strict=False):
        np.testing.assert_array_equal(np.stack([drawn[i] for i in ids]).transpose(0, 3, 1, 2), images)
