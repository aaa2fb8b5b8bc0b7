"""Draws of images to rate: distributions against naive ones, and weights that make estimates those of the probe."""

from __future__ import annotations

import numpy as np
import pytest

from milan_ray.scoring.rating_draws import (
    MIXTURES,
    UNIFORM_SHARE,
    Mixture,
    by_rank,
    calibrated,
    draw,
    features,
    prior_features,
    proposal,
    standardised,
)


def naive_by_rank(values: np.ndarray) -> np.ndarray:
    """1 / rank, averaged over equal values."""
    order = sorted(range(len(values)), key=lambda i: -values[i])
    mass = np.empty(len(values))
    for rank, image in enumerate(order, 1):
        mass[image] = 1 / rank
    mass = np.array([mass[values == value].mean() for value in values])
    return mass / mass.sum()


@pytest.mark.parametrize("seed", range(5))
def test_by_rank_is_one_over_rank_and_equal_values_share(seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 8, 40).astype(np.float32)
    np.testing.assert_allclose(by_rank(values), naive_by_rank(values))
    assert by_rank(np.zeros(7)) == pytest.approx(np.full(7, 1 / 7))


def test_by_rank_gives_every_doubling_of_rank_about_the_same() -> None:
    mass = by_rank(-np.arange(4096.0))
    shares = [mass[2**step : 2 ** (step + 1)].sum() for step in range(4, 12)]
    assert max(shares) < 1.05 * min(shares)


def test_proposal_bounds_every_weight_and_prefers_what_it_should() -> None:
    rng = np.random.default_rng(0)
    activations, fit = rng.gamma(0.3, size=1000), rng.normal(size=1000)
    mixture = MIXTURES["importance"]
    for near in (None, fit):
        q = proposal(activations, near, mixture)
        assert q.sum() == pytest.approx(1) and (1 / (1000 * q)).max() <= 1 / mixture.uniform + 1e-9
    with_judge, without = proposal(activations, fit, mixture), proposal(activations, None, mixture)
    best = np.argmax(fit)
    assert with_judge[best] > 10 / 1000 > without[best]
    assert without[np.argmax(activations)] > with_judge[np.argmax(activations)] > 50 / 1000
    np.testing.assert_allclose(proposal(activations, fit, MIXTURES["uniform"]), 1 / 1000)
    assert proposal(np.ones(10), None, mixture) == pytest.approx(np.full(10, 0.1))


@pytest.mark.parametrize("shares", [(0.5, 0.5, 0.0), (0.5, 0.6, -0.1), (0.5, 0.2, 0.2), (0.95, 0.0, 0.05)])
def test_mixtures_that_do_not_bound_weights_are_refused(shares: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="must sum to 1"):
        Mixture(*shares)
    assert Mixture(0.9, 0.0, UNIFORM_SHARE)


def test_draws_have_their_probabilities_and_depend_on_the_seed_alone() -> None:
    q = np.array([0.5, 0.0, 0.3, 0.2])
    drawn = draw(q, 20_000, np.random.default_rng(0))
    assert (np.diff(drawn) >= 0).all()
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 20_000, q, atol=4 * np.sqrt(0.25 / 20_000))
    np.testing.assert_array_equal(drawn, draw(q, 20_000, np.random.default_rng(0)))


@pytest.mark.parametrize("seed", range(4))
def test_weighted_means_are_unbiased_for_any_quantity(seed: int) -> None:
    rng = np.random.default_rng(seed)
    activations, fit = rng.gamma(0.5, size=500), rng.normal(size=500)
    quantity = (activations + rng.normal(size=500) > 1).astype(float)
    q = proposal(activations, fit if seed % 2 else None, MIXTURES["importance"])
    estimates = []
    for _ in range(800):
        drawn = draw(q, 40, rng)
        estimates.append((quantity[drawn] / (500 * q[drawn])).mean())
    error = np.std(estimates) / np.sqrt(800)
    assert abs(np.mean(estimates) - quantity.mean()) < 4 * error


def test_calibrated_weights_have_the_known_means_and_change_little() -> None:
    rng = np.random.default_rng(1)
    activations, fit = rng.gamma(0.5, size=800), rng.normal(size=800)
    top = activations >= np.quantile(activations, 0.95)
    q = proposal(activations, fit, MIXTURES["importance"])
    known = features(activations, top, fit)
    np.testing.assert_allclose(known.mean(0), 0, atol=1e-12)
    drawn = draw(q, 400, rng)
    own = 1 / (800 * q[drawn])
    weights = calibrated(own[None], known[drawn])[0]
    assert weights.sum() == pytest.approx(1) and (weights >= 0).all()
    before = np.abs(own / own.sum() @ known[drawn])
    assert before.max() > 0.05
    np.testing.assert_allclose(weights @ known[drawn], 0, atol=1e-6)
    assert np.corrcoef(weights, own)[0, 1] > 0.95
    # The weighted mean of anything linear in the features is that of the whole probe.
    linear = 3 + known @ np.arange(6)
    assert weights @ linear[drawn] == pytest.approx(linear.mean(), abs=1e-5)
    np.testing.assert_allclose(calibrated(own[None], np.zeros((400, 0)))[0], own / own.sum())


def test_calibration_reduces_the_error_of_what_the_features_explain() -> None:
    rng = np.random.default_rng(2)
    activations = rng.gamma(0.5, size=800)
    quantity = activations + 0.1 * rng.normal(size=800)
    top = activations >= np.quantile(activations, 0.99)
    q, known = proposal(activations, None, MIXTURES["importance"]), features(activations, top, None)
    errors = []
    for _ in range(200):
        drawn = draw(q, 60, rng)
        own = 1 / (800 * q[drawn][None])
        errors.append(
            [w[0] @ quantity[drawn] - quantity.mean() for w in (own / own.sum(), calibrated(own, known[drawn]))]
        )
    plain, with_features = np.std(errors, axis=0)
    assert with_features < plain / 3


def test_features_without_variation_are_zero_and_a_judge_adds_some() -> None:
    assert not standardised(np.full(5, 3.0)).any()
    same = features(np.ones(20), np.zeros(20, bool), None)
    assert same.shape == (20, 3) and not same.any()
    activations, fit = np.arange(20.0), np.arange(20.0)[::-1]
    assert features(activations, activations > 18, fit).shape == (20, 6)
    assert prior_features(activations, None).shape == (20, 3) and prior_features(activations, fit).shape == (20, 4)
    np.testing.assert_allclose(prior_features(activations, None), prior_features(np.exp(activations), None))
    np.testing.assert_allclose(calibrated(np.ones((1, 20)), same), 1 / 20)
