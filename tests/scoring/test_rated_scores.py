"""Scores from ratings: by hand, against replicated images, and unbiased with the stated coverage in simulation."""

from __future__ import annotations

import numpy as np
import pytest

from milan_ray.scoring.rated_scores import METRICS, estimate, rated_scores
from milan_ray.scoring.raters import Ratings, sample_posterior
from milan_ray.scoring.rating_draws import MIXTURES, draw, features, prior_features, proposal


def naive(activations: np.ndarray, top: np.ndarray, shown: np.ndarray) -> list[float]:
    """The scores of single images, each counted once."""
    both = (top & shown).sum()
    correlation = np.corrcoef(activations, shown)[0, 1]
    precision, recall = both / top.sum(), both / shown.sum()
    return [correlation, precision, recall, 2 * precision * recall / (precision + recall), both / (top | shown).sum()]


@pytest.mark.parametrize("seed", range(4))
def test_weights_count_like_repeated_images(seed: int) -> None:
    rng = np.random.default_rng(seed)
    activations = rng.normal(size=50)
    top, shown = activations > 0.5, activations + rng.normal(size=50) > 0.3
    times = rng.integers(1, 5, 50)
    repeated = np.repeat(np.arange(50), times)
    weights = (times / times.sum())[None]
    expected = naive(activations[repeated], top[repeated], shown[repeated])
    np.testing.assert_allclose(rated_scores(weights, activations, top, shown)[0], expected)


def test_scores_without_anything_to_count_are_zero() -> None:
    weights, activations = np.full((1, 4), 0.25), np.arange(4.0)
    nothing, everything = np.zeros(4), np.ones(4)
    assert not rated_scores(weights, activations, activations > 2, nothing).any()
    scores = dict(zip(METRICS, rated_scores(weights, activations, activations > 2, everything)[0], strict=True))
    assert scores["correlation"] == 0 and scores["precision"] == 1 and scores["recall"] == 0.25
    assert not rated_scores(weights, np.ones(4), np.zeros(4, bool), np.array([1, 0, 1, 0.5]))[0].any()


SENSITIVITY, SPECIFICITY = np.array([0.95, 0.8, 0.75, 0.9]), np.array([0.9, 0.97, 0.99, 0.95])


class Simulation:
    """Descriptions of units with known truth; ``campaign`` draws, rates and estimates."""

    def __init__(self, descriptions: int = 12, images: int = 1200) -> None:
        rng = np.random.default_rng(0)
        shown = rng.random((descriptions, images)) < np.linspace(0.05, 0.4, descriptions)[:, None]
        self.activations = rng.gamma(0.7, size=shown.shape) + shown * np.linspace(0.2, 3, descriptions)[:, None]
        self.shown = shown
        self.top = np.stack([row >= np.sort(row)[-24] for row in self.activations])
        self.truth = np.array([naive(*each) for each in zip(self.activations, self.top, self.shown, strict=True)])

    def campaign(self, seed: int, sampling: str, draws: int = 80) -> np.ndarray:
        rng = np.random.default_rng(seed)
        drawn, priors, owners, truths, items = [], [], [], [], 0
        for number, activations in enumerate(self.activations):
            q = proposal(activations, None, MIXTURES[sampling])
            index = draw(q, draws, rng)
            distinct, place = np.unique(index, return_inverse=True)
            drawn.append((index, place + items, 1 / (len(q) * q[index])))
            priors.append(prior_features(activations, None)[distinct])
            owners.append(np.full(len(distinct), number))
            truths.append(self.shown[number, distinct])
            items += len(distinct)
        item = np.repeat(np.arange(items), 2)
        rater = np.argsort(rng.random((items, 4)), axis=1)[:, :2].ravel()
        right = np.concatenate(truths)[item]
        yes = rng.random(len(item)) < np.where(right, SENSITIVITY[rater], 1 - SPECIFICITY[rater])
        posterior = sample_posterior(
            Ratings(item, rater, yes), np.concatenate(priors), np.concatenate(owners), 4, rng, sweeps=200
        )
        return np.array(
            [
                estimate(
                    weights, features(activations, top, None)[index], activations[index], top[index],
                    posterior.presence[:, place], posterior.shown[:, place], rng,
                )
                for activations, top, (index, place, weights) in zip(self.activations, self.top, drawn, strict=True)
            ]
        )  # fmt: skip


@pytest.fixture(scope="module")
def simulation() -> Simulation:
    return Simulation()


@pytest.fixture(scope="module")
def estimates(simulation: Simulation) -> dict[str, np.ndarray]:
    """Sampling → (campaigns, descriptions, scores, 3)."""
    return {
        sampling: np.stack([simulation.campaign(seed, sampling) for seed in range(20)])
        for sampling in ("importance", "uniform")
    }


def test_importance_is_unbiased_within_its_standard_error(simulation, estimates) -> None:
    values = estimates["importance"][..., 0]
    deviation = np.sqrt((values.std(axis=0, ddof=1) ** 2).mean(axis=0))
    bias = (values.mean(axis=0) - simulation.truth).mean(axis=0)
    assert (np.abs(bias) < 0.3 * deviation).all(), (bias, deviation)


def test_intervals_cover_the_truth_as_often_as_they_say(simulation, estimates) -> None:
    low, high = estimates["importance"][..., 1], estimates["importance"][..., 2]
    covered = ((low <= simulation.truth) & (simulation.truth <= high)).mean(axis=(0, 1))
    assert (covered > 0.9).all(), covered


def test_importance_needs_far_fewer_ratings_where_images_that_excite_are_rare(estimates) -> None:
    deviation = {name: values[..., 0].std(axis=0, ddof=1) for name, values in estimates.items()}
    variance = {name: (each**2).mean(axis=0) for name, each in deviation.items()}
    gain = dict(zip(METRICS, variance["uniform"] / variance["importance"], strict=True))
    # Recall, F1 and IoU of descriptions that are rarely true depend on how often they are, which no activation tells.
    assert gain["precision"] > 5 and min(gain[metric] for metric in ("recall", "f1", "iou")) > 2, gain
    assert gain["correlation"] > 1.5, gain
