"""Scores of a description as a detector: F1, IoU, correlation, cosine and AUPRC (docs/verdicts.md).

A unit's activations a over N images are compared with the presence c of what its description names, a probability or a
label for each image. F1, IoU and AUPRC binarise activations at their highest share α. Whether a score falls when a
description is made too narrow or too wide depends on α and on the activations: ``scoring/score_sanity.py`` tests it.

Source: Oikarinen et al., *Evaluating neuron explanations: a unified framework with sanity checks* (ICML 2025).
"""

from __future__ import annotations

from functools import partial

import numpy as np

from milan_ray.scoring.score_sanity import Score
from milan_ray.scoring.simulation import average_precision, highest

METRICS = ("f1", "iou", "cosine", "auprc")
"""Scores beside the correlation, which verdicts rest on."""


def top_share(activations: np.ndarray, top: float) -> np.ndarray:
    """Marks the share ``top`` of the images with the highest activations (N,), at least one: bool (N,)."""
    return highest(activations, max(1, round(top * len(activations))))


def f1(activations: np.ndarray, presence: np.ndarray, top: float) -> float:
    """Harmonic mean of precision and recall: 2·Σ a·c / (Σ a + Σ c), for binarised a; 0 to 1."""
    fires = top_share(activations, top)
    return float(2 * presence[fires].sum() / (fires.sum() + presence.sum()))


def iou(activations: np.ndarray, presence: np.ndarray, top: float) -> float:
    """Intersection over union: Σ a·c / (Σ a + Σ c − Σ a·c), for binarised a; 0 to 1."""
    fires = top_share(activations, top)
    both = presence[fires].sum()
    return float(both / (fires.sum() + presence.sum() - both))


def cosine(activations: np.ndarray, presence: np.ndarray) -> float:
    """Cosine of activations and presence as they are: −1 to 1; 0 where one of them is 0 everywhere."""
    a, c = activations.astype(np.float64), presence.astype(np.float64)
    lengths = float(np.linalg.norm(a) * np.linalg.norm(c))
    return float(a @ c) / lengths if lengths else 0.0


def correlation(activations: np.ndarray, presence: np.ndarray) -> float:
    """Pearson correlation of activations and presence: −1 to 1; 0 where one of them is constant."""
    return cosine(activations - activations.astype(np.float64).mean(), presence - presence.astype(np.float64).mean())


def auprc(activations: np.ndarray, presence: np.ndarray, top: float) -> float:
    """Area under precision and recall of presence, for the images with the highest activations; 0 to 1."""
    return average_precision(presence, top_share(activations, top))


def presence_scores(top: float) -> dict[str, Score]:
    """The five scores as functions of activations and presence.

    Args:
        top: Share of the images that count as exciting the unit.
    """
    return {
        "f1": partial(f1, top=top),
        "iou": partial(iou, top=top),
        "correlation": correlation,
        "cosine": cosine,
        "auprc": partial(auprc, top=top),
    }


def score_presence(activations: np.ndarray, use: np.ndarray, presence: np.ndarray, top: float) -> dict[str, np.ndarray]:
    """Scores some units' descriptions by :data:`METRICS`.

    Args:
        activations: float (N, B), NaN where there is none.
        use: bool (N, B), which entries to use.
        presence: (N, B), the presence of what each unit's description names.
        top: Share of the images that count as exciting the unit.

    Returns:
        Metric → float64 (B,); NaN for a unit whose activation never changes, and where presence is no probability.
    """
    measures = {name: measure for name, measure in presence_scores(top).items() if name in METRICS}
    scores = {name: np.full(activations.shape[1], np.nan) for name in measures}
    for column in range(activations.shape[1]):
        chosen = use[:, column]
        a, c = activations[chosen, column], presence[chosen, column].astype(np.float64)
        if not len(a) or a.min() == a.max() or c.min() < -1e-6 or c.max() > 1 + 1e-6:
            continue
        for name, measure in measures.items():
            scores[name][column] = measure(a, c)
    return scores
