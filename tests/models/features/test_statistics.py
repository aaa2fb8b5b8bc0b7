from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pretended import CUDA, PretendedCuda

from milan_ray.models.features.dictionary import Dictionary, Weights
from milan_ray.models.features.statistics import FeatureStatistics, explained_variance

F, C = 6, 3


def topk(k: int = 2, count: int = F) -> Dictionary:
    draw = torch.Generator().manual_seed(3)
    matrix = torch.randn(count, C, generator=draw)
    return Dictionary(
        Weights(matrix, torch.randn(count, C, generator=draw), torch.randn(count, generator=draw)), "topk", k
    )


def counted(made: Dictionary, x: torch.Tensor, sparse: bool) -> FeatureStatistics:
    statistics = FeatureStatistics(made.count, C)
    if sparse:
        statistics.add_sparse(*made.encode_sparse(x))
    else:
        statistics.add(made.encode(x))
    statistics.add_reconstruction(x, made.reconstruct(x))
    return statistics


def test_figures_follow_their_definitions():
    made, x = topk(), torch.randn(50, C, generator=torch.Generator().manual_seed(0))
    statistics, z, back = counted(made, x, True), made.encode(x), made.reconstruct(x)
    assert statistics.positions == 50
    assert statistics.l0 == pytest.approx(sum(sum(value != 0 for value in row) for row in z.tolist()) / 50)
    assert statistics.dead_share == sum(not any(column) for column in z.T.tolist()) / F
    error = sum((a - b) ** 2 for a, b in zip(x.flatten().tolist(), back.flatten().tolist(), strict=True))
    total = sum((a - b) ** 2 for row in x.tolist() for a, b in zip(row, x.mean(0).tolist(), strict=True))
    assert statistics.explained_variance == pytest.approx(1 - error / total)
    assert explained_variance(made, x) == statistics.explained_variance


@settings(deadline=None, max_examples=50)
@given(
    rows=st.integers(1, 40),
    cuts=st.lists(st.integers(0, 40), max_size=4),
    sparse=st.lists(st.booleans(), min_size=5, max_size=5),
    order=st.randoms(use_true_random=False),
)
def test_any_split_order_and_form_gives_the_same(rows, cuts, sparse, order):
    made, x = topk(), torch.randn(rows, C, generator=torch.Generator().manual_seed(rows)) * 3 + 100
    bounds = [0, *sorted(cut for cut in cuts if cut <= rows), rows]
    parts = [
        counted(made, x[start:stop], is_sparse)
        for start, stop, is_sparse in zip(bounds, bounds[1:], sparse, strict=False)
    ]
    order.shuffle(parts)
    merged = FeatureStatistics(F, C)
    for part in parts:
        merged.merge(FeatureStatistics.of_state(part.state()))
    whole = counted(made, x, False)
    assert (merged.positions, merged.fired.tolist()) == (whole.positions, whole.fired.tolist())
    assert (merged.l0, merged.dead_share) == (whole.l0, whole.dead_share)
    assert merged.explained_variance == pytest.approx(whole.explained_variance, rel=1e-6, nan_ok=True)


def test_a_wrong_dictionary_explains_less_than_nothing_and_an_exact_one_all():
    x = torch.randn(9, C, generator=torch.Generator().manual_seed(0)) + 7
    both = torch.cat([torch.eye(C), -torch.eye(C)])
    assert explained_variance(Dictionary(Weights(both, both)), x) == pytest.approx(1)
    assert explained_variance(Dictionary(Weights(both, -both)), x) < 0
    mean = Dictionary(Weights(both, both * 0, decoder_bias=x.mean(0)))
    assert explained_variance(mean, x) == pytest.approx(0, abs=1e-6)


def test_figures_without_content_are_nan():
    empty = FeatureStatistics(F, C)
    assert math.isnan(empty.l0) and math.isnan(empty.dead_share) and math.isnan(empty.explained_variance)
    assert math.isnan(explained_variance(topk(), torch.full((5, C), 0.1)))
    with pytest.raises(ValueError, match="different"):
        empty.merge(FeatureStatistics(F + 1, C))


def test_adding_makes_no_host_wait():
    made = topk()
    with PretendedCuda() as cuda:
        made = cuda.network(made)
        statistics, x = FeatureStatistics(F, C, CUDA), torch.empty(4, C, device=CUDA)
        statistics.add(made.encode(x))
        statistics.add_sparse(*made.encode_sparse(x))
        statistics.add_reconstruction(x, made.reconstruct(x))
        assert statistics.positions == 8
