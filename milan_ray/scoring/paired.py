"""Exact tests of paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def signed_rank(differences: Sequence[float]) -> float:
    """Wilcoxon's signed-rank test, two-sided and exact: the probability of rank sums at least this far apart.

    Zero differences are left out, and equal differences share their mean rank (Wilcoxon's rules; Pratt's keep zeros).
    The test is exact with ties too, because it enumerates all signs of the actual ranks.

    Args:
        differences: One per pair; negative if the second is higher.

    Returns:
        p; 1 if no pair differs. With n differing pairs, p is at least 2 ** (1 − n).
    """
    values = np.array([value for value in differences if value != 0], np.float64)
    sizes = np.abs(values)
    # Twice the mean rank is an integer, so that sums can be counted.
    doubled = [int((sizes < size).sum() + (sizes <= size).sum() + 1) for size in sizes]
    chances = np.ones(1)  # probability of each doubled sum of positive ranks, if both signs are equally likely
    for rank in doubled:
        more = np.zeros(len(chances) + rank)
        more[: len(chances)] = chances / 2
        more[rank:] += chances / 2
        chances = more
    positive = sum(rank for rank, value in zip(doubled, values, strict=True) if value > 0)
    return _two_sided(chances, positive)


def sign(differences: Sequence[float]) -> float:
    """The sign test, two-sided and exact; zero differences are left out.

    Args:
        differences: One per pair.

    Returns:
        p; 1 if no pair differs.
    """
    values = [value for value in differences if value != 0]
    ways = [math.comb(len(values), count) for count in range(len(values) + 1)]
    chances = np.array([count / sum(ways) for count in ways])
    return _two_sided(chances, sum(value > 0 for value in values))


def _two_sided(chances: np.ndarray, observed: int) -> float:
    """Returns twice the smaller tail, which includes the observed value, of a symmetric distribution."""
    return float(min(1.0, 2 * min(chances[: observed + 1].sum(), chances[observed:].sum())))
