"""Reading ahead: the same batches for any number of threads, of images, of unreadable ones and of latents."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from milan_ray.engine import references
from milan_ray.engine.references import ProbeRef
from milan_ray.exemplars.forward import Batch, SharedInputs, read_ahead, read_inputs, reading
from milan_ray.exemplars.read_shard import ReadShard
from milan_ray.models.registry import ModelSpec
from milan_ray.models.view import Preprocess, View
from milan_ray.probe.base import Probe
from milan_ray.probe.manifest import image_refs

SPEC = ModelSpec("sees", lambda weights: nn.Identity(), ("",), Preprocess(View(resize=24, crop=24)))


def batches(probe: Probe, spec: ModelSpec, size: int, threads: int) -> list[Batch]:
    refs = image_refs(probe.manifest())
    found = list(read_ahead(probe, refs, spec, size, threads))
    assert [ref for part, _ in found for ref in part] == list(refs)
    return [batch for _, batch in found]


def same(ours: Batch, theirs: Batch) -> bool:
    tensors = [batch.inputs if isinstance(batch.inputs, tuple) else (batch.inputs,) for batch in (ours, theirs)]
    return (
        all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(*tensors, strict=True))
        and ours.ids.tolist() == theirs.ids.tolist()
        and (ours.sha256, ours.unreadable, ours.notes) == (theirs.sha256, theirs.unreadable, theirs.notes)
    )


@pytest.mark.parametrize(("size", "threads"), [(16, 1), (7, 3), (64, 1), (64, 5), (1000, 4)])
def test_batches_are_those_of_one_read_each_whatever_the_threads(photos: Path, tmp_path: Path, size, threads) -> None:
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    for number in (3, 40, 41):
        (file,) = folder.rglob(f"{number:03d}.png")
        file.write_bytes(b"no image")
    probe = references.probe(ProbeRef((str(folder),)))
    refs = image_refs(probe.manifest())
    expected = [read_inputs(probe, refs[start : start + size], SPEC) for start in range(0, len(refs), size)]
    assert sum(len(batch.unreadable) for batch in expected) == 3
    found = batches(probe, SPEC, size, threads)
    assert len(found) == len(expected) and all(map(same, found, expected))


@pytest.mark.parametrize("size", [1, 7, 16, 89, 1000])
def test_batches_of_what_another_process_has_read_are_those_of_reading_here(photos: Path, tmp_path: Path, size) -> None:
    """Through JSON and a read-only array, with remarks, and with images that cannot be read, all of a batch at once."""
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    dark = Image.fromarray(np.full((24, 24), 500, np.uint16))  # 16 bits that use nine: a remark
    for number in (0, 3, *range(14, 21), 89):
        (file,) = folder.rglob(f"{number:03d}.png")
        file.write_bytes(b"no image")
    for number in (5, 30, 88):
        (file,) = folder.rglob(f"{number:03d}.png")
        dark.save(file)
    probe = references.probe(ProbeRef((str(folder),)))
    refs = image_refs(probe.manifest())
    expected = batches(probe, SPEC, size, 1)
    assert sum(len(batch.notes) for batch in expected) == 3 and sum(len(batch.unreadable) for batch in expected) == 10
    packed = ReadShard.of(refs, read_inputs(probe, refs, SPEC))
    packed.views.flags.writeable = False
    received = ReadShard(packed.views, json.loads(json.dumps(packed.facts)))
    shared = SharedInputs(probe, [], 1, 2, lambda rows: received.batches(refs, rows))
    found = [batch for _, batch in shared.batches(SPEC, size)]
    assert len(found) == len(expected) and all(map(same, found, expected))
    assert all(batch.views.flags.writeable for batch in found)
    assert [ref for part, _ in received.batches(refs, size) for ref in part] == list(refs)


def test_batches_of_latents_are_those_of_one_read_each(tmp_path: Path) -> None:
    torch.save([torch.randn(50, 4), torch.arange(50)], tmp_path / "z.pth")
    probe = references.probe(ProbeRef((str(tmp_path),)))
    generator = ModelSpec("makes", SPEC.factory, ("",), SPEC.preprocess, images=lambda made: made)
    refs = image_refs(probe.manifest())
    assert len(refs) == 50
    expected = [read_inputs(probe, refs[start : start + 40], generator) for start in (0, 40)]
    assert all(map(same, batches(probe, generator, 40, 3), expected))


def test_models_share_what_they_read_the_same_way() -> None:
    def spec(name: str, side: int = 24, **options) -> ModelSpec:
        return ModelSpec(name, SPEC.factory, ("",), Preprocess(View(resize=side, crop=side)), **options)

    assert reading(spec("a")) == reading(spec("b"))
    assert reading(spec("a")) != reading(spec("b", side=32))
    assert reading(spec("a")) != reading(spec("b", inputs=lambda views: views))
    # A model that takes any number of bands is named where an image has another.
    banded = [spec(name, inputs=lambda views: views, bands=4) for name in "ab"]
    assert reading(banded[0]) != reading(banded[1])
