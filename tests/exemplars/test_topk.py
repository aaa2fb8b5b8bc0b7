"""The running top-k: exact, and indifferent to split, order and repetition."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from milan_ray.exemplars.topk import NO_IMAGE, RunningTopK


def naive(values: dict[int, float], k: int) -> list[tuple[int, float]]:
    """The definition: activation descending, then id ascending, over distinct ids."""
    ranked = sorted(((v, i) for i, v in values.items() if v > -np.inf), key=lambda pair: (-pair[0], pair[1]))
    return [(i, v) for v, i in ranked[:k]]


def listed(state: RunningTopK, unit: int) -> list[tuple[int, float]]:
    pairs = zip(state.ids[unit].tolist(), state.values[unit].tolist(), strict=True)
    return [(i, v) for i, v in pairs if i != NO_IMAGE]


# Few distinct values, so that ties are everywhere.
activations = st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0, -np.inf]), min_size=1, max_size=30)


@settings(max_examples=150, deadline=None)
@given(activations, st.integers(1, 6), st.randoms(use_true_random=False))
def test_topk_any_split_order_and_repetition_equals_definition(values, k, random):
    expected = naive(dict(enumerate(values)), k)
    ids = list(range(len(values)))
    random.shuffle(ids)
    total = RunningTopK.empty(1, k)
    while ids:
        size = random.randint(1, len(ids))
        part, ids = ids[:size], ids[size:]
        shard = RunningTopK.empty(1, k, (1, 1))
        batch = torch.tensor([[values[i]] for i in part])
        maps = torch.tensor(part, dtype=torch.float32)[:, None, None, None]
        shard.update(batch, torch.tensor(part), maps)
        kept = shard.ids[0] != NO_IMAGE
        assert shard.maps is not None
        assert shard.maps[0, kept, 0, 0].tolist() == shard.ids[0, kept].tolist()  # maps follow their images
        shard.maps = None
        for _ in range(random.randint(1, 2)):  # a retried shard arrives twice
            total.merge(shard)
    assert listed(total, 0) == expected


@settings(max_examples=100, deadline=None)
@given(activations, st.integers(1, 5), st.randoms(use_true_random=False))
def test_topk_emission_of_retried_and_reordered_shards_keeps_every_winner(values, k, random):
    """What an actor emits, the shard within topk(state ∪ shard), always contains the winners."""
    shards = [list(range(len(values)))[i::3] for i in range(3)]
    order = [0, 1, 2, *random.choices(range(3), k=2)]
    random.shuffle(order)
    actor = RunningTopK.empty(1, k)
    emitted = {}
    for index in order:
        ids = torch.tensor(shards[index], dtype=torch.int64)
        shard = RunningTopK.empty(1, k)
        shard.update(
            torch.tensor([[values[i]] for i in shards[index]]).reshape(-1, 1), ids, lower_bound=actor.lower_bound
        )
        if len(order) < 10 and random.random() < 0.3:
            order.append(index)  # given up before it was committed, and tried again: it must not have raised the bound
            continue
        union = actor.without_maps()
        union.merge(shard)
        emitted[index] = shard.within(union)  # a retry overwrites what it wrote before
        actor = union
    total = RunningTopK.empty(1, k)
    for part in emitted.values():
        total.merge(part)
    assert listed(total, 0) == naive(dict(enumerate(values)), k)


def test_topk_same_id_with_two_values_keeps_the_larger():
    state = RunningTopK.empty(1, 2)
    state.update(torch.tensor([[1.0], [3.0]]), torch.tensor([7, 8]))
    state.update(torch.tensor([[2.0]]), torch.tensor([7]))
    assert listed(state, 0) == [(8, 3.0), (7, 2.0)]


def test_topk_fewer_images_than_k_leaves_blanks():
    state = RunningTopK.empty(2, 4)
    state.update(torch.tensor([[1.0, -torch.inf]]), torch.tensor([5]))
    assert listed(state, 0) == [(5, 1.0)]
    assert listed(state, 1) == []
