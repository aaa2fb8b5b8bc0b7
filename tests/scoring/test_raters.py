"""Raters with errors of their own: rates are recovered, probabilities are calibrated, bad raters count for nothing."""

from __future__ import annotations

import numpy as np
import pytest

from milan_ray.scoring.raters import Ratings, majority, sample_posterior

SENSITIVITY = np.array([0.95, 0.75, 0.85, 0.9])
SPECIFICITY = np.array([0.9, 0.99, 0.95, 0.97])


def simulated(
    rng: np.random.Generator, items: int = 1500, each: int = 2, descriptions: int = 6
) -> tuple[Ratings, np.ndarray, np.ndarray, np.ndarray]:
    """Ratings, features, description of each item, and truth."""
    description = np.arange(items) % descriptions
    known = rng.normal(size=(items, 2))
    slope = np.linspace(0.5, 2, descriptions)[description]
    truth = rng.random(items) < 1 / (1 + np.exp(1 - slope * known[:, 0]))
    item = np.repeat(np.arange(items), each)
    rater = np.argsort(rng.random((items, 4)), axis=1)[:, :each].ravel()
    yes = rng.random(len(item)) < np.where(truth[item], SENSITIVITY[rater], 1 - SPECIFICITY[rater])
    return Ratings(item, rater, yes), known, description, truth


def test_rates_of_errors_are_recovered() -> None:
    rng = np.random.default_rng(0)
    ratings, known, description, _ = simulated(rng)
    posterior = sample_posterior(ratings, known, description, 4, rng)
    for found, true in ((posterior.sensitivity, SENSITIVITY), (posterior.specificity, SPECIFICITY)):
        low, high = np.percentile(found, [0.5, 99.5], axis=0)
        assert ((low <= true) & (true <= high)).all()
        assert np.abs(found.mean(0) - true).max() < 0.06


@pytest.mark.parametrize("seed", range(3))
def test_probabilities_of_presence_are_calibrated_and_better_than_the_majority(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ratings, known, description, truth = simulated(rng)
    probability = sample_posterior(ratings, known, description, 4, rng).presence.mean(0)
    for low in (0.0, 0.2, 0.8):
        chosen = (probability >= low) & (probability <= low + 0.2)
        error = np.sqrt((probability[chosen] * (1 - probability[chosen])).sum()) / chosen.sum()
        assert abs(probability[chosen].mean() - truth[chosen].mean()) < 4 * error + 0.01
    wrong = ((probability > 0.5) != truth).mean()
    assert wrong < 0.75 * np.abs(majority(ratings, len(truth)) - truth).mean()  # draws count as half wrong


def test_presence_samples_have_the_probabilities_beside_them() -> None:
    rng = np.random.default_rng(3)
    ratings, known, description, _ = simulated(rng, items=400)
    posterior = sample_posterior(ratings, known, description, 4, rng)
    difference = posterior.shown.mean(0) - posterior.presence.mean(0)
    assert np.abs(difference).max() < 5 * 0.5 / np.sqrt(len(posterior.shown))


def test_a_rater_who_guesses_changes_next_to_nothing() -> None:
    rng = np.random.default_rng(4)
    ratings, known, description, truth = simulated(rng, each=3)
    items = len(truth)
    guesses = Ratings(
        np.concatenate([ratings.item, np.arange(items)]),
        np.concatenate([ratings.rater, np.full(items, 4)]),
        np.concatenate([ratings.yes, rng.random(items) < 0.5]),
    )
    without = sample_posterior(ratings, known, description, 5, rng).presence.mean(0)
    with_guesses = sample_posterior(guesses, known, description, 5, rng).presence.mean(0)
    assert np.abs(without - with_guesses).mean() < 0.02
    assert (majority(ratings, items) != majority(guesses, items)).mean() > 0.05


def test_features_of_separated_items_do_not_break_the_chain() -> None:
    rng = np.random.default_rng(5)
    known = np.linspace(-3, 3, 60)[:, None]
    item = np.repeat(np.arange(60), 3)
    ratings = Ratings(item, np.tile(np.arange(3), 60), known[item, 0] > 0)
    presence = sample_posterior(ratings, known, np.zeros(60, int), 3, rng).presence
    assert np.isfinite(presence).all()
    assert presence.mean(0)[:30].max() < 0.3 and presence.mean(0)[30:].min() > 0.7


def test_majority_by_hand() -> None:
    ratings = Ratings(np.array([0, 0, 0, 1, 1, 2]), np.array([0, 1, 2, 0, 1, 0]), np.array([1, 1, 0, 1, 0, 0], bool))
    np.testing.assert_array_equal(majority(ratings, 4), [1, 0.5, 0, 0.5])
