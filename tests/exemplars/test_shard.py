"""Shards fold into the same answer as one pass, to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from milan_ray.errors import MilanError
from milan_ray.exemplars.shard import LayerState, Plan, fold, to_table

PLAN = Plan(images=200, k=5, quantile=0.99, samples=1500, map_budget=2**20)


def maps_of(ids: np.ndarray) -> torch.Tensor:
    """Maps that depend on the image alone; coarse, so that maxima tie."""
    return (
        torch.stack([torch.randint(-3, 4, (6, 4, 4), generator=torch.Generator().manual_seed(int(i))) for i in ids]) / 2
    )


def run(shards: list[np.ndarray], plan: Plan = PLAN) -> LayerState:
    tables = []
    known = None
    for ids in shards:
        state = LayerState.empty(plan, 6, (4, 4))
        for batch in np.array_split(ids, 2):
            state.update(maps_of(batch), batch, None if known is None else known.bar)
        union = state.topk.without_maps()
        if known is not None:
            union.merge(known)
        tables.append(to_table(state, state.topk.within(union)))
        known = union
    return fold(tables[::-1], plan)


@pytest.mark.parametrize("budget", [2**20, 0])
def test_fold_of_any_shards_equals_one_pass(budget):
    plan = Plan(PLAN.images, PLAN.k, PLAN.quantile, PLAN.samples, budget)
    whole = run([np.arange(200)], plan)
    assert not whole.exact
    for seed in range(4):
        rng = np.random.default_rng(seed)
        shards = np.split(rng.permutation(200), np.sort(rng.choice(np.arange(10, 190), 6, replace=False)))
        parts = run(shards, plan)
        assert torch.equal(parts.topk.ids, whole.topk.ids)
        assert torch.equal(parts.topk.values, whole.topk.values)
        assert torch.equal(parts.level.result(), whole.level.result())
        if budget:
            assert torch.equal(parts.topk.maps, whole.topk.maps)
        else:
            assert parts.topk.maps is None


def test_update_with_nonfinite_maps_leaves_them_out():
    state = LayerState.empty(Plan(3, 2, 0.9, 1000, 2**20), 2, (2, 2))
    maps = torch.arange(24, dtype=torch.float32).reshape(3, 2, 2, 2)
    maps[0, 0] = torch.nan
    maps[1, 0, 1, 1] = torch.inf
    state.update(maps, np.arange(3))
    assert state.topk.ids[0].tolist() == [2, 1]
    assert state.topk.values[0].tolist() == [19.0, 10.0]
    assert state.level.nonfinite.tolist() == [5, 0]


def test_update_with_another_map_size_says_so():
    state = LayerState.empty(PLAN, 6, (4, 4))
    with pytest.raises(MilanError, match="changed from"):
        state.update(torch.zeros(1, 6, 5, 5), np.array([0]))
