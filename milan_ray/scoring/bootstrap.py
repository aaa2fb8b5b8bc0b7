"""Percentile bootstrap over units, for any measure that is a function of sums over units.

BLEU, ROUGE, BERTScore and every share or mean are such measures. Each unit has a row of additive statistics, a resample
is a count per unit, and ``counts @ statistics`` gives the resampled sums. Nothing is tokenised or scored twice. Systems
share the counts, so their differences are paired.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Measure = Callable[[np.ndarray], np.ndarray]
"""Maps sums (B, K) to values (B,)."""


class Interval(NamedTuple):
    """A value over all units, and the ends of its 95 % percentile interval."""

    value: float
    low: float
    high: float


def resampling_counts(units: int, samples: int = 1000, seed: int = 0) -> np.ndarray:
    """Draws bootstrap resamples.

    Args:
        units: Number of units N, at least 1.
        samples: Number of resamples B.
        seed: Seed; the same seed gives the same resamples.

    Returns:
        float64 (B, N): how often each unit occurs in each resample; every row sums to N.

    Raises:
        ValueError: There are no units.
    """
    if units < 1:
        raise ValueError("a bootstrap needs at least one unit")
    drawn = np.random.default_rng(seed).integers(units, size=(samples, units))
    flat = (drawn + np.arange(samples)[:, None] * units).ravel()
    return np.bincount(flat, minlength=samples * units).reshape(samples, units).astype(np.float64)


def ratio(sums: np.ndarray) -> np.ndarray:
    """Measure for means and shares, whose statistics per unit are (count, total).

    Args:
        sums: (B, 2).

    Returns:
        (B,), total / count; 0 where the count is 0.
    """
    return sums[:, 1] / np.maximum(sums[:, 0], 1)


def interval(statistics: np.ndarray, measure: Measure, counts: np.ndarray) -> Interval:
    """Computes a measure and its 95 % interval.

    Args:
        statistics: (N, K) additive statistics per unit.
        measure: Maps sums to values.
        counts: (B, N) from :func:`resampling_counts`.
    """
    values = measure(counts @ statistics)
    return _percentiles(measure(statistics.sum(0, keepdims=True)), values)


def intervals(statistics: np.ndarray, measure: Measure, counts: np.ndarray) -> np.ndarray:
    """Computes :func:`interval` for many systems at once, which is several times faster.

    Args:
        statistics: (S, N, K) additive statistics per system and unit.
        measure: Maps sums to values.
        counts: (B, N) from :func:`resampling_counts`.

    Returns:
        (S, 3): value and ends.
    """
    systems, _, k = statistics.shape
    values = measure((counts @ statistics).reshape(-1, k)).reshape(systems, -1)
    low, high = np.percentile(values, [2.5, 97.5], axis=1)
    return np.stack([measure(statistics.sum(1)), low, high], axis=1)


def difference(a: np.ndarray, b: np.ndarray, measure: Measure, counts: np.ndarray) -> Interval:
    """Computes how much higher a measure is for ``a`` than for ``b`` on the same units, with a paired 95 % interval.

    Args:
        a: (N, K) additive statistics per unit of one system.
        b: (N, K) statistics of the other system, for the same units in the same order.
        measure: Maps sums to values.
        counts: (B, N) from :func:`resampling_counts`.
    """
    values = measure(counts @ a) - measure(counts @ b)
    return _percentiles(measure(a.sum(0, keepdims=True)) - measure(b.sum(0, keepdims=True)), values)


def _percentiles(value: np.ndarray, values: np.ndarray) -> Interval:
    low, high = np.percentile(values, [2.5, 97.5])
    return Interval(float(value[0]), float(low), float(high))
