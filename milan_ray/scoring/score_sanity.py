"""Sanity checks of scores: a description narrower or wider than the truth must score lower (docs/scores.md).

Units whose concept is known are scored three times: with the images that show the concept, with half of these removed
(a description that is too narrow), and with as many other images added (a description that is too wide).

Source: the sanity tests of Oikarinen et al., *Evaluating neuron explanations: a unified framework with sanity checks*
(ICML 2025).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from milan_ray.scoring.bootstrap import interval, ratio, resampling_counts
from milan_ray.scoring.evaluation import Row, score_table, unit_values
from milan_ray.scoring.simulation import Moments, average_precision, highest, retrieval

Score = Callable[[np.ndarray, np.ndarray], float]
"""Scores predictions (N,) against activations (N,); higher is better."""

LEAST = 1e-3
"""Relative decrease above which a score counts as lower; random variation is smaller."""

MISSING, EXTRA = "missing labels", "extra labels"

JUDGED = "scores judged by supported descriptions:"
"""Beginning of the names of experiments that judge scores on a layer's supported descriptions."""

PASSES = 0.75
"""Share of units whose score has to fall for a score to pass a test: halfway from chance, .5, to always."""


def missing_labels(shown: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Removes half of the images that show a concept from the true labels: bool (N,)."""
    images = np.flatnonzero(shown)
    fewer = shown.copy()
    fewer[rng.choice(images, len(images) // 2, replace=False)] = False
    return fewer


def extra_labels(shown: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Adds as many images that do not show the concept to the true labels, or all if there are fewer: bool (N,)."""
    images = np.flatnonzero(~shown)
    more = shown.copy()
    more[rng.choice(images, min(int(shown.sum()), len(images)), replace=False)] = True
    return more


def scores(top: float = 0.01, retrieved: int = 50) -> dict[str, Score]:
    """Returns the scores of descriptions, as functions of activations and predictions alone.

    Args:
        top: For AUPRC: share of the images, by highest activation, that count as positive.
        retrieved: For retrieval: number of images nearest to a description.
    """

    def correlation(activations: np.ndarray, predicted: np.ndarray) -> float:
        state = Moments()
        state.update(0, activations[:, None], predicted[:, None])
        return float(state.result()[0])

    def auprc(activations: np.ndarray, predicted: np.ndarray) -> float:
        return average_precision(predicted, highest(activations, max(1, round(top * len(activations)))))

    def nearest(activations: np.ndarray, predicted: np.ndarray) -> np.ndarray:
        return highest(predicted, min(retrieved, len(predicted) // 2))

    return {
        "simulation": correlation,
        "auprc": auprc,
        "retrieval-auc": lambda activations, predicted: retrieval(activations, nearest(activations, predicted))[0],
        "retrieval-mad": lambda activations, predicted: retrieval(activations, nearest(activations, predicted))[1],
    }


def sanity(
    experiment: str,
    activations: np.ndarray,
    shown: np.ndarray,
    measures: Mapping[str, Score] | None = None,
    *,
    samples: int = 1000,
    seed: int = 0,
) -> pa.Table:
    """Computes the share of units whose score falls when the true description is made too narrow or too wide.

    Args:
        experiment: Name of the evaluation.
        activations: Activations of U units whose concept is known, (N, U), without NaN.
        shown: bool (N, U): which images show the unit's concept.
        measures: The scores; None uses :func:`scores`.
        samples: Bootstrap resamples.
        seed: Seed of the removed and added images, and of the bootstrap.

    Returns:
        Rows of schema SCORES, systems :data:`MISSING` and :data:`EXTRA`: the share of units whose score falls. 1 means
        that the score detects every change; an unchanged score counts as not detected.

    Raises:
        ValueError: No unit's concept is shown by at least two images and absent from another.
    """
    units = [unit for unit in range(shown.shape[1]) if 2 <= shown[:, unit].sum() < len(shown)]
    if not units:
        raise ValueError("no unit's concept shows in some images and not in others")
    rng = np.random.default_rng(seed)
    # Shuffle, because scores of the nearest images break ties by position.
    order = rng.permutation(len(shown))
    activations, shown = activations[order], shown[order]
    predictions = shown.astype(np.float64)
    changed = {
        system: [change(shown[:, unit], rng).astype(np.float64) for unit in units]
        for system, change in ((MISSING, missing_labels), (EXTRA, extra_labels))
    }
    counts = resampling_counts(len(units), samples, seed)
    rows: list[Row] = []
    for metric, measure in (measures or scores()).items():
        truth = np.array([measure(activations[:, unit], predictions[:, unit]) for unit in units])
        for system, predicted in changed.items():
            worse = np.array([measure(activations[:, u], p) for u, p in zip(units, predicted, strict=True)])
            falls = worse < truth - LEAST * np.abs(truth)
            note = "share of units whose score falls when the true labels are made worse; 1 is a score that sees it"
            rows.append((system, metric, interval(unit_values(falls), ratio, counts), len(units), note))
    return score_table(experiment, rows)


def failing(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Finds the scores that fail a test: they fall for less than :data:`PASSES` of the units.

    Args:
        rows: Rows of experiments of :func:`sanity`, of schema SCORES.

    Returns:
        Metric → the tests that it fails in any of the experiments.
    """
    failed: dict[str, set[str]] = {}
    for row in rows:
        if row["system"] in (MISSING, EXTRA) and row["value"] < PASSES:
            failed.setdefault(row["metric"], set()).add(row["system"])
    return {metric: sorted(tests, reverse=True) for metric, tests in failed.items()}
