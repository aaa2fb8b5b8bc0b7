"""The places where the host must wait for a GPU: each does, and ARCHITECTURE.md lists it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from pretended import CUDA, HostWaits, PretendedCuda
from torch import nn
from toys import toy_captioner

from milan_ray.captioner.beam import beam_search
from milan_ray.captioner.contrast import logp_given
from milan_ray.captioner.encoder import EncoderSpec, MaskedExemplars, PyramidEncoder, encode_exemplars
from milan_ray.captioner.training import EarlyStopping, greedy_captions
from milan_ray.exemplars import forward as forward_module
from milan_ray.exemplars import masks, pooled, shard
from milan_ray.exemplars.concepts import fires
from milan_ray.exemplars.forward import Forward
from milan_ray.exemplars.levels import RunningLevel
from milan_ray.exemplars.shard import LayerState, StateConfig
from milan_ray.models.batch_mates import summary
from milan_ray.models.image_text import Embedder
from milan_ray.models.layouts import Layout
from milan_ray.models.registry import ModelSpec
from milan_ray.models.view import Preprocess, View
from milan_ray.probe.arrays import ArrayProbe
from milan_ray.probe.manifest import image_refs
from milan_ray.stages.dnd import passes
from milan_ray.stages.embeddings import embed_refs

ARCHITECTURE = Path(__file__).resolve().parents[2] / "ARCHITECTURE.md"


def on_gpu(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device=CUDA)


def store_a_shard(gpu: PretendedCuda) -> object:
    state = LayerState.empty(StateConfig(10, 3, 0.9, 2**20, 2**28), 6, (5, 5), CUDA)
    return shard.to_table(state, state.topk)


def first_batch(gpu: PretendedCuda) -> object:
    spec = ModelSpec("small", lambda _: nn.Sequential(nn.Conv2d(3, 4, 3)), ("0",), Preprocess(View(8, 8)))
    layouts = {"0": Layout((4, 6, 6), 0, 1, (6, 6))}
    network = gpu.network(spec.load())
    return Forward(spec, network, ("0",), 2, layouts=layouts).maps(np.zeros((2, 8, 8, 3), np.uint8))


def checked(gpu: PretendedCuda) -> Forward:
    """A network after its first batch: what remains to wait for is not its check."""
    spec = ModelSpec("small", lambda _: nn.Sequential(nn.Conv2d(3, 4, 3)), ("0",), Preprocess(View(8, 8)))
    network = gpu.network(spec.load())
    forward = Forward(spec, network, ("0",), 2, layouts={"0": Layout((4, 6, 6), 0, 1, (6, 6))})
    forward_module._CHECKED[forward._model] = Everything()
    return forward


class Everything(set[object]):
    """The configurations for which a network was checked: all."""

    def __contains__(self, item: object) -> bool:
        return True


def generated_images(gpu: PretendedCuda) -> object:
    spec = ModelSpec("small", lambda _: nn.Identity(), (), Preprocess(View((8, 8), None)), images=lambda images: images)
    forward = Forward(spec, gpu.network(nn.Linear(1, 1)), (), 2)
    forward._model = nn.Identity()
    return forward.images((torch.zeros(2, 3, 8, 8),))


def captioner_on(gpu: PretendedCuda):
    captioner = toy_captioner(beam_size=5)
    assert captioner.lm is not None
    gpu.network(captioner.decoder), gpu.network(captioner.lm)
    return captioner


def encode(gpu: PretendedCuda) -> object:
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3, 2))
    encoder = PyramidEncoder(EncoderSpec("small", lambda _: backbone, ("0",), size=20), backbone)
    _ = encoder.feature_size
    encoder = gpu.network(encoder)
    exemplars = MaskedExemplars(np.zeros(2, np.int64), lambda places: torch.ones(len(places), 20, 20))
    return encode_exemplars(encoder, [exemplars], lambda start, stop: encoder.maps(on_gpu(1, 3, 20, 20)), 1, 1)


class Brightness:
    """A model of images: their mean colours."""

    view = View(8, 8)

    def embed_images(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean(dim=(2, 3))

    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        return on_gpu(len(texts), 3)


def embed_a_picture(gpu: PretendedCuda) -> object:
    probe = ArrayProbe(np.zeros((1, 8, 8, 3), np.uint8))
    return embed_refs(cast(Embedder, Brightness()), probe, image_refs(probe.manifest()), CUDA)


PICTURES = np.zeros((5, 8, 8, 3), np.uint8)
DISSECTING: dict[str, Callable[[PretendedCuda], object]] = {
    "unit_maps": lambda gpu: passes.unit_maps(checked(gpu), PICTURES, "0", [2, 0], 2),
    "unit_vectors": lambda gpu: passes.unit_vectors(cast(Embedder, Brightness()), PICTURES, CUDA),
    "pooled_values": lambda gpu: passes.pooled_values(checked(gpu), PICTURES, pooled.means, 2),
    "fits": lambda gpu: passes.fits(cast(Embedder, Brightness()), np.zeros((3, 3), np.float32), ["red", "a house"]),
}
"""Describe-and-Dissect's: each reads what it has computed once, when all of it is under way."""

MUST_WAIT: dict[str, Callable[[PretendedCuda], object]] = {
    "exemplars.forward.Forward.maps": first_batch,
    "exemplars.forward.Forward.images": generated_images,
    "exemplars.shard.to_table": store_a_shard,
    "exemplars.levels.RunningLevel.result": lambda gpu: RunningLevel.empty(6, 0.9, 100, CUDA).result(),
    "exemplars.pooled.to_table": lambda gpu: pooled.to_table(np.arange(4), [on_gpu(4, 6)], [on_gpu(4, 6)]),
    "exemplars.masks.packed_masks": lambda gpu: masks.packed_masks(
        lambda part: on_gpu(len(part), 5, 5), torch.zeros(6), (20, 20)
    ),
    "exemplars.concepts.fires": lambda gpu: fires(on_gpu(6, 5, 5), on_gpu(6), (20, 20)),
    "models.batch_mates.summary": lambda gpu: summary(on_gpu(4, 6, 5, 5)),
    "captioner.encoder.encode_exemplars": encode,
    "captioner.beam.beam_search": lambda gpu: beam_search(captioner_on(gpu).decoder, on_gpu(3, 4, 10), 5, 7),
    "captioner.captioner.Captioner.candidates": lambda gpu: captioner_on(gpu).candidates(
        np.zeros((3, 4, 10), np.float32)
    ),
    "captioner.contrast.logp_given": lambda gpu: logp_given(
        captioner_on(gpu), [[4, 5], [6]], np.zeros((3, 10), np.float32)
    ),
    "captioner.training.greedy_captions": lambda gpu: greedy_captions(
        (captioner := captioner_on(gpu)).decoder, on_gpu(3, 4, 10), captioner.indexer
    ),
    "captioner.training.EarlyStopping.update": lambda gpu: EarlyStopping().update(0, 1.0, gpu.network(nn.Linear(2, 2))),
    "stages.embeddings.embed_refs": embed_a_picture,
    **{f"stages.dnd.passes.{name}": of for name, of in DISSECTING.items()},
}
"""Place → something that goes there; what runs for every batch besides is in ``test_hot_path.py``."""


@pytest.mark.parametrize("place", MUST_WAIT)
def test_place_that_must_wait_for_the_gpu_does(place: str) -> None:
    with PretendedCuda() as gpu, pytest.raises(HostWaits):
        MUST_WAIT[place](gpu)


def test_places_that_must_wait_are_those_that_the_architecture_lists() -> None:
    text = ARCHITECTURE.read_text(encoding="utf-8").partition("## On a GPU")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `([\w.]+)` \|", text, flags=re.MULTILINE) == list(MUST_WAIT)


@pytest.mark.parametrize("name", DISSECTING)
def test_describing_and_dissecting_waits_for_a_result_once(name: str) -> None:
    with PretendedCuda(reads=1) as gpu:
        DISSECTING[name](gpu)
        assert gpu.reads_left == 0
