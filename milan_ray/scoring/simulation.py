"""Scores how well a description predicts its unit: simulation correlation and AUPRC (docs/scores.md).

A text predicts how much an image activates a unit: s = 1 / (1 + exp(−a·(f + b))), where f is the product of the
embeddings of image and text. The score is the Pearson correlation of s and the unit's activation over images; it needs
only six sums per unit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


def held_out(image_ids: np.ndarray, share: float) -> np.ndarray:
    """Selects the held-out images: a fixed pseudo-random choice by id, the same in every job.

    Args:
        image_ids: int64 (N,).
        share: Approximate share to hold out: 0 none, 1 all.

    Returns:
        bool (N,).
    """
    return scattered(image_ids) < share


def scattered(image_ids: np.ndarray) -> np.ndarray:
    """A fixed pseudo-random number in [0, 1) for each image id, the same in every job: float64 (N,)."""
    # splitmix64's finalizer, so that neighbouring ids are not held out together.
    x = image_ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x632BE59BD9B4E019)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) / 2**53


@dataclass(frozen=True)
class Sigmoid:
    """Maps a fit (product of embeddings) to a prediction.

    Attributes:
        a: Steepness.
        b: Offset added to the fit.
    """

    a: float
    b: float

    def __call__(self, fit: np.ndarray) -> np.ndarray:
        """Returns predictions between 0 and 1, float64 of the same shape."""
        return 1 / (1 + np.exp(-self.a * (fit.astype(np.float64) + self.b)))


SIGMOIDS = {"clip": Sigmoid(58, -0.25), "siglip": Sigmoid(58, -0.13)}
"""Fitted on ImageNet's superclasses for CLIP ViT-L/14-336 and SigLIP SO400M, by kind of model."""


class Moments:
    """Sums over images for the correlation of two columns: n, Σx, Σy, Σx², Σy², Σxy.

    Images arrive in numbered blocks. Sums are kept by block, and the result adds them in order of block number.
    Therefore any order of blocks, any split of blocks over states, and any repetition gives the identical result.
    """

    def __init__(self) -> None:
        """Starts empty."""
        self._blocks: dict[int, np.ndarray] = {}

    def update(self, block: int, x: np.ndarray, y: np.ndarray, use: np.ndarray | None = None) -> None:
        """Adds a block of images.

        Args:
            block: Number of the block.
            x: Activations, (B, C), NaN where there is none.
            y: Predictions, (B, C).
            use: bool (B, C), which entries to use; None for all.
        """
        there = np.isfinite(x) if use is None else use & np.isfinite(x)
        x = np.where(there, x, 0).astype(np.float64)
        y = np.where(there, y, 0).astype(np.float64)
        sums = [there, x, y, x * x, y * y, x * y]
        self._blocks[block] = np.stack([values.sum(axis=0, dtype=np.float64) for values in sums])

    def merge(self, other: Moments) -> None:
        """Adds the blocks of another state."""
        self._blocks |= other._blocks

    def sums(self) -> np.ndarray:
        """Returns the six sums, float64 (6, C).

        Raises:
            ValueError: There are no blocks.
        """
        if not self._blocks:
            raise ValueError("nothing was added yet")
        total = np.zeros_like(next(iter(self._blocks.values())))
        for block in sorted(self._blocks):
            total += self._blocks[block]
        return total

    def result(self) -> np.ndarray:
        """Returns Pearson correlations, float64 (C,); 0 where a column is constant, because it predicts nothing."""
        n, x, y, xx, yy, xy = self.sums()
        # Variances times n². A variance that rounding errors alone can explain counts as zero.
        spread_x, spread_y = n * xx - x * x, n * yy - y * y
        varies = (spread_x > 1e-10 * n * xx) & (spread_y > 1e-10 * n * yy)
        scale = np.sqrt(np.where(varies, spread_x, 1)) * np.sqrt(np.where(varies, spread_y, 1))
        return np.where(varies, (n * xy - x * y) / scale, 0.0)


def average_precision(scores: np.ndarray, positive: np.ndarray) -> float:
    """Area under the precision-recall curve: the sum of precisions over steps of recall. Equal scores form one step.

    Args:
        scores: (N,).
        positive: bool (N,).

    Returns:
        0 to 1; NaN if nothing is positive. An uninformative score gets the share of positives.
    """
    total = int(positive.sum())
    if not total:
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    ranked, hits = scores[order], np.cumsum(positive[order])
    ends = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)
    retrieved = hits[ends]
    precision = retrieved / (ends + 1)
    return float(np.sum(np.diff(retrieved, prepend=0) * precision) / total)


def highest(values: np.ndarray, count: int) -> np.ndarray:
    """Marks the ``count`` highest of the values (N,): bool (N,); among equal values, the first."""
    chosen = np.zeros(len(values), bool)
    chosen[np.argsort(-values, kind="stable")[:count]] = True
    return chosen


def retrieval(activations: np.ndarray, chosen: np.ndarray) -> tuple[float, float]:
    """Computes how much more a unit activates on chosen images than on the others (CoSy).

    Args:
        activations: (N,), without NaN.
        chosen: bool (N,): images generated for the description, or nearest to it.

    Returns:
        AUC: the probability that a chosen image activates the unit more than another image, ties counting one half.
        MAD: (mean over the chosen − mean over the others) / standard deviation of the others, 0 where that is 0.
        Both are NaN if all or none are chosen.
    """
    own, other = activations[chosen].astype(np.float64), np.sort(activations[~chosen].astype(np.float64))
    if not len(own) or not len(other):
        return float("nan"), float("nan")
    below, upto = np.searchsorted(other, own, "left"), np.searchsorted(other, own, "right")
    auc = float((below + upto).sum() / (2 * len(own) * len(other)))
    deviation = float(other.std())
    return auc, float((own.mean() - other.mean()) / deviation) if deviation > 0 else 0.0
