"""Scores of directions of a layer, such as dictionary features, against directions and concepts that are known."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from milan_ray.scoring.auroc import auroc


def best_cosines(found: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Computes for each true direction the cosine of the found direction that is nearest to it.

    Lengths do not matter, but signs do: an opposite direction has cosine −1. Directions that have no sign, such as
    principal components, are given together with their opposites (:func:`both_signs`). One found direction may be the
    nearest to several true ones, but with a threshold above .71 not to two that are orthogonal.

    Args:
        found: (F', C), one direction per row; rows of zeros, such as those of dead features, match nothing.
        true: (F, C), one direction per row.

    Returns:
        float64 (F,), −1 to 1; −1 where nothing was found.

    Raises:
        ValueError: The widths differ, a value is not finite, or a true direction is zero.
    """
    if found.ndim != 2 or true.ndim != 2 or found.shape[1] != true.shape[1]:
        raise ValueError(f"directions of shapes {found.shape} and {true.shape} are not of one layer")
    if not (np.isfinite(found).all() and np.isfinite(true).all()):
        raise ValueError("directions hold values that are not finite")
    known = _unit_rows(true)
    if len(known) != len(true):
        raise ValueError("a true direction is zero")
    rows = _unit_rows(found)
    return (known @ rows.T).max(axis=1) if len(rows) else np.full(len(true), -1.0)


def recovered(found: np.ndarray, true: np.ndarray, threshold: float = 0.9) -> float:
    """Computes the share of the true directions that some found direction matches: cosine above the threshold.

    Args:
        found: (F', C), as :func:`best_cosines` takes them.
        true: (F, C), at least one direction.
        threshold: Cosine that a match exceeds.

    Returns:
        0 to 1.

    Raises:
        ValueError: There is no true direction, or as :func:`best_cosines`.
    """
    if not len(true):
        raise ValueError("a share of no directions has no value")
    return float((best_cosines(found, true) > threshold).mean())


def both_signs(directions: np.ndarray) -> np.ndarray:
    """Adds the opposite of each direction: (F, C) becomes (2 F, C), the opposites last."""
    return np.concatenate([directions, -directions])


class BestFeatures(NamedTuple):
    """The feature that separates each concept best.

    Attributes:
        feature: int64 (T,), the feature that was best on the choosing items; −1 for concepts that none or all show.
        auroc: float64 (T,), its AUROC on the judging items; NaN for concepts that none or all of the items show.
    """

    feature: np.ndarray
    auroc: np.ndarray


def best_features(
    activations: np.ndarray, shown: np.ndarray, judged_activations: np.ndarray, judged_shown: np.ndarray
) -> BestFeatures:
    """Chooses the best feature for each concept on some items and judges it on others.

    The more features there are, the more the best of them owes to luck on the items that chose it; items that did not
    choose are free of this.

    Args:
        activations: (N, F), features on the choosing items.
        shown: bool (N, T), which of them show each concept.
        judged_activations: (M, F), the same features on the judging items.
        judged_shown: bool (M, T).

    Raises:
        ValueError: Shapes do not fit, or an activation is NaN.
    """
    if activations.shape[1] != judged_activations.shape[1]:
        raise ValueError(f"{activations.shape[1]} features choose but {judged_activations.shape[1]} are judged")
    chosen = auroc(activations, shown)
    feature = np.where(np.isnan(chosen).any(axis=0), -1, np.nan_to_num(chosen, nan=0.0).argmax(axis=0))
    judged = auroc(judged_activations, judged_shown)[feature, np.arange(shown.shape[1])]
    return BestFeatures(feature, np.where(feature < 0, np.nan, judged))


def _unit_rows(directions: np.ndarray) -> np.ndarray:
    """The directions that are not zero, at length 1, float64."""
    rows: np.ndarray = directions.astype(np.float64)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: np.ndarray = (rows / np.where(length > 0, length, 1))[length[:, 0] > 0]
    return unit
