"""The options of a forward pass: memory format within float error, mixed precision within its own rounding."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from milan_ray.config import Arithmetic, ExemplarConfig, config_hash
from milan_ray.exemplars.forward import Forward
from milan_ray.models.registry import ModelSpec
from milan_ray.models.view import Preprocess, View

LAYERS = ("0", "3")


def network(weights: str | None) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.Flatten(), nn.Linear(1024, 4)
    ).eval()


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return ModelSpec("net", network, LAYERS, Preprocess(View(None, None, size=(20, 20))))


@pytest.fixture(scope="module")
def views() -> torch.Tensor:
    return torch.randint(0, 256, (5, 20, 20, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def maps(spec: ModelSpec, views: torch.Tensor, arithmetic: Arithmetic) -> dict[str, torch.Tensor]:
    return Forward(spec, spec.load(), LAYERS, 8, arithmetic).maps(views.numpy())


def test_channels_last_agrees_within_float_error_and_lies_units_last(spec, views):
    plain = maps(spec, views, Arithmetic())
    fast = maps(spec, views, Arithmetic(channels_last=True))
    for layer in LAYERS:
        torch.testing.assert_close(fast[layer], plain[layer], rtol=1e-5, atol=1e-5)
        assert fast[layer].stride(1) == 1
        assert plain[layer].stride(1) != 1


@pytest.mark.parametrize("precision, digits", [("bfloat16", 2**-6), ("float16", 2**-8)])
def test_mixed_precision_rounds_activations_and_gives_float32_maps(spec, views, precision, digits):
    plain = maps(spec, views, Arithmetic())
    rounded = maps(spec, views, Arithmetic(precision))
    for layer in LAYERS:
        assert rounded[layer].dtype == torch.float32
        assert not torch.equal(rounded[layer], plain[layer])
        assert (rounded[layer] - plain[layer]).abs().max() < digits * plain[layer].abs().max()
        assert torch.equal(rounded[layer].to(getattr(torch, precision)).float(), rounded[layer])


def test_arithmetic_is_part_of_the_identity():
    kinds = [Arithmetic(), Arithmetic(channels_last=True), Arithmetic("bfloat16"), Arithmetic("float16")]
    assert len({config_hash(ExemplarConfig(arithmetic=kind).identity()) for kind in kinds}) == len(kinds)
