"""The encoder sees every image of a view once, for all units, layers and models."""

from __future__ import annotations

from pathlib import Path

import pytest

from milan_ray.config import ExemplarConfig, Resources
from milan_ray.engine.references import ModelRef, ProbeRef
from milan_ray.engine.stage import run_stage
from milan_ray.schema import ENCODINGS, EXEMPLARS
from milan_ray.stages.captioners import EncoderRef
from milan_ray.stages.encodings import BATCH_SIZE, Encodings, chunk_starts
from milan_ray.stages.exemplars import Exemplars
from milan_ray.storage import Storage

TINY = str(Path(__file__).resolve().parents[1] / "plugins/tiny_models.py")
ONE: dict[str, tuple[str, ...]] = {"tiny/twin": ("0",)}
ZOO: dict[str, tuple[str, ...]] = {**ONE, "tiny/cnn": ("0", "2")}

COUNTING = """
import torch
from torch import nn
from milan_ray.captioner.encoder import register_encoder

class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 5, 3, stride=2)

    def forward(self, images):
        with open({log!r}, "a") as log:  # images of zeros fill up a batch
            log.writelines(f"{{image.double().sum().item()}}\\n" for image in images if image.any())
        return self.conv(images)

register_encoder("counting", lambda weights: Counting(), ("conv",), size=24, mean=(0, 0, 0), std=(1, 1, 1))
"""


@pytest.fixture(scope="module")
def storage(ray_session, photos, tmp_path_factory) -> Storage:
    """Exemplars of two models over the same view."""
    storage = Storage(tmp_path_factory.mktemp("passes"))
    requests = [ModelRef(name, layers=layers, plugins=(TINY,)) for name, layers in ZOO.items()]
    config = ExemplarConfig(k=4, batch_size=16)
    Exemplars(requests, ProbeRef((str(photos),)), config).run(storage, Resources())
    return storage


def images_of(storage: Storage, models: dict[str, tuple[str, ...]]) -> set[int]:
    return {
        image_id
        for model, layers in models.items()
        for layer in layers
        for image_id in storage.read(EXEMPLARS, ["image_id"], model=model, layer=layer)["image_id"].to_pylist()
    }


def test_encoder_passes_are_unique_images_for_one_model_and_for_several(storage, tmp_path, monkeypatch):
    log, plugin = tmp_path / "log", tmp_path / "counting.py"
    plugin.write_text(COUNTING.format(log=str(log)))
    encoder = EncoderRef("counting", plugins=(str(plugin),))
    encoder.load().feature_size  # noqa: B018 - its images are zeros
    run_stage(Encodings(ONE, encoder), storage, Resources())
    assert len(log.read_text().splitlines()) == len(set(log.read_text().splitlines())) == len(images_of(storage, ONE))
    alone = encodings(storage)

    log.write_text("")
    storage.remove(ENCODINGS.name)
    monkeypatch.setattr(Encodings, "few", -1)  # by tasks, as for many
    run_stage(Encodings(ZOO, encoder), storage, Resources())
    assert len(images_of(storage, ZOO)) > len(images_of(storage, ONE))
    assert len(log.read_text().splitlines()) == len(set(log.read_text().splitlines())) == len(images_of(storage, ZOO))
    assert encodings(storage).equals(alone)  # other images in a batch change nothing


def encodings(storage: Storage):
    return storage.read(ENCODINGS, encoder="counting", model="tiny/twin", layer="0")


def test_chunks_are_small_for_few_images_and_bounded_for_many():
    assert chunk_starts([], 0) == ()
    assert chunk_starts([5], 1) == (5,)
    assert chunk_starts(range(300), 300) == tuple(range(0, 300, 2 * BATCH_SIZE))
    assert chunk_starts(range(50_000), 50_000) == tuple(range(0, 50_000, 48 * BATCH_SIZE))
    assert chunk_starts(range(500_000), 500_000) == tuple(range(0, 500_000, 64 * BATCH_SIZE))
    assert chunk_starts(range(500_000), 4_000_000) == tuple(range(0, 500_000, 32 * BATCH_SIZE))
    assert chunk_starts(range(500_000), 50_000_000) == tuple(range(0, 500_000, 16 * BATCH_SIZE))
    assert all(start % BATCH_SIZE == 0 for start in chunk_starts(range(5000), 9000))
