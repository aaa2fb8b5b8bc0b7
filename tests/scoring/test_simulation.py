"""Scores of descriptions against loops and scikit-like definitions, in any split and order."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from milan_ray.scoring.simulation import Moments, Sigmoid, average_precision, held_out, highest, retrieval


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_correlation_is_the_same_for_any_split_order_and_repetition(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    blocks = data.draw(st.integers(1, 7))
    offset = data.draw(st.sampled_from([0.0, -3.0, 1e3]))
    parts = [
        (rng.normal(offset, 1, (size := int(rng.integers(1, 9)), 3)), rng.random((size, 3))) for _ in range(blocks)
    ]
    for x, _ in parts:
        x[rng.random(x.shape) < 0.1] = np.nan
    use = [rng.random(x.shape) < 0.8 for x, _ in parts]
    once = Moments()
    for block, (x, y) in enumerate(parts):
        once.update(block, x, y, use[block])
    order = [*range(blocks), *data.draw(st.lists(st.integers(0, blocks - 1)))]
    random.Random(data.draw(st.integers(0, 99))).shuffle(order)
    states = [Moments() for _ in range(data.draw(st.integers(1, 3)))]
    for place, block in enumerate(order):
        x, y = parts[block]
        states[place % len(states)].update(block, x, y, use[block])
    merged = Moments()
    for state in reversed(states):
        merged.merge(state)
    np.testing.assert_array_equal(merged.sums(), once.sums())
    found = merged.result()
    x, y, kept = (np.concatenate(arrays) for arrays in (*zip(*parts, strict=True), use))
    for column in range(3):
        there = kept[:, column] & np.isfinite(x[:, column])
        own, other = x[there, column], y[there, column]
        if len(own) < 3:
            assert abs(found[column]) <= 1 + 1e-6
        else:
            assert found[column] == pytest.approx(np.corrcoef(own, other)[0, 1], abs=1e-6)


def test_a_column_that_never_changes_correlates_with_nothing():
    state = Moments()
    x = np.stack([np.full(20, 1e4 / 3), np.arange(20.0), np.zeros(20)], axis=1)
    state.update(0, x, np.stack([np.arange(20.0), np.full(20, 0.1), np.arange(20.0)], axis=1))
    assert state.result().tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="nothing was added"):
        Moments().result()


def test_average_precision_steps_over_equal_scores_at_once():
    scores = np.array([0.9, 0.8, 0.8, 0.8, 0.1, 0.1])
    positive = np.array([1, 0, 1, 0, 1, 0], bool)
    # Thresholds .9: recall 1/3, precision 1; .8: recall 2/3, precision 2/4; .1: recall 1, precision 3/6.
    assert average_precision(scores, positive) == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert average_precision(np.zeros(8), np.arange(8) < 2) == pytest.approx(0.25)
    assert np.isnan(average_precision(scores, np.zeros(6, bool)))


def test_average_precision_equals_loops_without_ties():
    rng = np.random.default_rng(1)
    scores, positive = rng.normal(size=200), rng.random(200) < 0.1
    order = np.argsort(-scores)
    expected = np.mean([positive[order[: rank + 1]].mean() for rank in range(200) if positive[order[rank]]])
    assert average_precision(scores, positive) == pytest.approx(expected)


def test_retrieval_equals_all_pairs():
    rng = np.random.default_rng(2)
    activations = rng.integers(0, 9, 120).astype(np.float32)
    chosen = rng.random(120) < 0.2
    auc, mad = retrieval(activations, chosen)
    own, other = activations[chosen], activations[~chosen]
    pairs = (own[:, None] > other).mean() + 0.5 * (own[:, None] == other).mean()
    assert auc == pytest.approx(pairs) and mad == pytest.approx((own.mean() - other.mean()) / other.std())
    assert np.isnan(retrieval(activations, np.ones(120, bool))[0])
    assert retrieval(np.ones(120), chosen) == (0.5, 0.0)


def test_held_out_images_are_a_fixed_share_that_grows():
    ids = np.arange(20_000)
    few, more = held_out(ids, 0.2), held_out(ids, 0.5)
    assert few.mean() == pytest.approx(0.2, abs=0.01) and not (few & ~more).any()
    np.testing.assert_array_equal(held_out(ids[7:9], 0.5), more[7:9])
    assert held_out(ids, 1.0).all() and not held_out(ids, 0.0).any()
    assert few[:100].sum() > 5 and few[::2].mean() == pytest.approx(0.2, abs=0.02)


def test_sigmoid_and_highest():
    curve = Sigmoid(60, -0.1)
    assert curve(np.array([0.1])) == pytest.approx(0.5) and curve(np.array([0.3])) > 0.99
    assert highest(np.array([1, 3, 3, 2]), 2).tolist() == [False, True, True, False]
    assert highest(np.array([3, 3, 3]), 1).tolist() == [True, False, False]
