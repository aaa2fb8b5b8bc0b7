"""Unwanted units, found by their descriptions, and the order to remove them in (paper, Section 7)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student

from milan_ray.scoring.bootstrap import Interval
from milan_ray.scoring.differences import wilson
from milan_ray.studies.ablation.curves import RANDOM, Order

TEXT = ("text", "word", "letter")
"""Words in descriptions of units that read text, the paper's."""

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
"""Words in descriptions of units that respond to colours."""

VALIDATION, TEST = "validation", "test"
"""Splits: images like the training images, which choose the units; images on which the effect is measured."""

FOUND, EVERY = "sort-found", "sort-all"
"""Orders: the units found by their descriptions, and as many of all units, the most dispensable first."""

MOST = 50
"""Maximum number of units removed, the reference's."""


def mentioning(descriptions: Sequence[str], words: Sequence[str]) -> np.ndarray:
    """Places of the descriptions that contain one of some words, including as a part of another word."""
    lowered = [text.lower() for text in descriptions]
    return np.array([n for n, text in enumerate(lowered) if any(word.lower() in text for word in words)], np.int64)


def removal_orders(alone: np.ndarray, unwanted: np.ndarray, trials: int = 5, seed: int = 0) -> list[Order]:
    """Orders in which units are removed.

    Args:
        alone: Validation accuracy with each of all U units removed alone; the higher, the less important the unit.
        unwanted: Places of the units found by their descriptions.
        trials: Random orders.
        seed: Seed of the random orders.

    Returns:
        ``sort-found``, ``sort-all`` and random orders, each of as many units as are unwanted. Units of equal accuracy
        stay in the order of the table.
    """
    ranked = np.argsort(-alone, kind="stable")
    random = np.random.default_rng(seed)
    return [
        Order(FOUND, 0, ranked[np.isin(ranked, unwanted)]),
        Order(EVERY, 0, ranked[: len(unwanted)]),
        *(Order(RANDOM, trial, random.permutation(len(alone))[: len(unwanted)]) for trial in range(trials)),
    ]


def stop(validation: Sequence[float]) -> int:
    """Number of units to remove, chosen without test images.

    The paper's rule (Appendix E): the last step at which accuracy on validation images is no lower than with all units.

    Args:
        validation: Accuracy with the first 0, 1, 2, … units of an order removed.
    """
    return max(step for step, accuracy in enumerate(validation) if accuracy >= validation[0])


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean of independent values with its 95 % interval by Student's t; the ends are NaN for a single value."""
    array = np.asarray(values, np.float64)
    mean = float(array.mean())
    if len(array) < 2:
        return Interval(mean, float("nan"), float("nan"))
    half = float(student.ppf(0.975, len(array) - 1) * array.std(ddof=1) / np.sqrt(len(array)))
    return Interval(mean, mean - half, mean + half)


class Retrieval(NamedTuple):
    """How well the units found by words match the units that respond to a concept.

    Attributes:
        found: Number of units found.
        true: Number of units that respond to the concept.
        both: Number of units in both groups.
        units: Number of all units.
    """

    found: int
    true: int
    both: int
    units: int

    @property
    def precision(self) -> Interval:
        """Share of the units found that respond to the concept, with its 95 % interval (Wilson)."""
        return self._share(self.found)

    @property
    def recall(self) -> Interval:
        """Share of the units responding to the concept that were found, with its 95 % interval (Wilson)."""
        return self._share(self.true)

    def _share(self, of: int) -> Interval:
        share, low, high = (float(value[0]) for value in wilson(np.array([self.both]), np.array([max(of, 1)])))
        return Interval(share, low, high)
