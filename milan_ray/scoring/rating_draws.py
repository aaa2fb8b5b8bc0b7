"""Draws the images that people rate for a description, and weights them so that scores are those of the whole probe.

Most images of a probe say little about how well a description fits a unit. Draws therefore come from a mixture of three
distributions over the N images: one that prefers unusual activations, high ones above all; one that prefers images
which a judge (a model of images and texts) finds near to the description; and the uniform one, whose share bounds every
weight by 1 / share. An image drawn with probability q has weight 1 / (N·q).

Activations and the judge's values of all N images are known without ratings. :func:`calibrated` uses this: it changes
the weights as little as possible so that the weighted draws have the known means of the whole probe.

Sources: importance sampling by a model for rating explanations (arXiv 2506.07985); the mixture and its uniform share
(Owen and Zhou, *Safe and effective importance sampling*, 2000); calibrated weights (Deville and Särndal, 1992).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

UNIFORM_SHARE = 0.1
"""Smallest share of the uniform distribution: no weight exceeds 1 / share."""

HIGH = 0.6
"""Share of ranks in the distribution by activation; the rest is by distance from the mean."""

RIDGE = 1e-9
"""Added to the calibration's matrix of standardised features: a feature that never changes calibrates nothing."""


@dataclass(frozen=True)
class Mixture:
    """Shares of the distributions that images are drawn from.

    The defaults were chosen on the scenes of ``world/train`` (docs/ratings.md).

    Attributes:
        activation: Share of the distribution by activation.
        judge: Share of the distribution by the judge's values; without a judge, activations get it.
        uniform: Share of the uniform distribution.
    """

    activation: float = 0.6
    judge: float = 0.2
    uniform: float = 0.2

    def __post_init__(self) -> None:
        """Checks the shares.

        Raises:
            ValueError: They do not sum to 1, one is negative, or the uniform one is below :data:`UNIFORM_SHARE`.
        """
        shares = (self.activation, self.judge, self.uniform)
        if min(shares) < 0 or abs(sum(shares) - 1) > 1e-9 or self.uniform < UNIFORM_SHARE:
            raise ValueError(f"shares {shares} must sum to 1, with at least {UNIFORM_SHARE} for the uniform one")


MIXTURES = {"importance": Mixture(), "uniform": Mixture(0.0, 0.0, 1.0)}
"""Way of sampling → shares."""


def by_rank(values: np.ndarray) -> np.ndarray:
    """A distribution that gives every doubling of rank about the same probability: the top 1 %, the next 1 %, 2 %, 4 %.

    Args:
        values: (N,); the highest have rank 1, and equal values share their probability.

    Returns:
        float64 (N,), sums to 1.
    """
    _, place, counts = np.unique(-values.astype(np.float64), return_inverse=True, return_counts=True)
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, len(values) + 1))])
    ends = np.cumsum(counts)
    mass: np.ndarray = (harmonic[ends] - harmonic[ends - counts]) / counts / harmonic[-1]
    return mass[place]


def standardised(values: np.ndarray) -> np.ndarray:
    """Values with mean 0 and standard deviation 1, float64 (N,); zeros where they never change."""
    centred = values.astype(np.float64) - values.mean(dtype=np.float64)
    deviation = centred.std()
    return centred / deviation if deviation > 1e-9 * np.abs(values).max(initial=0) else np.zeros(len(values))


def proposal(activations: np.ndarray, fit: np.ndarray | None, mixture: Mixture) -> np.ndarray:
    """The distribution that images are drawn from.

    By activation, :data:`HIGH` of the probability goes to high ranks, on which precision and recall depend, and the
    rest is proportional to the distance from the mean activation, with which an image's influence on a correlation
    grows.

    Args:
        activations: A unit's activations, (N,), without NaN.
        fit: A judge's values of the images for the description, (N,), without NaN; None without a judge.
        mixture: Shares of its parts.

    Returns:
        float64 (N,), sums to 1; every entry is at least ``mixture.uniform`` / N.
    """
    images = len(activations)
    distance = np.abs(standardised(activations))
    total = distance.sum()
    by_activation = HIGH * by_rank(activations) + (1 - HIGH) * (distance / total if total else 1 / images)
    if fit is None:
        return (mixture.activation + mixture.judge) * by_activation + mixture.uniform / images
    return mixture.activation * by_activation + mixture.judge * by_rank(fit) + mixture.uniform / images


def draw(q: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draws images independently, with replacement: an image drawn twice is rated once and counts twice.

    Args:
        q: Probabilities of N images, (N,).
        count: Number of draws.
        rng: Source of randomness.

    Returns:
        int64 (count,): indices of images, ascending.
    """
    edges = np.cumsum(q)
    drawn = np.searchsorted(edges, rng.random(count) * edges[-1], side="right")
    return np.sort(np.minimum(drawn, len(q) - 1))


def features(activations: np.ndarray, top: np.ndarray, fit: np.ndarray | None) -> np.ndarray:
    """What is known of every image without ratings, as columns whose means :func:`calibrated` keeps.

    Args:
        activations: (N,).
        top: bool (N,): the images that count as exciting the unit.
        fit: The judge's values, (N,); None without a judge.

    Returns:
        float64 (N, 3), or (N, 6) with a judge; means 0.
    """
    z = standardised(activations)
    columns = [z, z * z, top.astype(np.float64)]
    if fit is not None:
        near = standardised(np.log(by_rank(fit)))
        columns += [near, near * near, z * near]
    return np.stack([standardised(column) for column in columns], axis=1)


def prior_features(activations: np.ndarray, fit: np.ndarray | None) -> np.ndarray:
    """What the presence of a description is predicted from before anybody looks, as standardised columns.

    Ranks take the place of activations, whose tail would let a few images decide. The square lets presence stay below 1
    among the highest activations; without it, raters who find nothing there would not be believed.

    Args:
        activations: (N,).
        fit: The judge's values, (N,); None without a judge.

    Returns:
        float64 (N, 3), or (N, 4) with a judge: quantile of the activation, logarithm of its rank and its square,
        logarithm of the judge's rank.
    """
    distinct, place = np.unique(activations, return_inverse=True)
    rank = standardised(np.log(by_rank(activations)))
    below = np.cumsum(np.bincount(place, minlength=len(distinct)))
    columns = [below[place], rank, rank * rank]
    if fit is not None:
        columns.append(np.log(by_rank(fit)))
    return np.stack([standardised(column) for column in columns], axis=1)


def calibrated(weights: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Changes weights as little as possible (chi-squared distance) so that weighted means of features are 0.

    Weights that would be negative become 0; the means then differ slightly from 0.

    Args:
        weights: (S, n): S sets of weights of n draws.
        known: :func:`features` of the draws, (n, K), whose means over all images are 0.

    Returns:
        float64 (S, n); rows sum to 1.
    """
    own: np.ndarray = weights / weights.sum(axis=1, keepdims=True)
    if not known.shape[1]:
        return own
    columns = np.concatenate([np.ones((len(known), 1)), known], axis=1)
    products = np.einsum("sn,nj,nk->sjk", own, columns, columns, optimize=True)
    missing = np.eye(columns.shape[1])[0] - own @ columns
    change = np.linalg.solve(products + RIDGE * np.eye(columns.shape[1]), missing[:, :, None])[:, :, 0]
    kept = np.maximum(own * (1 + change @ columns.T), 0)
    result: np.ndarray = kept / kept.sum(axis=1, keepdims=True)
    return result
