from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from milan_ray.scoring.auroc import auroc
from milan_ray.scoring.directions import best_cosines, best_features, both_signs, recovered

TRUE = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.6, 0.8]])


def turned(degrees: float) -> np.ndarray:
    """The first true direction, turned towards the third axis."""
    return np.array([[np.cos(np.radians(degrees)), 0.0, np.sin(np.radians(degrees))]])


def test_recovered_counts_true_directions_by_hand() -> None:
    assert recovered(TRUE, TRUE) == 1
    assert recovered(5 * TRUE[:1], TRUE) == pytest.approx(1 / 3)  # length does not matter
    assert recovered(-TRUE, TRUE) == 0  # its sign does
    assert recovered(both_signs(-TRUE), TRUE) == 1
    assert recovered(np.eye(3), TRUE) == pytest.approx(2 / 3)  # .8 is not above .9
    assert recovered(np.eye(3), TRUE, threshold=0.75) == 1
    assert recovered(turned(25), TRUE[:1]) == 1 and recovered(turned(26), TRUE[:1]) == 0  # cos 25.8° = .9


def test_recovered_one_found_direction_may_match_several() -> None:
    near = np.array([[1.0, 0.0], [1.0, 0.1]])
    assert recovered(np.array([[1.0, 0.05]]), near) == 1


def test_recovered_needs_a_cosine_above_the_threshold() -> None:
    assert recovered(np.array([[0.6, 0.8]]), np.array([[1.0, 0.0]]), threshold=0.6) == 0


def test_dead_features_match_nothing() -> None:
    assert recovered(np.zeros((4, 3)), TRUE) == 0
    assert best_cosines(np.zeros((0, 3)), TRUE).tolist() == [-1, -1, -1]
    assert recovered(np.concatenate([np.zeros((1, 3)), TRUE]), TRUE) == 1


@given(
    arrays(np.float32, (4, 3), elements=st.integers(-3, 3).map(float)),
    arrays(np.float32, (2, 3), elements=st.integers(1, 3).map(float)),
)
def test_best_cosines_equal_the_definition(found: np.ndarray, true: np.ndarray) -> None:
    wanted = []
    for direction in true.astype(float):
        lengths = [np.linalg.norm(row) for row in found]
        cosines = [row @ direction / n / np.linalg.norm(direction) for row, n in zip(found, lengths, strict=True) if n]
        wanted.append(max(cosines, default=-1.0))
    np.testing.assert_allclose(best_cosines(found, true), wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("found", "true", "message"),
    [
        (np.ones((2, 3)), np.ones((2, 4)), "not of one layer"),
        (np.ones(3), np.ones((1, 3)), "not of one layer"),
        (np.full((1, 3), np.nan), np.ones((1, 3)), "not finite"),
        (np.ones((1, 3)), np.array([[0.0, 0.0, np.inf]]), "not finite"),
        (np.ones((1, 3)), np.zeros((1, 3)), "is zero"),
        (np.ones((1, 3)), np.ones((0, 3)), "no directions"),
    ],
)
def test_recovered_refuses_what_has_no_answer(found: np.ndarray, true: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recovered(found, true)


def test_best_features_are_chosen_on_some_items_and_judged_on_others() -> None:
    shown = np.array([[1, 0, 1], [1, 0, 1], [0, 1, 1], [0, 1, 1]], dtype=bool)
    activations = np.array([[3, 0, 1], [2, 1, 0], [1, 2, 1], [0, 3, 0]], dtype=np.float32)
    others = np.array([[0, 0, 1], [3, 1, 0], [1, 2, 1], [2, 3, 0]], dtype=np.float32)
    best = best_features(activations, shown, others, shown)
    assert best.feature.tolist() == [0, 1, -1]
    np.testing.assert_array_equal(best.auroc, [0.5, 1.0, np.nan])
    np.testing.assert_array_equal(best.auroc[:2], auroc(others, shown)[[0, 1], [0, 1]])


def test_best_features_of_noise_are_at_chance_where_they_did_not_choose() -> None:
    draw = np.random.RandomState(0)
    noise, other = draw.rand(100, 500), draw.rand(100, 500)
    shown, judged = draw.rand(100, 8) < 0.3, draw.rand(100, 8) < 0.3
    assert best_features(noise, shown, noise, shown).auroc.mean() > 0.65
    assert abs(best_features(noise, shown, other, judged).auroc.mean() - 0.5) < 0.06


def test_best_features_refuse_other_features() -> None:
    with pytest.raises(ValueError, match="3 features choose but 2 are judged"):
        best_features(np.ones((4, 3)), np.ones((4, 1), bool), np.ones((4, 2)), np.ones((4, 1), bool))
