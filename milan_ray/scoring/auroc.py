"""Areas under the ROC curve for all pairs of units and targets at once."""

from __future__ import annotations

import numpy as np


def average_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks the values within each column, 1 = smallest; equal values share the mean of their ranks.

    Args:
        values: (N, U), without NaN.

    Returns:
        float64 (N, U).
    """
    ranks = np.empty(values.shape)
    for unit, column in enumerate(values.T):
        ordered = np.sort(column)
        first, last = np.searchsorted(ordered, column, "left"), np.searchsorted(ordered, column, "right")
        ranks[:, unit] = (first + last + 1) / 2
    return ranks


def auroc(activations: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Computes how well each unit's activation separates the items of each target from the others.

    AUROC is the probability that an item of the target activates the unit more than an item outside it, where ties
    count one half (the Mann-Whitney statistic, from average ranks).

    Args:
        activations: (N, U), one activation per item and unit.
        targets: bool (N, T).

    Returns:
        float64 (U, T); NaN for targets that hold for no item or for all.

    Raises:
        ValueError: An activation is NaN, or the item counts differ.
    """
    if len(activations) != len(targets):
        raise ValueError(f"{len(activations)} rows of activations but {len(targets)} rows of targets")
    if np.isnan(activations).any():
        raise ValueError("activations hold NaN, which has no rank")
    positive = targets.sum(0, dtype=np.int64)
    pairs = positive * (len(targets) - positive)
    rank_sums = average_ranks(activations).T @ targets.astype(np.float64)
    wins = rank_sums - positive * (positive + 1) / 2
    return np.divide(wins, pairs, out=np.full(wins.shape, np.nan), where=pairs > 0)
