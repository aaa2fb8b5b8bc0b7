"""Units that should not be there, found by their descriptions, and the order to remove them in (paper, Section 7)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from milan_ray.scoring.bootstrap import Interval
from milan_ray.scoring.differences import wilson
from milan_ray.studies.analysis.statistics import RANDOM, Order

TEXT = ("text", "word", "letter")
"""What descriptions of units that read text contain, the paper's."""

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
"""What descriptions of units that see colours contain."""

VALIDATION, TEST = "validation", "test"
"""Splits: images like those of training, which choose; images that the network must not fail on, which judge."""

FOUND, EVERY = "sort-found", "sort-all"
"""Orders: the units found by their descriptions, and as many of all, the most dispensable first."""

MOST = 50
"""Units removed at most, the reference's."""


def mentioning(descriptions: Sequence[str], words: Sequence[str]) -> np.ndarray:
    """Places of the descriptions that contain one of some words, also within other words."""
    lowered = [text.lower() for text in descriptions]
    return np.array([n for n, text in enumerate(lowered) if any(word.lower() in text for word in words)], np.int64)


def removal_orders(alone: np.ndarray, found: np.ndarray, trials: int = 5, seed: int = 0) -> list[Order]:
    """Orders in which units are removed.

    Args:
        alone: Validation accuracy with each of all U units removed alone: the higher, the less it is missed.
        found: Places of the units found by their descriptions.
        trials: Random orders.
        seed: Of the random orders.

    Returns:
        ``sort-found``, ``sort-all`` and random orders, each of as many units as were found. Units that are missed alike
        stay in the table's order.
    """
    ranked = np.argsort(-alone, kind="stable")
    random = np.random.default_rng(seed)
    return [
        Order(FOUND, 0, ranked[np.isin(ranked, found)]),
        Order(EVERY, 0, ranked[: len(found)]),
        *(Order(RANDOM, trial, random.permutation(len(alone))[: len(found)]) for trial in range(trials)),
    ]


def stop(validation: Sequence[float]) -> int:
    """How many units to remove where no test images tell: the most before validation accuracy falls for good.

    The paper's rule (Appendix E): the last step at which accuracy on validation images, which are like the training
    images, is no lower than with all units.

    Args:
        validation: Accuracy with the first 0, 1, 2, … units of an order removed.
    """
    return max(step for step, accuracy in enumerate(validation) if accuracy >= validation[0])


def mean_interval(values: Sequence[float]) -> Interval:
    """The mean of independent values, such as of networks, with its 95 % interval by Student's t; NaN ends of one."""
    array = np.asarray(values, np.float64)
    mean = float(array.mean())
    if len(array) < 2:
        return Interval(mean, float("nan"), float("nan"))
    half = float(student.ppf(0.975, len(array) - 1) * array.std(ddof=1) / np.sqrt(len(array)))
    return Interval(mean, mean - half, mean + half)


@dataclass(frozen=True)
class Retrieval:
    """How well units found by words are those that fire at a concept.

    Attributes:
        found: Units found.
        true: Units that fire at the concept.
        both: Units that are both.
        units: All units.
    """

    found: int
    true: int
    both: int
    units: int

    @property
    def precision(self) -> Interval:
        """Share of the units found that fire at the concept, with its 95 % interval (Wilson)."""
        return self._share(self.found)

    @property
    def recall(self) -> Interval:
        """Share of the units that fire at the concept that were found, with its 95 % interval (Wilson)."""
        return self._share(self.true)

    def _share(self, of: int) -> Interval:
        share, low, high = (float(value[0]) for value in wilson(np.array([self.both]), np.array([max(of, 1)])))
        return Interval(share, low, high)

    def __add__(self, other: Retrieval) -> Retrieval:
        return Retrieval(
            self.found + other.found, self.true + other.true, self.both + other.both, self.units + other.units
        )
