"""Dictionaries against their formulas, written out for one position at a time."""

from __future__ import annotations

import math

import pytest
import torch
from pretended import CUDA, PretendedCuda

from milan_ray.models.features.dictionary import DENSE, NORMALISATIONS, SPARSE, Dictionary, Weights

F, C, N = 12, 5, 7


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 17 * len(shape) + sum(shape)))


def weights() -> Weights:
    return Weights(
        random(F, C),
        random(F, C, seed=1),
        random(F),
        random(C),
        random(C, seed=1),
        random(F, seed=2).abs() / 2,
        random(F, seed=3),
        random(F, seed=4),
    )


def dictionary(activation: str = "relu", normalisation: str = "none") -> Dictionary:
    return Dictionary(weights(), activation, 3 if activation in SPARSE else None, normalisation)


def reference(activation: str, normalisation: str, x: list[float]) -> tuple[list[float], list[float]]:
    """Codes and reconstruction of one position, in plain numbers."""
    w = {name: getattr(weights(), name).tolist() for name in Weights.__dataclass_fields__}
    mean = sum(x) / C
    deviation = math.sqrt(sum((v - mean) ** 2 for v in x) / (C - 1))
    norm = math.sqrt(sum(v * v for v in x))
    factor, shift = {
        "none": (1.0, 0.0),
        "constant_norm_rescale": (norm / math.sqrt(C), 0.0),
        "layer_norm": (deviation, mean),
    }[normalisation]
    divisor = factor + (1e-5 if normalisation == "layer_norm" else 0)
    inside = [(v - shift) / divisor - b for v, b in zip(x, w["input_bias"], strict=True)]
    plain = [sum(a * b for a, b in zip(row, inside, strict=True)) for row in w["encoder"]]
    pre = [p + b for p, b in zip(plain, w["encoder_bias"], strict=True)]
    kept = sorted(range(F), key=lambda f: -pre[f])[:3]
    groups = [max(range(g * 4, g * 4 + 4), key=lambda f: pre[f]) for g in range(3)]
    codes = {
        "identity": pre,
        "relu": [max(p, 0) for p in pre],
        "tanh-relu": [math.tanh(max(p, 0)) for p in pre],
        "threshold": [p if p > t else 0 for p, t in zip(pre, w["threshold"], strict=True)],
        "gated": [
            max(math.exp(w["log_gain"][f]) * plain[f] + w["encoder_bias"][f], 0)
            if plain[f] + w["gate_bias"][f] > 0
            else 0
            for f in range(F)
        ],
        "topk": [max(pre[f], 0) if f in kept else 0 for f in range(F)],
        "topk-signed": [pre[f] if f in kept else 0 for f in range(F)],
        "groupmax": [max(pre[f], 0) if f in groups else 0 for f in range(F)],
    }[activation]
    out = [sum(codes[f] * w["decoder"][f][c] for f in range(F)) + w["decoder_bias"][c] for c in range(C)]
    return codes, [v * factor + shift for v in out]


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("activation", (*DENSE, *SPARSE))
def test_codes_and_reconstruction_follow_the_formula(activation, normalisation):
    x, made = 2 * random(N, C, seed=5) + 1, dictionary(activation, normalisation)
    codes, outputs = zip(*(reference(activation, normalisation, row) for row in x.tolist()), strict=True)
    z = made.encode(x)
    assert z.dtype == torch.float32 and 0 < int((z != 0).sum()) <= N * F
    torch.testing.assert_close(z, torch.tensor(codes), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made.decode(z, x), torch.tensor(outputs), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made.reconstruct(x), torch.tensor(outputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", SPARSE)
def test_sparse_codes_are_the_dense_ones_without_their_zeros(activation):
    x, made = random(N, C, seed=5), dictionary(activation)
    values, indices = made.encode_sparse(x)
    assert values.shape == indices.shape == (N, 3) and indices.dtype == torch.int64
    assert all(len(set(row)) == 3 for row in indices.tolist())
    z = torch.zeros(N, F).scatter(1, indices, values)
    assert torch.equal(z, made.encode(x))
    torch.testing.assert_close(made.decode_sparse(values, indices), made.decode(z))
    with pytest.raises(ValueError, match="compares all"):
        made.encode_block(x, 0, 2)


@pytest.mark.parametrize("activation", DENSE)
def test_blocks_of_features_are_parts_of_all_codes(activation):
    x, made = random(N, C, seed=5), dictionary(activation, "layer_norm")
    parts = [made.encode_block(x, start, start + 4) for start in range(0, F, 4)]
    torch.testing.assert_close(torch.cat(parts, 1), made.encode(x))
    with pytest.raises(ValueError, match="no fixed number"):
        made.encode_sparse(x)


def test_directions_are_what_a_code_adds_to_the_output():
    made = dictionary()
    z = torch.zeros(1, F)
    base = made.decode(z)
    z[0, 4] = 2.5
    torch.testing.assert_close(made.decode(z) - base, 2.5 * made.directions[None, 4])


def test_normalised_outputs_need_the_input():
    with pytest.raises(ValueError, match="give x"):
        dictionary(normalisation="layer_norm").decode(torch.zeros(1, F))


def test_zeros_stay_zero_with_constant_norm():
    tied = Dictionary(Weights(weights().encoder, weights().encoder), normalisation="constant_norm_rescale")
    assert torch.equal(tied.reconstruct(torch.zeros(2, C)), torch.zeros(2, C))


@pytest.mark.parametrize("activation", (*DENSE, *SPARSE))
def test_nan_of_the_layer_is_nan_in_the_codes(activation):
    x = random(N, C)
    x[2, 1] = torch.nan
    z = dictionary(activation).encode(x)
    assert bool(z[2].isnan().any()) and not bool(z[[0, 1, 3]].isnan().any())


def test_one_matrix_for_both_is_kept_once():
    matrix = random(F, C)
    tied = Dictionary(Weights(matrix, matrix))
    assert set(tied.state_dict()) == {"encoder"} and torch.equal(tied.directions, matrix)
    assert not list(tied.parameters())
    assert tied.identity() != Dictionary(Weights(matrix, matrix.clone())).identity()


@pytest.mark.parametrize("activation", (*DENSE, *SPARSE))
def test_rectified_codes_are_never_below_zero(activation):
    made = dictionary(activation)
    assert made.rectified == bool((made.encode(3 * random(200, C)) >= 0).all())


def test_half_precision_outputs_are_encoded_in_float32():
    x = random(N, C).half()
    assert torch.equal(dictionary().encode(x), dictionary().encode(x.float()))


def test_identity_tells_what_tensors_do_not():
    kinds = [(a, n) for a in (*DENSE, *SPARSE) for n in NORMALISATIONS]
    identities = {repr(dictionary(*kind).identity()) for kind in kinds}
    identities.add(repr(Dictionary(weights(), "topk", 4).identity()))
    identities.add(repr(Dictionary(weights(), reconstructs=False).identity()))
    assert len(identities) == len(kinds) + 2


@pytest.mark.parametrize("activation", (*DENSE, *SPARSE))
@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_no_step_makes_the_host_wait_for_a_gpu(activation, normalisation):
    made = dictionary(activation, normalisation)
    with PretendedCuda() as cuda:
        made = cuda.network(made)
        x = torch.empty(N, C, device=CUDA)
        z = made.encode(x)
        assert z.shape == (N, F) and z.is_cuda
        assert made.decode(z, x).shape == made.reconstruct(x).shape == (N, C)


@pytest.mark.parametrize(
    ("change", "activation", "k"),
    [
        ({}, "softmax", None),
        ({}, "topk", None),
        ({}, "topk", 0),
        ({}, "topk", F + 1),
        ({}, "relu", 3),
        ({}, "groupmax", 5),
        ({"threshold": None}, "threshold", None),
        ({"log_gain": None}, "gated", None),
        ({"encoder_bias": torch.zeros(C)}, "relu", None),
        ({"decoder": torch.zeros(C, F)}, "relu", None),
    ],
)
def test_what_does_not_fit_together_is_refused(change, activation, k):
    parts = {name: getattr(weights(), name) for name in Weights.__dataclass_fields__}
    with pytest.raises(ValueError):
        Dictionary(Weights(**parts | change), activation, k)
