"""Matrix products of searches: oneDNN's where the processor has AVX-512, torch's elsewhere, within float error."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from milan_ray.captioner import products
from milan_ray.captioner.decoder import Decoder, DecoderConfig, DecoderProducts
from milan_ray.captioner.products import Product


@pytest.fixture(params=["AVX512", "AVX2"])
def capability(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What torch says of the processor."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: request.param)
    return str(request.param)


@pytest.mark.parametrize("rows", [0, 1, 2, 17])
@pytest.mark.parametrize("biased", [False, True])
def test_product_is_torchs_within_float_error(capability: str, rows: int, biased: bool) -> None:
    torch.manual_seed(rows)
    x, weight, bias = torch.randn(rows, 40), torch.randn(7, 60)[:, 20:], torch.randn(7) if biased else None
    found = Product(weight, bias)(x)
    assert found.layout == torch.strided and found.shape == (rows, 7)
    torch.testing.assert_close(found, F.linear(x, weight, bias), atol=1e-5, rtol=1e-5)


def test_product_of_other_types_is_torchs_to_the_bit(capability: str) -> None:
    layer, x = nn.Linear(30, 8).double(), torch.randn(5, 30, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(Product.of(layer)(x), layer(x))
    assert not products._by_onednn(layer.weight)


def test_product_of_a_processor_without_avx512_is_torchs_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    layer, x = nn.Sequential(nn.Linear(30, 8), nn.Sigmoid()), torch.randn(5, 30)
    with torch.no_grad():
        assert torch.equal(Product.of(layer)(x), layer[0](x))


def test_products_of_a_decoder_are_its_own(capability: str) -> None:
    torch.manual_seed(1)
    decoder = Decoder(DecoderConfig(50, 24, embedding_size=8, hidden_size=16)).eval()
    found, h, context = DecoderProducts(decoder), torch.randn(9, 16), torch.randn(9, 24)
    with torch.no_grad():
        expected = decoder.state_gates(h, context, decoder.input_weights()[1])
        torch.testing.assert_close(found.token_gates, decoder.token_gates(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.output(h).log_softmax(1), decoder.output(h), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.state_gates(h, context.clone()), expected, atol=1e-5, rtol=1e-5)
