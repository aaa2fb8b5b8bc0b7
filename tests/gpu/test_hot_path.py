"""What runs for every batch, image, unit or training step never makes the host wait for a GPU."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from pretended import CUDA, PretendedCuda
from torch import Tensor, nn
from toys import TEXTS, toy_captioner

from milan_ray.benchmarks.exemplars import dissect
from milan_ray.captioner import encoder as encoder_module
from milan_ray.captioner.beam import Beams, search_all_beams
from milan_ray.captioner.captioner import Captioner
from milan_ray.captioner.decoder import decode_forced, decode_stepwise
from milan_ray.captioner.encoder import (
    EncoderSpec,
    MaskedExemplars,
    PyramidEncoder,
    SpatialEncoder,
    encode_exemplars,
    pool_maps,
)
from milan_ray.captioner.quirks import REFERENCE
from milan_ray.captioner.rerank import beam_logp
from milan_ray.captioner.training import (
    collate_decoder,
    collate_lm,
    decoder_epoch,
    lm_epoch,
    lm_loss,
    optimizer_for,
)
from milan_ray.config import FLOAT32, Arithmetic, TrainingConfig
from milan_ray.engine import references
from milan_ray.engine.references import ModelRef
from milan_ray.exemplars import forward as forward_module
from milan_ray.exemplars import masks, pooled
from milan_ray.exemplars.feature_maps import FeatureMaps
from milan_ray.exemplars.forward import Forward
from milan_ray.exemplars.levels import RunningLevel
from milan_ray.exemplars.shard import Committed, LayerState, LayerStates, StateConfig
from milan_ray.exemplars.topk import RunningTopK
from milan_ray.labelers.clip_dissect import WPMI, Cosines, pointwise, rank_reorder
from milan_ray.models.establish import established
from milan_ray.models.features.dictionary import Dictionary, Weights
from milan_ray.models.features.given import feature_set
from milan_ray.models.features.moments import Moments
from milan_ray.models.features.nmf import PartSums
from milan_ray.models.features.sae import SaeConfig, SparseAutoencoder
from milan_ray.models.image_text import ImageText
from milan_ray.models.layouts import Layout
from milan_ray.models.registry import ModelSpec
from milan_ray.models.splice import spliced
from milan_ray.models.view import Preprocess
from milan_ray.stages.embeddings import products
from milan_ray.stages.encodings import encode
from milan_ray.stages.images import png
from tests.plugins.tiny_clip import save_clip

PLAN = StateConfig(images=100, k=3, quantile=0.9, samples=2**20, map_budget=2**28)
SAMPLED = StateConfig(images=100, k=3, quantile=0.9, samples=200, map_budget=0)


def on_gpu(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=CUDA)


def indices(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.long, device=CUDA)


# -- kernels ----------------------------------------------------------------------------------------------------------


def topk_with_maps() -> RunningTopK:
    state = RunningTopK.empty(6, 3, (5, 5), CUDA)
    state.update(on_gpu(4, 6), indices(4), on_gpu(4, 6, 5, 5))
    state.merge(RunningTopK.empty(6, 3, (5, 5), CUDA))
    return state.within(state.without_maps())


def level_of_a_shard() -> Tensor:
    state, other = (RunningLevel.empty(6, 0.9, 1000, CUDA) for _ in range(2))
    for _ in range(3):
        state.update(on_gpu(4, 6, 25), other.lower_bound)
    state.merge(other)
    state.trim()
    return state.sorted_tail()


def layer_state(plan: StateConfig, memory_format: torch.memory_format) -> Tensor:
    state = LayerState.empty(plan, 6, (5, 5), CUDA)
    known = Committed(state)
    for first in (0, 4):
        maps = on_gpu(4, 6, 5, 5).contiguous(memory_format=memory_format)
        state.update(maps, np.arange(first, first + 4), known)
    known.commit(0, state)
    return known.delta(state).values


def autoencoder(activation: str) -> SparseAutoencoder:
    moments = Moments(6)
    moments.add(torch.arange(48.0).view(8, 6).sin())
    return SparseAutoencoder(moments, 12, activation, 3, SaeConfig(), device=CUDA)


KERNELS: dict[str, Callable[[], object]] = {
    "top-k": topk_with_maps,
    "levels": level_of_a_shard,
    "layer state": lambda: layer_state(PLAN, torch.contiguous_format),
    "layer state, channels last": lambda: layer_state(PLAN, torch.channels_last),
    "layer state, sampled positions": lambda: layer_state(SAMPLED, torch.contiguous_format),
    "layer state, sampled positions, channels last": lambda: layer_state(SAMPLED, torch.channels_last),
    "all layers": lambda: LayerStates(PLAN, 2).update({"a": on_gpu(4, 6, 5, 5)}, np.arange(4), {}),
    "maxima": lambda: pooled.maxima(on_gpu(4, 6, 5, 5)),
    "means": lambda: pooled.means(on_gpu(4, 6, 5, 5)),
    "masks": lambda: masks.masks(on_gpu(6, 5, 5), on_gpu(6), (20, 20)),
    "preprocessing": lambda: Preprocess()(on_gpu(4, 8, 8, 3, dtype=torch.uint8)),
    "generated pixels": lambda: Preprocess().pixels(on_gpu(4, 3, 8, 8)),
    "tokens in an order of their own": lambda: Layout((4, 6), 0, 2, (2, 2), order=(3, 1, 0, 2)).maps(on_gpu(5, 4, 6)),
    "pooling with masks": lambda: pool_maps([on_gpu(4, 6, 5, 5)], on_gpu(3, 20, 20), indices(3)),
    "pooling with masks, channels last": lambda: pool_maps(
        [on_gpu(4, 6, 5, 5).contiguous(memory_format=torch.channels_last)], on_gpu(3, 20, 20) > 0, indices(3)
    ),
    "moments": lambda: Moments(6, CUDA).add(on_gpu(8, 6)),
    "sums of a factorisation": lambda: PartSums(3, 6, CUDA).add(on_gpu(8, 6), on_gpu(3, 6)),
    "step of a TopK autoencoder": lambda: autoencoder("topk").step(on_gpu(8, 6)),
    "step of a JumpReLU autoencoder": lambda: autoencoder("jumprelu").step(on_gpu(8, 6)),
    "other maps in a layer": lambda: spliced(on_gpu(5, 4, 6), on_gpu(5, 6, 2, 2), Layout((4, 6), 0, 2, (2, 2))),
    "products of embeddings": lambda: products(np.zeros((5, 4), np.float32), on_gpu(6, 4), 5),
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernel_on_a_gpu_never_waits(name: str) -> None:
    with PretendedCuda():
        KERNELS[name]()


# -- forward passes and the loop of a shard ---------------------------------------------------------------------------


class Everything(set[object]):
    """The configurations for which a network was checked: all."""

    def __contains__(self, item: object) -> bool:
        return True


@pytest.fixture(scope="module")
def resnet() -> tuple[ModelSpec, nn.Module, dict[str, Layout]]:
    spec = references.model(ModelRef("resnet18/imagenet", "random", ("conv1", "layer1", "layer4")))
    network = spec.load()
    return spec, network, established(spec, network, spec.layers)


@pytest.mark.parametrize("arithmetic", [FLOAT32, Arithmetic(channels_last=True)], ids=["float32", "channels-last"])
def test_shard_after_a_networks_first_batch_never_waits(
    resnet: tuple[ModelSpec, nn.Module, dict[str, Layout]], arithmetic: Arithmetic
) -> None:
    spec, network, layouts = resnet
    forward = Forward(spec, deepcopy(network), spec.layers, 4, arithmetic, layouts)
    with PretendedCuda() as gpu:
        # The network moves only now, because parameters without values cannot be changed to channels_last.
        on_device = gpu.network(forward._model)
        forward._device = CUDA
        forward_module._CHECKED[on_device] = Everything()
        states = LayerStates(PLAN, 2)
        dissect(forward, states, np.zeros((6, *spec.view_shape), np.uint8), 4)
        maps = forward.maps(np.zeros((3, *spec.view_shape), np.uint8))
    assert set(states.states) == set(spec.layers)
    assert all(each.is_cuda and len(each) == 3 for each in maps.values())


@pytest.mark.parametrize("activation", ["relu", "topk"])
def test_features_on_a_gpu_never_wait(activation: str) -> None:
    matrix = torch.ones(9, 6)
    dictionary = Dictionary(Weights(matrix, matrix), activation, 3 if activation == "topk" else None)
    found = FeatureMaps(feature_set("layer#set", dictionary), torch.device("cpu"))
    states = LayerStates(PLAN, 2, ["layer#set"])
    assert isinstance(found._encoder, Dictionary)
    with PretendedCuda() as gpu:
        found._encoder = gpu.network(found._encoder)  # once, where the host may wait
        for rows, maps in found.pieces(on_gpu(4, 6, 5, 5), 4):
            states.update({"layer#set": maps}, np.arange(4)[rows], {})
    assert states.states["layer#set"].topk.values.is_cuda


# -- encoders ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def pyramid() -> PyramidEncoder:
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.Conv2d(4, 6, 3, 2))
    return PyramidEncoder(EncoderSpec("small", lambda _: backbone, ("0", "2"), size=20), backbone)


def exemplars(count: int) -> list[MaskedExemplars]:
    """Two groups of exemplars of images 0 … count − 1, with masks of two sizes."""

    def masked(side: int) -> MaskedExemplars:
        return MaskedExemplars(np.arange(2 * count) % count, lambda places: torch.ones(len(places), side, side))

    return [masked(side) for side in (20, 30)]


def test_encoding_a_chunk_reads_its_features_once_all_passes_are_under_way(pyramid: PyramidEncoder) -> None:
    pictures = [png(np.zeros((30, 30, 3), np.uint8))] * 6
    _ = pyramid.feature_size  # once per encoder
    with PretendedCuda(reads=6) as gpu:  # two groups in three batches
        encoder = gpu.network(pyramid)

        def maps(start: int, stop: int) -> list[Tensor]:
            assert gpu.reads_left == 6
            return encode(encoder, pictures[start:stop], 2)

        features = encode_exemplars(encoder, exemplars(6), maps, 6, 2)
    assert [part.shape for part in features] == [(12, 10), (12, 10)] and gpu.reads_left == 0


def test_encoding_a_chunk_reads_features_that_would_fill_the_gpu_earlier(
    pyramid: PyramidEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder_module, "HELD", 4 * 10 * 4)  # bytes of one batch's features of a group
    _ = pyramid.feature_size
    left: list[int] = []
    with PretendedCuda(reads=6) as gpu:
        encoder = gpu.network(pyramid)

        def maps(start: int, stop: int) -> list[Tensor]:
            left.append(gpu.reads_left)
            return encoder.maps(on_gpu(2, 3, 20, 20))

        encode_exemplars(encoder, exemplars(6), maps, 6, 2)
    assert left == [6, 4, 2]


def test_encoders_on_a_gpu_never_wait(pyramid: PyramidEncoder) -> None:
    with PretendedCuda() as gpu:
        encoder = gpu.network(pyramid)
        assert encoder(encoder.fit(on_gpu(4, 3, 30, 30)), on_gpu(4, 30, 30)).shape == (4, 10)
        assert SpatialEncoder(encoder)(on_gpu(4, 3, 20, 20), on_gpu(4, 20, 20)).is_cuda


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_image_text_models_on_a_gpu_never_wait(kind: str, tmp_path: Path) -> None:
    model = ImageText(save_clip(tmp_path, kind))
    with PretendedCuda() as gpu:
        model = gpu.network(model)
        assert model.embed_images(on_gpu(20, 3, 40, 30)).shape == (20, model.width)
        assert model.embed_texts(["a red house", "dogs on the grass"]).is_cuda
        maps = model.maps(on_gpu(4, 3, model.size, model.size))
        assert model.pool(maps, on_gpu(5, 30, 30), indices(5)).shape == (5, 2 * model.width)


# -- captioners -------------------------------------------------------------------------------------------------------


@pytest.fixture
def captioner() -> Captioner:
    return toy_captioner(beam_size=5)


def gpu_captioner(gpu: PretendedCuda, captioner: Captioner) -> Captioner:
    assert captioner.lm is not None
    gpu.network(captioner.decoder), gpu.network(captioner.lm)
    return captioner


@pytest.mark.parametrize("mutual", [False, True])
def test_beam_search_and_reranking_on_a_gpu_never_wait(captioner: Captioner, mutual: bool) -> None:
    with PretendedCuda() as gpu:
        captioner = gpu_captioner(gpu, captioner)
        features = captioner._features(np.zeros((3, 4, 10), np.float32))
        beams = search_all_beams(captioner.decoder, features, 5, 7, captioner.lm if mutual else None)
        assert captioner.lm is not None and beams.tokens.shape == (3, 5, 7)
        assert beam_logp(captioner.lm, beams).shape == (3, 5)
        assert beam_logp(captioner.lm, Beams(beams.tokens[:, :, :4], beams.scores, beams.steps), REFERENCE).is_cuda


@pytest.mark.parametrize("sample", [False, True])
def test_other_decoding_on_a_gpu_never_waits(captioner: Captioner, sample: bool) -> None:
    with PretendedCuda() as gpu:
        captioner = gpu_captioner(gpu, captioner)
        features = on_gpu(3, 4, 10)
        decoded = decode_stepwise(captioner.decoder, features, 6, captioner.lm, sample=sample)
        assert decode_forced(captioner.decoder, features, decoded.tokens, captioner.lm).scores.is_cuda


@pytest.mark.parametrize("part", ["lm", "decoder"])
def test_training_epoch_on_a_gpu_waits_once_for_its_loss(captioner: Captioner, part: str) -> None:
    indexer, config = captioner.indexer, TrainingConfig()
    words = [indexer.words(indexer.tokenizer(text)) for texts in TEXTS for text in texts]
    with PretendedCuda(reads=1) as gpu:
        captioner = gpu_captioner(gpu, captioner)
        if part == "lm":
            assert captioner.lm is not None
            model: nn.Module = captioner.lm
            batches = (collate_lm(words[first:], indexer) for first in range(3))
            lm_epoch(model, optimizer_for(model, config), batches, indexer.ids.pad, config)
        else:
            model = captioner.decoder
            steps = (collate_decoder(on_gpu(4, 2, 10), words, indexer) for _ in range(3))
            on_device = (batch._replace(targets=indices(*batch.targets.shape)) for batch in steps)
            decoder_epoch(model, optimizer_for(model, config), on_device, indexer.ids.pad, config)
        assert gpu.reads_left == 0
    assert all(parameter.grad is not None and parameter.grad.is_cuda for parameter in model.parameters())


def test_validation_of_a_language_model_on_a_gpu_reads_a_loss_per_batch_at_its_end(captioner: Captioner) -> None:
    indexer = captioner.indexer
    words = [indexer.words(indexer.tokenizer(text)) for texts in TEXTS for text in texts]
    with PretendedCuda(reads=3) as gpu:
        captioner = gpu_captioner(gpu, captioner)
        assert captioner.lm is not None

        def batches():
            for first in range(3):
                assert gpu.reads_left == 3
                yield collate_lm(words[first:], indexer)

        lm_loss(captioner.lm, batches(), indexer.ids.pad)


# -- labelers ---------------------------------------------------------------------------------------------------------

ROWS = torch.tensor([[3, 1, 0], [2, -1, -1], [4, 0, -1]])

LABELERS: dict[str, Callable[[], Tensor]] = {
    "soft_wpmi": lambda: pointwise(on_gpu(5, 7), on_gpu(5).double(), ROWS, WPMI["soft_wpmi"]),
    "wpmi": lambda: pointwise(on_gpu(5, 7), on_gpu(5).double(), ROWS, WPMI["wpmi"]),
    "rank reorder": lambda: rank_reorder(on_gpu(5, 7), ROWS, torch.ones(3, 3)),
}


@pytest.mark.parametrize("name", LABELERS)
def test_similarities_of_clip_dissect_on_a_gpu_never_wait(name: str) -> None:
    with PretendedCuda():
        assert LABELERS[name]().shape == (3, 7)


def test_cosines_of_clip_dissect_on_a_gpu_never_wait() -> None:
    with PretendedCuda():
        state = Cosines(on_gpu(3).double(), on_gpu(7).double(), 3)
        state.update(on_gpu(5, 3), on_gpu(5, 7))
        assert state.result().shape == (3, 7)
