"""Shards fold into the same answer as one pass, to the bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from milan_ray.errors import MilanError
from milan_ray.exemplars.shard import Committed, LayerState, LayerStates, StateConfig, fold, to_table

PLAN = StateConfig(images=200, k=5, quantile=0.99, samples=1500, map_budget=2**20)


def shown(state: LayerState) -> torch.Tensor:
    """The maps of the images that there are."""
    maps = state.topk.maps
    assert maps is not None
    return maps.masked_fill((state.topk.ids < 0)[:, :, None, None], 0)


def maps_of(ids: np.ndarray) -> torch.Tensor:
    """Maps that depend on the image alone; coarse, so that maxima tie."""
    return (
        torch.stack([torch.randint(-3, 4, (6, 4, 4), generator=torch.Generator().manual_seed(int(i))) for i in ids]) / 2
    )


def run(shards: list[np.ndarray], plan: StateConfig = PLAN) -> LayerState:
    tables = []
    known = Committed(LayerState.empty(plan, 6, (4, 4)))
    for shard, ids in enumerate(shards):
        state = LayerState.empty(plan, 6, (4, 4))
        for batch in np.array_split(ids, 2):
            state.update(maps_of(batch), batch, known)
        tables.append(to_table(state, known.delta(state)))
        known.commit(shard, state)
    return fold(tables[::-1], plan)


@pytest.mark.parametrize("budget", [2**20, 0])
def test_fold_of_any_shards_equals_one_pass(budget):
    plan = StateConfig(PLAN.images, PLAN.k, PLAN.quantile, PLAN.samples, budget)
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
            assert torch.equal(shown(parts), shown(whole))
        else:
            assert parts.topk.maps is None


def test_update_with_nonfinite_maps_leaves_them_out():
    state = LayerState.empty(StateConfig(3, 2, 0.9, 1000, 2**20), 2, (2, 2))
    maps = torch.arange(24, dtype=torch.float32).reshape(3, 2, 2, 2)
    maps[0, 0] = torch.nan
    maps[1, 0, 1, 1] = torch.inf
    state.update(maps, np.arange(3))
    assert state.topk.ids[0].tolist() == [2, 1]
    assert state.topk.values[0].tolist() == [19.0, 10.0]
    assert state.level.nonfinite.tolist() == [5, 0]


@pytest.mark.parametrize(("samples", "positions"), [(10**9, 200 * 21), (4 * 200, 200 * 4)])
def test_committed_bytes_are_those_of_the_activations_that_decide_levels(samples, positions):
    plan = replace(PLAN, samples=samples, quantile=0.75)
    assert plan.committed_bytes(6, (3, 7)) == plan.committed_bytes(6, (7, 3)) == 4 * 6 * (positions // 4 + 2)


def test_update_with_another_map_size_says_so():
    state = LayerState.empty(PLAN, 6, (4, 4))
    with pytest.raises(MilanError, match="changed from"):
        state.update(torch.zeros(1, 6, 5, 5), np.array([0]))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**20), st.randoms(use_true_random=False))
def test_fold_of_retried_shards_of_several_actors_equals_one_pass(seed, random):
    """Shards are run again by actors that know others' bounds, the last file counts, and no tie is lost in a circle."""
    plan = StateConfig(60, 3, 0.8, 10**6, random.choice([0, 2**20]))
    rectified = random.choice([False, True])

    def empty() -> LayerState:
        return LayerState.empty(plan, 6, (4, 4), rectified=rectified)

    def found(ids: np.ndarray) -> torch.Tensor:
        return maps_of(ids).relu() if rectified else maps_of(ids)

    shards = np.array_split(np.random.default_rng(seed).permutation(60), 5)
    actors = [Committed(empty()) for _ in range(3)]
    files = {}
    runs = [*range(5), *random.choices(range(5), k=6)]
    random.shuffle(runs)
    for shard in runs:
        number = random.randrange(3)
        state = empty()
        for batch in np.array_split(shards[shard], random.randint(1, 4)):
            state.update(found(batch), batch, actors[number])
        fate = random.random()
        if fate < 0.9 or shard not in files:  # else killed before its file was there
            files[shard] = to_table(state, actors[number].delta(state))
            actors[number].commit(shard, state)
        if fate < 0.1:  # killed after, and started anew
            actors[number] = Committed(empty())
    parts = fold([files[shard] for shard in sorted(files, key=lambda _: random.random())], plan)
    whole = empty()
    whole.update(found(np.arange(60)), np.arange(60))
    assert torch.equal(parts.topk.ids, whole.topk.ids)
    assert torch.equal(parts.topk.values, whole.topk.values)
    assert torch.equal(parts.level.result(), whole.level.result())
    if whole.topk.carries_maps:
        assert torch.equal(shown(parts), shown(whole))


def test_update_reads_units_last_memory_as_it_lies():
    images = np.arange(100)
    for plan in (PLAN, replace(PLAN, samples=10**6)):
        rows, columns = LayerState.empty(plan, 6, (4, 4)), LayerState.empty(plan, 6, (4, 4))
        rows.update(maps_of(images), images)
        columns.update(maps_of(images).contiguous(memory_format=torch.channels_last), images)
        assert torch.equal(shown(rows), shown(columns))
        assert torch.equal(rows.level.result(), columns.level.result())


def test_bytes_of_a_shard_fall_as_the_bars_rise():
    plan = StateConfig(2000, 5, 0.99, 10**6, 0)
    known = Committed(LayerState.empty(plan, 6, (4, 4)))
    sizes = []
    for shard in range(20):
        ids = np.arange(100) + 100 * shard
        state = LayerState.empty(plan, 6, (4, 4))
        generator = torch.Generator().manual_seed(shard)
        state.update(torch.randn(100, 6, 4, 4, generator=generator), ids, known)
        sizes.append(to_table(state, known.delta(state)).nbytes)
        known.commit(shard, state)
    assert sizes[-1] < 0.4 * sizes[0]
    assert sorted(sizes, reverse=True)[:3] == sizes[:3]


def test_layer_states_of_several_threads_are_those_of_one():
    random = np.random.default_rng(0)
    shapes = {"wide": (6, 9, 9), "deep": (40, 2, 2), "flat": (5, 1, 1)}
    batches = [
        {layer: torch.from_numpy(random.standard_normal((7, *shape), np.float32)) for layer, shape in shapes.items()}
        for _ in range(4)
    ]
    plan = StateConfig(28, 3, 0.9, 1000, 2**20)
    found, known = [], []
    for threads in (1, 3):
        layers = LayerStates(plan, threads)
        mine: dict[str, Committed] = {}
        for number, batch in enumerate(batches):
            layers.update(batch, np.arange(7) + 7 * number, mine)
        found.append(layers.states)
        known.append(mine)
    assert [set(states) for states in found] == [set(mine) for mine in known] == [set(shapes)] * 2
    for layer in shapes:
        one, other = (states[layer] for states in found)
        assert to_table(one, one.topk).equals(to_table(other, other.topk))


@pytest.mark.parametrize("threads", [1, 2])
def test_layer_states_name_the_layer_whose_shape_changes(threads):
    layers = LayerStates(PLAN, threads)
    layers.update({"a": torch.ones(2, 3, 4, 4), "b": torch.ones(2, 3, 4, 4)}, np.arange(2))
    with pytest.raises(MilanError, match=r"^layer 'b': its output changed"):
        layers.update({"a": torch.ones(2, 3, 4, 4), "b": torch.ones(2, 3, 5, 5)}, np.arange(2, 4))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**20), st.sampled_from([0.5, 0.9, 0.99]), st.integers(1, 4))
def test_rectified_maps_have_the_levels_of_any_maps_and_no_exemplars_at_zero(seed, quantile, parts):
    generator = torch.Generator().manual_seed(seed)
    bias = torch.tensor([0.5, 0, -1, -2.5, -9])[None, :, None, None]  # seldom, hardly ever and never above zero
    maps = (torch.randn(40, 5, 2, 3, generator=generator) + bias).relu()
    plan = StateConfig(40, 6, quantile, 10**6, 2**20)
    plain, rectified = (LayerState.empty(plan, 5, (2, 3), rectified=each) for each in (False, True))
    for ids in np.array_split(np.arange(40), parts):
        for state in (plain, rectified):
            state.update(maps[ids], ids)
    assert torch.equal(plain.level.result(), rectified.level.result())
    assert torch.equal(plain.level.counted, rectified.level.counted)
    fires = plain.topk.values > 0
    assert torch.equal(rectified.topk.ids, plain.topk.ids.masked_fill(~fires, -1))
    values, lengths = rectified.level.sorted_values()
    assert (values > 0).all()
    assert (lengths == np.minimum(rectified.level.capacity, (maps > 0).sum(dim=(0, 2, 3)).numpy())).all()
