"""Clarity, polysemanticity and redundancy on exemplars whose meanings are known."""

from __future__ import annotations

import numpy as np
import pytest

from milan_ray.scoring.clarity import clarity, polysemanticity, redundancy, two_means


def around(direction: int, count: int, noise: float = 0.05, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(0, noise, (count, 8))
    vectors[:, direction] += 1
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_clarity_is_the_mean_cosine_of_two_exemplars():
    vectors = around(0, 6, 0.5)
    cosines = vectors @ vectors.T
    assert clarity(vectors) == pytest.approx(cosines[~np.eye(6, dtype=bool)].mean())
    assert clarity(np.repeat(vectors[:1], 5, axis=0)) == pytest.approx(1)
    assert clarity(np.eye(8)) == pytest.approx(0) and np.isnan(clarity(vectors[:1]))


def test_two_meanings_are_told_from_one_and_from_an_outlier():
    one, two = around(0, 10), np.concatenate([around(0, 5), around(1, 5, seed=1)])
    outlier = np.concatenate([around(0, 9), around(1, 1, seed=1)])
    assert polysemanticity(two) == pytest.approx(1, abs=0.1)
    assert polysemanticity(one) < 0.05
    assert polysemanticity(outlier) < 0.05
    assert polysemanticity(two[::-1]) == pytest.approx(polysemanticity(two))
    assert two_means(two).tolist() == [0] * 5 + [1] * 5
    assert polysemanticity(np.repeat(one[:1], 4, axis=0)) == pytest.approx(0) and np.isnan(polysemanticity(one[:1]))


def test_redundancy_is_the_nearest_other_unit():
    means = np.array([[1, 0, 0], [2, 0.2, 0], [0, 0, 3]])
    found = redundancy(means)
    assert found[0] == found[1] == pytest.approx(2 / np.hypot(2, 0.2)) and found[2] == pytest.approx(0)
    assert np.isnan(redundancy(means[:1])).all()
