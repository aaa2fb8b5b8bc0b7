"""Verdicts: p-values, false-discovery rates, calibration and the rule, against obvious references and by simulation."""

from __future__ import annotations

import numpy as np
import pytest

from milan_ray.schema.verdicts import SUPPORTED
from milan_ray.scoring.verdicts import (
    HALF,
    NOTHING,
    PARTLY,
    UNSUPPORTED,
    Calibration,
    Evidence,
    calibrate,
    decide,
    likeness_p,
    permutation_p,
    standardised,
    weigh,
)


def layer(
    rng: np.random.Generator, units: int = 40, concepts: int = 40, images: int = 400
) -> tuple[np.ndarray, np.ndarray]:
    """Correlations of units with texts, one concept each, and the concept of each unit."""
    shown = rng.random((images, concepts)) < 0.1
    of = rng.permutation(np.arange(units) % concepts)
    activations = 1.5 * shown[:, of] + rng.normal(size=(images, units))
    return np.corrcoef(activations.T, shown.T)[:units, units:], of


def naive(scores: np.ndarray, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Excess and p, unit by unit and pair by pair, as docs/verdicts.md says them."""
    units, texts = scores.shape
    rows = np.empty(scores.shape)
    for u in range(units):
        of_layer = [scores[u, own[v]] for v in range(units)]
        rows[u] = (scores[u] - np.mean(of_layer)) / np.std(of_layer)
    table = np.empty(scores.shape)
    for t in range(texts):
        others = [rows[u, t] for u in range(units) if own[u] != t]
        table[:, t] = (rows[:, t] - np.mean(others)) / np.std(others)
    null = [table[u, own[v]] for u in range(units) for v in range(units) if own[u] != own[v]]
    excess = np.array([table[u, own[u]] for u in range(units)])
    return excess, np.array([(1 + sum(other >= one for other in null)) / (1 + len(null)) for one in excess])


def test_evidence_equals_pairs_counted_one_by_one():
    rng = np.random.default_rng(0)
    scores, own = rng.normal(size=(15, 7)), rng.integers(7, size=15)
    excess, p = naive(scores, own)
    evidence = weigh(scores, own)
    np.testing.assert_allclose(evidence.excess, excess)
    np.testing.assert_allclose(evidence.p, p)
    np.testing.assert_allclose(evidence.score, scores[np.arange(15), own])
    used = np.unique(own)
    for unit in range(15):
        others = [scores[unit, own[v]] for v in range(15) if own[v] != own[unit]]
        assert evidence.others[unit] == pytest.approx(np.mean(others))
        assert evidence.best[unit] == max(scores[unit, t] for t in used if t != own[unit])
    ranked = np.sort(p)
    for unit in range(15):  # Benjamini and Hochberg: the lowest rate at which the unit is among the discoveries
        assert evidence.q[unit] == pytest.approx(
            min(1, *(len(p) * ranked[k] / (k + 1) for k in range(15) if ranked[k] >= p[unit]))
        )


def test_order_of_units_and_texts_changes_nothing():
    rng = np.random.default_rng(1)
    scores, own = layer(rng)
    evidence = weigh(scores, own)
    units, texts = rng.permutation(len(own)), rng.permutation(scores.shape[1])
    other = weigh(scores[units][:, texts], np.argsort(texts)[own[units]])
    for name in Evidence._fields:
        np.testing.assert_allclose(getattr(other, name), getattr(evidence, name)[units], rtol=1e-9)


def test_permutation_p_counts_itself_and_ties():
    p = permutation_p(np.array([5.0, 2.0, 0.0, np.nan]), np.array([1.0, 2.0, 3.0]), np.array([1, 2, 1]))
    np.testing.assert_array_equal(p[:3], [1 / 5, 4 / 5, 1])
    assert np.isnan(p[3])


def test_p_is_uniform_where_descriptions_are_of_nothing():
    p = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        scores = rng.normal(size=(30, 30)) * rng.uniform(0.5, 2, (30, 1)) + rng.normal(size=(30, 1))
        p.append(weigh(scores + rng.normal(size=30), rng.integers(30, size=30)).p)
    flat = np.concatenate(p)
    for level in (0.01, 0.05, 0.1, 0.25, 0.5):
        assert abs((flat <= level).mean() - level) < 4 * np.sqrt(level * (1 - level) / len(flat)) + 0.005


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75, 1.0])
def test_false_discovery_rate_is_held_where_a_share_of_the_descriptions_is_shuffled(share):
    rates, power = [], []
    for seed in range(120):
        rng = np.random.default_rng(seed)
        scores, of = layer(rng)
        own, false = of.copy(), np.zeros(len(of), bool)
        chosen = rng.choice(len(of), round(share * len(of)), replace=False)
        own[chosen], false[chosen] = np.roll(of[chosen], 1), True
        found = weigh(scores, own).q <= 0.1
        rates.append((found & false).sum() / max(1, found.sum()))
        power.append((found & ~false).sum() / max(1, (~false).sum()))
    assert np.mean(rates) <= 0.1 + 2 * np.std(rates) / np.sqrt(len(rates))
    if share <= 0.5:
        assert np.mean(power) > 0.8


def test_one_description_for_all_supports_no_unit():
    scores = np.random.default_rng(0).normal(size=(20, 3)) + np.array([5, 0, 0])
    for own in (np.zeros(20, int), np.array([0] * 17 + [1, 1, 2])):
        evidence = weigh(scores, own)
        most = own == 0
        assert (evidence.p[most] == 1).all() and np.isnan(evidence.excess[most]).all()
        verdicts = decide(evidence, np.zeros(20, bool), np.full(20, np.nan))
        assert all(verdict == UNSUPPORTED and "fewer than 5 units" in why for verdict, why in np.array(verdicts)[most])


def test_many_units_of_one_concept_are_supported_against_units_of_others():
    rng = np.random.default_rng(3)
    scores, own = layer(rng, units=40, concepts=2)
    evidence = weigh(scores, own)
    assert (evidence.q <= 0.1).all()  # a half of all pairs of the layer say the same
    assert (evidence.excess == 100).all()  # of two texts, the other units' scores are equal but for their scale


def test_a_description_that_fits_all_units_supports_none():
    rng = np.random.default_rng(4)
    scores = 0.05 * rng.normal(size=(60, 2)) + np.array([0.6, 0.1])
    own = np.array([0] * 30 + [1] * 30)
    assert (weigh(scores, own).q > 0.1).mean() > 0.9


def test_standardised_is_nan_without_enough_other_units():
    values = standardised(np.random.default_rng(0).normal(size=(9, 2)), np.array([0] * 5 + [1] * 4))
    assert np.isnan(values[:, 0]).all() and np.isfinite(values[:, 1]).all()


def evidence(score: float, best: float, q: float) -> Evidence:
    return Evidence(*(np.array([value]) for value in (score, 0.0, best, 3.0, q, q)))


@pytest.mark.parametrize(
    ("about", "silent", "unlike", "verdict"),
    [
        (evidence(0.5, 0.6, 0.1), False, 0.5, SUPPORTED),
        (evidence(0.5, 0.5 / HALF + 0.01, 0.1), False, 0.5, PARTLY),
        (evidence(0.5, 0.6, 0.11), False, 0.1, UNSUPPORTED),
        (evidence(0.5, 0.6, 0.11), False, np.nan, UNSUPPORTED),
        (evidence(0.5, 0.6, 0.11), False, 0.11, NOTHING),
        (evidence(0.5, 0.6, 0.01), True, 0.01, NOTHING),
        (evidence(np.nan, np.nan, np.nan), False, 0.01, NOTHING),
        (evidence(0.5, np.nan, 0.01), False, 0.01, SUPPORTED),
        (evidence(-0.05, -0.258, 0.003), False, 0.01, UNSUPPORTED),
        (evidence(-0.1, -0.1, 0.003), False, 0.01, UNSUPPORTED),
    ],
)
def test_rule_of_verdicts(about, silent, unlike, verdict):
    ((given, why),) = decide(about, np.array([silent]), np.array([unlike]))
    assert given == verdict and why


def test_rows_without_scores_have_no_evidence_and_change_no_other():
    scores, own = layer(np.random.default_rng(5))
    plain = weigh(scores[1:], own[1:])
    scores[0] = np.nan
    evidence = weigh(scores, own)
    for name in Evidence._fields:
        values = getattr(evidence, name)
        assert np.isnan(values[0])
        np.testing.assert_allclose(values[1:], getattr(plain, name))


def test_likeness_of_random_images_is_uniform_and_of_equal_ones_low():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(400, 8))
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    sets = [images[rng.choice(400, 5, replace=False)] for _ in range(400)]
    sets.append(np.repeat(images[:1], 5, axis=0))
    likeness = np.array([np.mean([a @ b for i, a in enumerate(s) for b in s[:i]]) for s in sets])
    p = likeness_p(likeness, images, 5)
    assert abs((p[:400] <= 0.1).mean() - 0.1) < 0.05 and p[400] == 1 / 1000
    assert np.isnan(likeness_p(likeness, images, 1)).all()
    assert np.isnan(likeness_p(likeness, images[:4], 5)).all()


def test_calibrated_probabilities_are_shares_of_true_ones():
    rng = np.random.default_rng(0)
    true = rng.random(20_000) < 0.5
    excess = rng.normal(size=20_000) + 2 * true  # log odds: 2·excess − 2
    curve = calibrate(excess, true)
    assert curve.intercept == pytest.approx(-2, abs=0.1) and curve.slope == pytest.approx(2, abs=0.1)
    fresh = rng.random(20_000) < 0.5
    p = curve(rng.normal(size=20_000) + 2 * fresh)
    for low in np.arange(0, 1, 0.2):
        bin_ = (p >= low) & (p < low + 0.2)
        assert fresh[bin_].mean() == pytest.approx(p[bin_].mean(), abs=0.05)


def test_calibration_weighs_true_and_false_the_same_and_stays_finite():
    rng = np.random.default_rng(1)
    few, many = rng.normal(size=300) + 2, rng.normal(size=30_000)
    curve = calibrate(np.append(few, many), np.arange(30_300) < 300)
    assert curve(np.array([1.0]))[0] == pytest.approx(0.5, abs=0.06)
    apart = calibrate(np.array([0.0, 0, 0, 9, 9, 9, np.nan]), np.array([0, 0, 0, 1, 1, 1, 0], bool))
    assert np.isfinite([apart.intercept, apart.slope]).all() and apart.slope > 0
    assert np.isnan(Calibration(0, 1)(np.array([np.nan]))[0])
    with pytest.raises(ValueError, match="others that are false"):
        calibrate(np.ones(3), np.ones(3, bool))
