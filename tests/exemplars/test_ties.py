"""Units whose exemplars or masks mean nothing: what a layer's exemplars and levels prove."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from milan_ray.exemplars.levels import RunningLevel
from milan_ray.exemplars.ties import Ties, find_ties, ties_of_tables
from milan_ray.exemplars.topk import RunningTopK

NOTHING = -np.inf


def ties(
    topk: Sequence[Sequence[float]], levels: Sequence[float], positions: int = 1000, quantile: float = 0.99
) -> Ties:
    counted = np.full(len(levels), positions)
    return find_ties(np.array(topk, np.float32), np.array(levels, np.float32), counted, quantile)


def test_ties_of_units_without_ties_are_none_and_say_nothing():
    found = ties([[3, 2, 1], [6, 6, 5.9], [2, 2, NOTHING], [0.1, 0, 0], [-1, -2, -3]], [0.5, 5, 1, 0, -1.5])
    assert not found.doubtful.any() and found.in_words() == ""
    assert [found.of_unit(place) for place in range(5)] == [None] * 5


def test_ties_tell_dead_saturated_and_level_apart():
    topk = [[0, 0, 0], [6, 6, 6], [6, 6, 6], [6, 6, 5], [3, 2, 1]]
    found = ties(topk, [0, 6, 4, 6, 1])
    assert found.dead.tolist() == [True, False, False, False, False]
    assert found.tied.tolist() == [True, True, True, False, False]
    assert found.flat.tolist() == [True, True, False, True, False]
    assert found.in_words() == (
        "has 4 of 5 units whose exemplars or masks mean nothing: 1 never active (no activation is above 0); 2 with "
        "their highest activation on 3 images or more, of which the first are shown; 2 without an activation above "
        "their level, so that masks show nothing; dissect another layer, or the module in front of its activation "
        "function with --activations pre, or take more images"
    )
    assert found.of_unit(0) is not None and found.of_unit(4) is None
    tie = "3 images or more have the highest activation, and these are the first"
    assert found.of_unit(2) == ("exemplars tie", tie)
    assert found.of_unit(1) == ("exemplars tie", f"{tie}; no activation is above the level, so masks show nothing")
    assert found.of_unit(3) == ("masks show nothing", "no activation is above the level, so masks show nothing")


def test_ties_of_dead_units_alone_advise_no_other_activations():
    assert ties([[0.0, 0.0], [2, 1]], [0, 1]).in_words().endswith("; dissect another layer, or take more images")


def test_ties_need_more_than_one_exemplar_and_a_finite_activation():
    assert not ties([[5.0], [7.0]], [1, 2]).doubtful.any()
    assert not ties([[NOTHING, NOTHING], [np.nan, np.nan]], [np.nan, np.nan]).doubtful.any()


@pytest.mark.parametrize(("positions", "few"), [(1, True), (50, True), (51, False)])
def test_level_that_few_positions_make_the_highest_is_no_saturation(positions: int, few: bool):
    found = ties([[3.0, 2, 1]], [3], positions)
    assert found.flat.all() and found.few.tolist() == [few]
    assert ("too few activations" in found.in_words()) == few == ("lower the quantile" in found.in_words())
    assert ("dissect another layer" in found.in_words()) != few


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([0.0, 1.0, 2.5, 6.0]), min_size=1, max_size=80), st.integers(1, 4), st.booleans())
def test_ties_are_what_counting_all_activations_finds(values: list[float], k: int, split: bool):
    array = np.array(values, np.float32)
    topk, level = RunningTopK.empty(1, k), RunningLevel.empty(1, 0.9, len(array))
    for part in np.array_split(np.arange(len(array)), 2 if split and len(array) > 1 else 1):
        topk.update(torch.from_numpy(array[part])[:, None], torch.from_numpy(part))
        level.update(torch.from_numpy(array[part])[None, None])
    found = find_ties(topk.values.numpy(), level.result().numpy(), level.counted.numpy(), 0.9)
    reached = int((array == array.max()).sum())
    threshold = np.quantile(array.astype(np.float64), 0.9, method="hazen")
    assert found.tied.tolist() == [k > 1 and reached >= k]
    assert found.flat.tolist() == [not (array > threshold).any()]
    assert found.few.tolist() == [len(array) <= 5]
    if found.dead.any():
        assert not (array > 0).any()


def test_ties_of_tables_are_those_of_the_states_and_published_sets_have_none():
    exemplars = pa.table(
        {"unit": [7, 2, 2, 7], "rank": [1, 0, 1, 0], "activation": pa.array([6, 4, 3, 6], pa.float32())}
    )
    levels = pa.table({"unit": [2, 5, 7], "level": [1.0, np.nan, 6.0], "positions": [1000, 0, 1000]})
    found = ties_of_tables(exemplars, levels, {"k": "2", "quantile": "0.99"})
    assert found.tied.tolist() == found.flat.tolist() == [False, False, True] and found.k == 2
    assert not ties_of_tables(exemplars, levels, {"k": "3", "quantile": "0.99"}).tied.any()
    unknown = exemplars.set_column(2, "activation", pa.array([np.nan] * 4, pa.float32()))
    assert not ties_of_tables(unknown, levels.slice(0, 0), {"k": "2"}).doubtful.any()
    assert len(ties_of_tables(exemplars.slice(0, 0), levels.slice(0, 0), {}).tied) == 0
