"""Scores judged by what they make of labels that are known to be worse than the truth."""

from __future__ import annotations

import numpy as np
import pytest

from milan_ray.scoring.score_sanity import EXTRA, MISSING, extra_labels, missing_labels, sanity


@pytest.fixture(scope="module")
def judged() -> dict[tuple[str, str], float]:
    """Twenty units that fire on their concept, as planted units do, and on little else."""
    rng = np.random.default_rng(0)
    shown = rng.random((3000, 20)) < rng.uniform(0.05, 0.2, 20)
    activations = 3 * shown + rng.normal(size=shown.shape)
    table = sanity("sanity", activations, shown, samples=50)
    return {(row["system"], row["metric"]): row["value"] for row in table.to_pylist()}


def test_worse_labels_are_what_they_say():
    rng = np.random.default_rng(1)
    shown = np.arange(100) < 20
    fewer, more = missing_labels(shown, rng), extra_labels(shown, rng)
    assert fewer.sum() == 10 and not (fewer & ~shown).any()
    assert more.sum() == 40 and not (shown & ~more).any()


def test_correlation_sees_both_and_retrieval_is_blind_to_what_is_missing(judged):
    for system in (MISSING, EXTRA):
        assert judged[system, "simulation"] == 1
    for metric in ("retrieval-auc", "retrieval-mad"):
        assert judged[EXTRA, metric] == 1
        assert judged[MISSING, metric] < 0.7  # chance: other images that show it
    assert judged[EXTRA, "auprc"] == 1


def test_units_whose_concept_tells_nothing_are_left_out():
    shown = np.stack([np.ones(30, bool), np.zeros(30, bool), np.arange(30) < 9], axis=1)
    activations = np.random.default_rng(0).normal(size=shown.shape)
    assert set(sanity("sanity", activations, shown, samples=5)["n"].to_pylist()) == {1}
    with pytest.raises(ValueError, match="no unit's concept shows"):
        sanity("sanity", activations[:, :2], shown[:, :2], samples=5)
