"""Contrasts: the kernel against an obvious reference, and what must hold of every choice."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from milan_ray.config import ContrastConfig
from milan_ray.exemplars.contrasts import choose, not_exciting, quantiles


def naive(ids, activations, exemplars, similarity, config):
    """The similar contrasts of a unit, by sorting everything at every turn: (image id, exemplar) pairs."""
    values = sorted(value for value in activations.tolist() if np.isfinite(value))
    threshold = values[int(config.quantile * (len(values) - 1))]
    lowest = min([activations[n] for n in range(len(ids)) if exemplars[n]], default=np.inf)
    free = [
        n
        for n in range(len(ids))
        if np.isfinite(activations[n]) and activations[n] <= threshold and activations[n] < lowest and not exemplars[n]
    ]
    k = similarity.shape[1]
    chosen: list[tuple[int, int]] = []
    exemplars_in_turn = min(k, config.similar, len(free))
    while free and len(chosen) < config.similar:
        exemplar = len(chosen) % exemplars_in_turn
        best = min(free, key=lambda n: (-similarity[n, exemplar], ids[n]))
        free.remove(best)
        chosen.append((int(ids[best]), exemplar))
    return chosen


@st.composite
def units(draw):
    """A unit: image ids, activations with ties and gaps, exemplars (the highest), similarities with ties."""
    count, k = draw(st.integers(3, 40)), draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ids = rng.choice(1000, count, replace=False).astype(np.int64)
    activations = rng.integers(0, draw(st.sampled_from([2, 5, 1000])), count).astype(np.float32)
    activations[rng.random(count) < 0.1] = np.nan
    order = np.lexsort((ids, -np.nan_to_num(activations, nan=-np.inf)))
    exemplars = np.isin(np.arange(count), order[:k])
    similarity = rng.integers(0, draw(st.sampled_from([2, 1000])), (count, k)).astype(np.float32)
    config = ContrastConfig(
        draw(st.integers(0, 8)), draw(st.integers(0, 8)), draw(st.sampled_from([0.0, 0.3, 0.5, 1.0]))
    )
    return ids, activations, exemplars, similarity, config


@settings(max_examples=200, deadline=None)
@given(units())
def test_contrasts_of_any_unit_are_those_of_the_reference(unit):
    ids, activations, exemplars, similarity, config = unit
    if not np.isfinite(activations).any():
        return
    eligible = not_exciting(activations, exemplars, config.quantile)
    chosen = choose(ids, similarity, eligible, 3, config)
    similar = chosen.rows[chosen.similar]
    pairs = list(zip(ids[similar].tolist(), chosen.exemplars[chosen.similar].tolist(), strict=True))
    assert pairs == naive(ids, activations, exemplars, similarity, config)


@settings(max_examples=200, deadline=None)
@given(units(), st.integers(0, 2**32 - 1))
def test_contrasts_hold_no_exemplar_no_repetition_and_nothing_above_the_criterion_in_any_order(unit, seed):
    ids, activations, exemplars, similarity, config = unit
    eligible = not_exciting(activations, exemplars, config.quantile)
    chosen = choose(ids, similarity, eligible, 7, config)
    assert len(set(chosen.rows.tolist())) == len(chosen.rows)
    assert not exemplars[chosen.rows].any()
    finite = activations[np.isfinite(activations)]
    if len(finite):
        assert (activations[chosen.rows] <= np.quantile(finite, config.quantile, method="higher")).all()
    top = activations[exemplars & np.isfinite(activations)]
    assert not len(top) or (activations[chosen.rows] < top.min()).all()
    assert len(chosen.rows) == min(config.similar + config.random, int(eligible.sum()))
    order = np.random.default_rng(seed).permutation(len(ids))
    again = choose(ids[order], similarity[order], eligible[order], 7, config)
    assert ids[order][again.rows].tolist() == ids[chosen.rows].tolist()
    assert again.exemplars.tolist() == chosen.exemplars.tolist()


def test_contrasts_of_a_unit_that_saturates_leave_out_what_ties_with_its_exemplars():
    activations = np.array([6, 6, 6, 6, 6, 1], np.float32)
    exemplars = np.array([True, True, False, False, False, False])
    assert np.flatnonzero(not_exciting(activations, exemplars, 0.5)).tolist() == [5]


def test_contrasts_of_a_constant_unit_are_none():
    exemplars = np.array([True, False, False])
    assert not not_exciting(np.zeros(3, np.float32), exemplars, 0.5).any()
    assert not not_exciting(np.full(3, np.nan, np.float32), exemplars, 0.5).any()


def test_random_contrasts_differ_between_units_and_seeds():
    ids, similarity = np.arange(500), np.zeros((500, 2), np.float32)
    eligible = np.ones(500, bool)

    def drawn(unit, seed):
        return choose(ids, similarity, eligible, unit, ContrastConfig(0, 20, seed=seed)).rows.tolist()

    assert drawn(0, 0) == drawn(0, 0)
    assert len({tuple(drawn(unit, seed)) for unit in range(3) for seed in range(3)}) == 9
    means = np.mean([drawn(unit, 0) for unit in range(200)])
    assert means == pytest.approx(249.5, abs=15)  # standard error 2.3


def test_quantiles_are_shares_of_images_with_less_activation():
    activations = np.array([0, 0, 1, 3, np.nan], np.float32)
    assert quantiles(activations, np.array([0, 2, 3])).tolist() == [0, 0.5, 0.75]
