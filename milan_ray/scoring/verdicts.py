"""Verdicts on descriptions: permutation p-values within a layer, false-discovery rates, calibration (docs/verdicts.md).

The evidence of a layer is the matrix of scores of all its units (rows) with all its distinct descriptions (columns), on
images that did not make the descriptions. A description is believed if it fits its unit better than it fits units
that are described otherwise, and better than their descriptions fit this unit.

Sources: Benjamini and Hochberg (1995); Phipson and Smyth, *Permutation p-values should never be zero* (2010); Platt,
*Probabilistic outputs for support vector machines* (1999).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from milan_ray.schema.verdicts import SUPPORTED
from milan_ray.scoring.differences import false_discovery

PARTLY, UNSUPPORTED, NOTHING = "partly", "unsupported", "nothing to describe"
VERDICTS = (SUPPORTED, PARTLY, UNSUPPORTED, NOTHING)
"""Verdicts, the best first."""

RATE = 0.1
"""False-discovery rate over a layer at which a description counts as better than shuffled ones."""

ALIKE = 0.1
"""p-value above which a unit's exemplars count as no more alike than images drawn at random."""

HALF = float(np.sqrt(0.5))
"""Correlation of a description that lacks half of its images, or has as many wrong ones, relative to the whole one's.

For a concept of few images both tests of labels (``scoring/score_sanity.py``) divide the correlation by √2.
"""

LEAST_OTHERS = 5
"""Units with another description that a description is compared with, at least."""


LIMIT = 100.0
"""Standard deviations above which an excess is not told apart: of few texts, other units' scores may all be equal."""


class Evidence(NamedTuple):
    """What the scores of a layer say of each of its U units' descriptions; NaN where there is nothing to compare.

    Attributes:
        score: float64 (U,), the score of the unit with its description.
        others: float64 (U,), its mean score with the other descriptions of the layer, by their frequency.
        best: float64 (U,), its highest score with another description of the layer.
        excess: float64 (U,), the score in standard deviations above the scores of other pairs (:func:`standardised`).
        p: float64 (U,), permutation p-value, in (0, 1].
        q: float64 (U,), p after Benjamini and Hochberg, over the units with a score.
    """

    score: np.ndarray
    others: np.ndarray
    best: np.ndarray
    excess: np.ndarray
    p: np.ndarray
    q: np.ndarray


def cross_correlations(blocks: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]], width: int) -> np.ndarray:
    """Computes Pearson correlations of all units' activations with the fits of all texts, each unit on its own images.

    Args:
        blocks: Activations float (B, U), the same use bool (B, U), and fits float (B, T) of blocks of images, in order.
        width: Columns that units are padded to, so that products do not depend on how units were cut; at least U.

    Returns:
        float64 (U, T); 0 where a fit is constant, NaN where an activation is constant or has no image.

    Raises:
        ValueError: There are no blocks.
    """
    sums: list[torch.Tensor] | None = None
    units = 0
    for activations, use, fits in blocks:
        units = activations.shape[1]
        there = np.zeros((len(activations), width))
        there[:, :units] = use & np.isfinite(activations)
        x = np.zeros_like(there)
        x[:, :units] = np.where(there[:, :units] > 0, activations, 0)
        n, own, y = torch.from_numpy(there), torch.from_numpy(x), torch.from_numpy(fits.astype(np.float64))
        of_units = [n.sum(dim=0)[:, None], own.sum(dim=0)[:, None], (own * own).sum(dim=0)[:, None]]
        of_block = [*of_units, n.T @ y, n.T @ (y * y), own.T @ y]
        sums = of_block if sums is None else [total + more for total, more in zip(sums, of_block, strict=True)]
    if sums is None:
        raise ValueError("there are no images to correlate on")
    count, of_unit, unit_squares, of_text, text_squares, both = (total[:units].numpy() for total in sums)
    # Variances times n². A variance that rounding errors alone can explain counts as zero.
    unit_spread = count * unit_squares - of_unit * of_unit
    text_spread = count * text_squares - of_text * of_text
    moves, varies = unit_spread > 1e-10 * count * unit_squares, text_spread > 1e-10 * count * text_squares
    scale = np.sqrt(np.where(moves, unit_spread, 1)) * np.sqrt(np.where(varies, text_spread, 1))
    return np.where(moves, np.where(varies, (count * both - of_unit * of_text) / scale, 0.0), np.nan)


def permutation_p(values: np.ndarray, null: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Computes p-values from a permutation distribution: (1 + b) / (1 + m).

    Args:
        values: (n,), statistics; higher is more extreme. NaN gives NaN.
        null: (M,), statistics of permutations, without NaN.
        weights: int (M,), how often each of them occurs; None for once.

    Returns:
        float64 (n,), where m is the number of permutations and b the number that are at least as extreme.
    """
    order = np.argsort(null, kind="stable")
    weights = np.ones(len(null), np.int64) if weights is None else weights[order].astype(np.int64)
    from_here = np.append(weights[::-1].cumsum()[::-1], 0)  # permutations at this place or above it
    above = from_here[np.searchsorted(null[order], values, "left")]
    return np.where(np.isnan(values), np.nan, (1 + above) / (1 + from_here[0]))


def standardised(scores: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Scores without what a unit does with every description, and a description with every unit.

    A row loses its mean and standard deviation over the descriptions of the layer, by their frequency. A column then
    loses its mean and standard deviation over the units that have another description.

    Args:
        scores: float64 (U, T), without NaN.
        own: int (U,), the column of each unit's description.

    Returns:
        float64 (U, T); NaN in columns with fewer than :data:`LEAST_OTHERS` units that have another description.
    """
    frequency = np.bincount(own, minlength=scores.shape[1]) / max(1, len(own))
    rows = _scaled(scores, scores @ frequency, frequency)
    other = own[:, None] != np.arange(scores.shape[1])
    units = other.sum(axis=0)
    enough = units >= LEAST_OTHERS
    share = other / np.maximum(units, 1)
    columns = _scaled(rows.T, (rows * share).sum(axis=0), share.T).T
    return np.where(enough, columns, np.nan)


def _scaled(values: np.ndarray, means: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Rows (R, C) less their means (R,), over their deviations by weights (C,) or (R, C), within ±:data:`LIMIT`."""
    centred = values - means[:, None]
    # What rounding alone explains is no difference, and no deviation.
    rounding = 1e-9 * np.abs(values).max(axis=1, initial=1e-300, keepdims=True)
    deviation = np.sqrt((centred**2 * weights).sum(axis=1, keepdims=True))
    scaled = centred / np.maximum(deviation, rounding)
    return np.where(np.abs(centred) <= rounding, 0.0, np.clip(scaled, -LIMIT, LIMIT))


def weigh(scores: np.ndarray, own: np.ndarray) -> Evidence:
    """Compares each unit's score with those that other descriptions of its layer would have.

    The permutations are all pairs of a unit and another unit's description that says something else; pairs of equal
    descriptions are no permutation. They are pooled over the layer after :func:`standardised`.

    Args:
        scores: float64 (U, T), the score of each unit with each distinct description; rows of NaN have no evidence.
        own: int (U,), the column of each unit's description.
    """
    units, texts = scores.shape
    known = np.isfinite(scores).all(axis=1)
    filled = {name: np.full(units, np.nan) for name in Evidence._fields}
    mine, of = scores[known], own[known]
    if len(mine):
        place = np.arange(len(mine))
        frequency = np.bincount(of, minlength=texts)
        other = (of[:, None] != np.arange(texts)) & (frequency > 0)
        filled["score"][known] = mine[place, of]
        count = (other * frequency).sum(axis=1)
        total = (mine * (other * frequency)).sum(axis=1)
        filled["others"][known] = np.where(count > 0, total / np.maximum(count, 1), np.nan)
        highest = np.where(other, mine, -np.inf).max(axis=1)
        filled["best"][known] = np.where(np.isfinite(highest), highest, np.nan)
        values = standardised(mine, of)
        pairs = other & np.isfinite(values)
        weights = np.broadcast_to(frequency, values.shape)[pairs]
        filled["excess"][known] = values[place, of]
        filled["p"][known] = np.nan_to_num(permutation_p(values[place, of], values[pairs], weights), nan=1.0)
        filled["q"][known] = false_discovery(filled["p"][known])
    return Evidence(**filled)


def decide(evidence: Evidence, silent: np.ndarray, unlike: np.ndarray) -> list[tuple[str, str]]:
    """Gives each unit's description a verdict, and the reason in words.

    Args:
        evidence: What the layer's scores say.
        silent: bool (U,), units whose exemplars mean nothing.
        unlike: float64 (U,), p-values of the exemplars' likeness (:func:`likeness_p`); NaN counts as alike.
    """
    verdicts = []
    for unit in range(len(evidence.score)):
        if silent[unit]:
            verdicts.append((NOTHING, "its exemplars mean nothing: it is never active, or they tie"))
        elif np.isnan(evidence.score[unit]):
            verdicts.append((NOTHING, "its activation never changes on the images that count"))
        elif evidence.q[unit] > RATE:
            verdicts.append(_rejected(float(unlike[unit]), float(evidence.excess[unit])))
        elif evidence.score[unit] <= 0:
            verdicts.append((UNSUPPORTED, "its activation falls where the description fits"))
        elif evidence.score[unit] < HALF * evidence.best[unit]:
            verdicts.append((PARTLY, "better than shuffled, but another description of the layer fits much better"))
        else:
            verdicts.append((SUPPORTED, "better than shuffled, and no other description of the layer fits much better"))
    return verdicts


def _rejected(unlike: float, excess: float) -> tuple[str, str]:
    """Verdict on a description that is no better than shuffled ones."""
    if unlike > ALIKE:
        return NOTHING, "no better than shuffled, and the exemplars are no more alike than random images"
    if np.isnan(excess):
        return UNSUPPORTED, f"fewer than {LEAST_OTHERS} units of the layer have another description to compare with"
    return UNSUPPORTED, "no better than shuffled"


def likeness_p(likeness: np.ndarray, images: np.ndarray, k: int, draws: int = 999, seed: int = 0) -> np.ndarray:
    """Tests whether exemplars are more alike than images drawn at random.

    Args:
        likeness: float64 (U,), mean cosine of two exemplars (``clarity``); NaN gives NaN.
        images: (N, D), embeddings of length 1 of the images to draw from.
        k: Exemplars per unit.
        draws: Sets of k images.
        seed: Seed of the draws.

    Returns:
        float64 (U,), p-values; NaN for all where there are fewer than k images, or k is below 2.
    """
    if k < 2 or len(images) < k:
        return np.full(len(likeness), np.nan)
    rng = np.random.default_rng(seed)
    sets = np.stack([images[rng.choice(len(images), k, replace=False)].mean(axis=0) for _ in range(draws)])
    null = ((sets.astype(np.float64) ** 2).sum(axis=1) - 1 / k) * k / (k - 1)
    return permutation_p(likeness, null)


@dataclass(frozen=True)
class Calibration:
    """Platt's curve from the excess of a description to the probability that it is true, at even odds.

    Attributes:
        intercept: Log odds at an excess of 0.
        slope: Log odds per standard deviation of excess.
    """

    intercept: float
    slope: float

    def __call__(self, excess: np.ndarray) -> np.ndarray:
        """Returns probabilities, float64; NaN where the excess is NaN."""
        return 1 / (1 + np.exp(-np.clip(self.intercept + self.slope * excess, -500, 500)))


def calibrate(excess: np.ndarray, true: np.ndarray) -> Calibration:
    """Fits :class:`Calibration` by maximum likelihood with Platt's targets; all true and all false ones weigh the same.

    Args:
        excess: float64 (n,), from :func:`weigh`; NaN is left out.
        true: bool (n,), whether the description is true.

    Raises:
        ValueError: There is no true one, or no false one, with a finite excess.
    """
    finite = np.isfinite(excess)
    excess, true = excess[finite], true[finite]
    positive, negative = int(true.sum()), int((~true).sum())
    if not positive or not negative:
        raise ValueError("a calibration needs descriptions that are true, and others that are false")
    target = np.where(true, (positive + 1) / (positive + 2), 1 / (negative + 2))
    weight = np.where(true, 0.5 / positive, 0.5 / negative)
    design = np.stack([np.ones(len(true)), excess])
    beta = np.zeros(2)
    for _ in range(200):  # Newton's method; the loss is convex, and the targets keep its minimum finite
        fitted = 1 / (1 + np.exp(-np.clip(beta @ design, -500, 500)))
        curvature = (design * (weight * fitted * (1 - fitted))) @ design.T + 1e-12 * np.eye(2)
        step = np.clip(np.linalg.solve(curvature, design @ (weight * (target - fitted))), -1, 1)
        beta += step
        if np.abs(step).max() < 1e-12:
            break
    return Calibration(*beta.tolist())
