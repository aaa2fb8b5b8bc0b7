"""Exact tests of paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def signed_rank(differences: Sequence[float]) -> float:
    """Wilcoxon's signed-rank test, two-sided and exact: the chance of rank sums this far apart, or further.

    Differences of zero are left out, equal ones share their mean rank (Wilcoxon's own rules; Pratt's keep zeros).
    Exact for ties too, because all signs of the ranks at hand are counted.

    Args:
        differences: One per pair; below zero where the second is higher.

    Returns:
        p; 1 where no pair differs. With n pairs that differ it cannot fall below 2 ** (1 − n).
    """
    values = np.array([value for value in differences if value != 0], np.float64)
    sizes = np.abs(values)
    # Twice the mean rank is a whole number, so that sums can be counted.
    doubled = [int((sizes < size).sum() + (sizes <= size).sum() + 1) for size in sizes]
    chances = np.ones(1)  # of each doubled sum of positive ranks, when every sign is as likely as the other
    for rank in doubled:
        more = np.zeros(len(chances) + rank)
        more[: len(chances)] = chances / 2
        more[rank:] += chances / 2
        chances = more
    positive = sum(rank for rank, value in zip(doubled, values, strict=True) if value > 0)
    return _two_sided(chances, positive)


def sign(differences: Sequence[float]) -> float:
    """The sign test, two-sided and exact; differences of zero are left out.

    Args:
        differences: One per pair.

    Returns:
        p; 1 where no pair differs.
    """
    values = [value for value in differences if value != 0]
    ways = [math.comb(len(values), count) for count in range(len(values) + 1)]
    chances = np.array([count / sum(ways) for count in ways])
    return _two_sided(chances, sum(value > 0 for value in values))


def _two_sided(chances: np.ndarray, seen: int) -> float:
    """Twice the smaller tail of a symmetric distribution, which the value seen belongs to."""
    return float(min(1.0, 2 * min(chances[: seen + 1].sum(), chances[seen:].sum())))
