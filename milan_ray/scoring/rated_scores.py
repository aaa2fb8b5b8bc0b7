"""Scores of a description from weighted draws of images and the probability that each shows what it names.

Every score is a function of weighted means over draws, so the same function serves one set of weights and the resampled
ones of an interval.
"""

from __future__ import annotations

import numpy as np

from milan_ray.scoring.bootstrap import Interval
from milan_ray.scoring.rating_draws import calibrated, standardised

METRICS = ("correlation", "precision", "recall", "f1", "iou")
"""Names of the scores, in the order of :func:`rated_scores`."""

SMALLEST = 1e-12
"""Denominators up to this count as 0."""

COVERAGE = (2.5, 97.5)
"""Percentiles of the ends of an interval."""


def rated_scores(weights: np.ndarray, activations: np.ndarray, top: np.ndarray, presence: np.ndarray) -> np.ndarray:
    """Computes scores from weighted draws.

    Args:
        weights: (S, n), rows sum to 1.
        activations: Of the draws, (n,).
        top: bool (n,): whether a draw is among the images that count as exciting the unit.
        presence: Probability that a draw shows what the description names, (S, n) or (n,).

    Returns:
        float64 (S, 5), columns as :data:`METRICS`: Pearson correlation of activation and presence; share of the
        exciting images that show it; share of the images showing it that are exciting; F1; intersection over union. 0
        where a denominator is 0.
    """
    z = standardised(activations)
    shown = np.broadcast_to(presence, weights.shape).astype(np.float64)

    def mean(values: np.ndarray) -> np.ndarray:
        result: np.ndarray = (weights * values).sum(axis=1)
        return result

    exciting, share = mean(top.astype(np.float64)), mean(shown)
    both = mean(shown * top)
    centre = mean(z)
    # Presence is 0 or 1, so its variance follows from its mean also where only a probability is known.
    spread = np.maximum(mean(z * z) - centre**2, 0) * share * np.maximum(1 - share, 0)
    covariance = mean(z * shown) - centre * share
    numerators = (covariance, both, both, 2 * both, both)
    denominators = (np.sqrt(spread), exciting, share, exciting + share, exciting + share - both)
    ratios = [
        np.divide(high, low, out=np.zeros_like(high), where=low > SMALLEST)
        for high, low in zip(numerators, denominators, strict=True)
    ]
    return np.stack(ratios, axis=1)


def estimate(
    weights: np.ndarray,
    known: np.ndarray,
    activations: np.ndarray,
    top: np.ndarray,
    presence: np.ndarray,
    shown: np.ndarray,
    rng: np.random.Generator,
) -> list[Interval]:
    """Estimates scores with 95 % intervals that include the choice of images and what raters leave open.

    Args:
        weights: Importance weights of n draws, (n,).
        known: Features that the weights are calibrated on, (n, K).
        activations: Of the draws, (n,).
        top: bool (n,).
        presence: Samples of the probability that each draw shows what the description names, (S, n).
        shown: Samples of whether it does, (S, n).
        rng: Source of randomness.

    Returns:
        One interval per score of :data:`METRICS`.
    """
    once = calibrated(weights[None], known)
    values = rated_scores(once, activations, top, presence.mean(axis=0, dtype=np.float64))[0]
    # The Bayesian bootstrap: a resample gives draws exponential weights, so that no draw is ever left out entirely.
    resampled = calibrated(weights * rng.exponential(size=presence.shape), known)
    low, high = np.percentile(rated_scores(resampled, activations, top, shown), COVERAGE, axis=0)
    return [Interval(*map(float, each)) for each in zip(values, low, high, strict=True)]
