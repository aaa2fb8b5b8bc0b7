"""Which units are removed, in which order, and when to stop."""

from __future__ import annotations

import numpy as np
import pytest

from milan_ray.experiments.analysis import RANDOM
from milan_ray.experiments.editing import EVERY, FOUND, TEXT, mentioning, removal_orders, stop


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
