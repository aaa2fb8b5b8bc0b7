"""Scores of a description as a detector, against sets and formulas written out, and by their own tests of labels."""

from __future__ import annotations

import numpy as np
import pytest

from milan_ray.scoring.presence import METRICS, presence_scores, score_presence
from milan_ray.scoring.score_sanity import EXTRA, MISSING, sanity

A = np.array([5.0, 4, 3, 2, 1, 0, -1, -2, -3, -4])
C = np.array([1.0, 0, 1, 0, 0, 1, 0, 0, 0, 0])


def test_scores_equal_sets_counted_by_hand():
    scores = {name: measure(A, C) for name, measure in presence_scores(0.3).items()}
    fires, shows = {0, 1, 2}, {0, 2, 5}
    precision, recall = len(fires & shows) / len(shows), len(fires & shows) / len(fires)
    assert scores["f1"] == pytest.approx(2 * precision * recall / (precision + recall))
    assert scores["iou"] == pytest.approx(len(fires & shows) / len(fires | shows))
    assert scores["correlation"] == pytest.approx(np.corrcoef(A, C)[0, 1])
    assert scores["cosine"] == pytest.approx(sum(A * C) / np.sqrt(sum(A**2) * sum(C**2)))
    assert scores["auprc"] == pytest.approx(2 / 3 * 2 / 3 + 1 / 3 * 3 / 10)


def test_probabilities_count_by_their_size():
    half = presence_scores(0.3)
    assert half["f1"](A, C / 2) == pytest.approx(2 * 1.0 / (3 + 1.5))
    assert half["iou"](A, C / 2) == pytest.approx(1.0 / (3 + 1.5 - 1.0))


def test_units_are_scored_on_their_own_images_and_need_probabilities():
    activations, presence = np.stack([A, A, A * 0, A], axis=1), np.stack([C, C, C, C * 3 - 1], axis=1)
    use = np.ones(activations.shape, bool)
    use[0, 1] = False
    scores = score_presence(activations, use, presence, 0.3)
    assert tuple(scores) == METRICS
    one = presence_scores(0.3)
    for name, values in scores.items():
        assert values[0] == pytest.approx(one[name](A, C)) and values[1] == pytest.approx(one[name](A[1:], C[1:]))
        assert np.isnan(values[2:]).all()


def test_all_five_pass_the_tests_of_labels():
    rng = np.random.default_rng(0)
    shown = rng.random((3000, 20)) < rng.uniform(0.05, 0.2, 20)
    activations = 3 * shown + rng.normal(size=shown.shape)
    table = sanity("sanity", activations, shown, presence_scores(0.1), samples=50).to_pylist()
    judged = {(row["system"], row["metric"]): row["value"] for row in table}
    for metric in ("f1", "iou", "correlation", "cosine", "auprc"):
        assert judged[MISSING, metric] >= 0.9 and judged[EXTRA, metric] >= 0.9, metric
