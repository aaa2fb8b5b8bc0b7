"""Which units are removed, in which order, and when to stop."""

from __future__ import annotations

import numpy as np
import pytest

from milan_ray.studies.ablation.curves import RANDOM
from milan_ray.studies.editing.statistics import (
    EVERY,
    FOUND,
    TEXT,
    Retrieval,
    mean_interval,
    mentioning,
    removal_orders,
    stop,
)


def test_words_are_found_within_words_too():
    said = ["Words on signs", "dog faces", "the letters", "textured walls", "TEXT"]
    assert mentioning(said, TEXT).tolist() == [0, 2, 3, 4]  # as in the reference, "textured" too
    assert mentioning(said, ["Dog"]).tolist() == [1]
    assert mentioning([], TEXT).tolist() == []


def test_units_that_are_missed_least_go_first():
    alone = np.array([0.8, 0.9, 0.7, 0.9, 0.95])
    found, every, *random = removal_orders(alone, np.array([0, 2, 3]), trials=2, seed=3)
    assert (found.criterion, found.units.tolist()) == (FOUND, [3, 0, 2])
    assert (every.criterion, every.units.tolist()) == (EVERY, [4, 1, 3])
    assert [order.criterion for order in random] == [RANDOM, RANDOM]
    assert all(len(set(order.units.tolist())) == 3 for order in random)
    assert random[0].units.tolist() == removal_orders(alone, np.array([0, 2, 3]), 1, 3)[2].units.tolist()


@pytest.mark.parametrize(
    ("validation", "count"),
    [([0.8], 0), ([0.8, 0.7], 0), ([0.8, 0.9, 0.7, 0.8, 0.7], 3), ([0.8, 0.8, 0.8], 2), ([0.8, 0.7, 0.7], 0)],
)
def test_the_last_step_that_keeps_validation_accuracy(validation, count):
    assert stop(validation) == count


def test_the_interval_of_a_mean_is_students():
    found = mean_interval([1.0, 2.0, 3.0])
    assert found.value == 2.0
    assert found.high - 2 == pytest.approx(4.302653 / 3**0.5)  # t of .975 and two degrees of freedom
    assert 2 - found.low == pytest.approx(found.high - 2)
    assert mean_interval([5.0]).value == 5.0 and np.isnan(mean_interval([5.0]).low)


def test_retrieval_has_shares():
    found = Retrieval(found=4, true=8, both=3, units=40)
    assert (found.precision.value, found.recall.value) == (0.75, 0.375)
    assert 0.2 < found.precision.low < 0.75 < found.precision.high < 1
    assert Retrieval(0, 2, 0, 9).precision.value == 0
