"""Maps of features: sparse ones tell the states what dense ones tell, and codes do not depend on the batch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from milan_ray.errors import MilanError
from milan_ray.exemplars import feature_maps
from milan_ray.exemplars.feature_maps import FeatureMaps
from milan_ray.exemplars.pooled import maxima, means
from milan_ray.exemplars.shard import LayerState, StateConfig
from milan_ray.exemplars.sparse_maps import SparseMaps
from milan_ray.models.features.dictionary import Dictionary, Weights
from milan_ray.models.features.given import feature_set

CPU = torch.device("cpu")


def topk(count: int, width: int, k: int, seed: int = 0) -> Dictionary:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(count, width, generator=generator)
    return Dictionary(Weights(matrix, matrix, torch.randn(count, generator=generator)), "topk", k)


def maps_of(dictionary: Dictionary, maps: torch.Tensor, batch: int) -> list[tuple[slice, torch.Tensor | SparseMaps]]:
    return list(FeatureMaps(feature_set("layer#set", dictionary), CPU).pieces(maps, batch))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**20), st.integers(1, 4), st.sampled_from([0, 2**20]), st.sampled_from([7, 10**6]), st.booleans()
)
def test_states_of_sparse_maps_are_those_of_dense_ones(seed, k, budget, samples, broken):
    maps = torch.randn(13, 5, 3, 2, generator=torch.Generator().manual_seed(seed))
    if broken:
        maps[4, 2, 1, 1] = torch.nan
    plan = StateConfig(13, 3, 0.8, samples, budget)
    sparse, dense = (LayerState.empty(plan, 11, (3, 2), rectified=True) for _ in range(2))
    for start in range(0, 13, 5):
        ids = np.arange(start, min(start + 5, 13))
        for rows, found in maps_of(topk(11, 5, k, seed), maps[ids], 5):
            assert isinstance(found, SparseMaps) and tuple(found.shape) == (len(ids), 11, 3, 2)
            torch.testing.assert_close(maxima(found), maxima(found.dense()))
            torch.testing.assert_close(means(found), means(found.dense()))
            sparse.update(found, ids[rows])
            dense.update(found.dense(), ids[rows])
    assert torch.equal(sparse.topk.ids, dense.topk.ids) and torch.equal(sparse.topk.values, dense.topk.values)
    assert torch.equal(sparse.level.result(), dense.level.result())
    assert torch.equal(sparse.level.counted, dense.level.counted)
    assert torch.equal(sparse.level.nonfinite, dense.level.nonfinite)
    if samples > 7:  # every position counts
        assert bool(dense.level.nonfinite.any()) == broken
    if budget:
        there = sparse.topk.ids >= 0
        one, other = sparse.topk.maps, dense.topk.maps
        assert (
            one is not None and other is not None and torch.equal(one[there].nan_to_num(9), other[there].nan_to_num(9))
        )


@pytest.mark.parametrize("activation", ["relu", "topk"])
@pytest.mark.parametrize("limit", [2**10, 2**26])
def test_codes_of_an_image_do_not_depend_on_its_batch(activation, limit, monkeypatch):
    monkeypatch.setattr(feature_maps, "PIECE_BYTES", limit)
    given_ = topk(70, 33, 3)
    if activation == "relu":
        given_ = Dictionary(Weights(given_.encoder, given_.encoder), "relu")
    maps = torch.randn(16, 33, 3, 2, generator=torch.Generator().manual_seed(1))

    def dense(some: torch.Tensor) -> torch.Tensor:
        pieces = [found for _, found in maps_of(given_, some, 16)]
        return torch.cat([found.dense() if isinstance(found, SparseMaps) else found for found in pieces])

    whole = dense(maps)
    assert torch.equal(dense(maps[5:6]), whole[5:6]) and torch.equal(dense(maps[3:12]), whole[3:12])
    naive = given_.encode(maps.permute(0, 2, 3, 1).flatten(0, 2)).unflatten(0, (16, 3, 2)).permute(0, 3, 1, 2)
    torch.testing.assert_close(whole, naive)


def test_more_features_than_a_step_may_take_are_refused_in_one_sentence(monkeypatch):
    monkeypatch.setattr(feature_maps, "MOST_BYTES", 2**10)
    wide = replace(feature_set("layer#set", torch.eye(4)), count=50)
    with pytest.raises(MilanError, match=r"50 features at 6 positions take .* for one image"):
        next(FeatureMaps(wide, CPU).pieces(torch.zeros(1, 4, 3, 2), 1))
