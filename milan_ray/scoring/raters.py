"""Aggregates the ratings of several people, each with an own rate of errors (Dawid and Skene), by Gibbs sampling.

An **item** is an image with a description; whether the image shows what the description names is not known. How likely
it is before anybody looks is a logistic function of what is known of the image (activation, the judge's value), with
coefficients of its own for each description. A rater says yes with the own sensitivity where it shows, and no with the
own specificity where it does not; both have Beta priors and are learned from all items of all descriptions.

A constant share per description, with a Beta prior, would pull images of different activation towards each other: where
an image has one or two ratings, correlations come out too low.

Source: Dawid and Skene, *Maximum likelihood estimation of observer error-rates* (1979); priors as in Bayesian
aggregation of ratings of explanations (arXiv 2506.07985).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PRIOR = (4.0, 1.0)
"""Beta prior of sensitivity and of specificity, mean .8: most people are right most of the time."""

WIDTH = 2.5
"""Standard deviation of the coefficients' normal prior; features have standard deviation 1."""

SWEEPS, BURN_IN = 400, 100
"""Sweeps that are kept, and sweeps before them."""


@dataclass(frozen=True)
class Ratings:
    """Answers of raters.

    Attributes:
        item: int64 (M,), which item was rated.
        rater: int64 (M,), by whom.
        yes: bool (M,), whether the rater found what the description names.
    """

    item: np.ndarray
    rater: np.ndarray
    yes: np.ndarray


@dataclass(frozen=True)
class Posterior:
    """Samples of what the ratings leave open.

    Attributes:
        presence: Probability of each item in each sample, given the sample's coefficients and rates, float32 (S, I).
        shown: A sample of presence itself, bool (S, I).
        sensitivity: float64 (S, R).
        specificity: float64 (S, R).
    """

    presence: np.ndarray
    shown: np.ndarray
    sensitivity: np.ndarray
    specificity: np.ndarray


def sample_posterior(
    ratings: Ratings,
    known: np.ndarray,
    description: np.ndarray,
    raters: int,
    rng: np.random.Generator,
    sweeps: int = SWEEPS,
    burn_in: int = BURN_IN,
) -> Posterior:
    """Samples presence, coefficients and error rates given the ratings.

    Args:
        ratings: M answers about I items.
        known: Features of each item, standardised, (I, K).
        description: Description of each item, int64 (I,), 0 to D − 1.
        raters: Number of raters R.
        rng: Source of randomness.
        sweeps: Number of samples S.
        burn_in: Sweeps that are left out.

    Returns:
        The samples.
    """
    items = len(description)
    columns = np.concatenate([np.ones((items, 1)), known], axis=1)
    coefficients = np.zeros((int(description.max(initial=-1)) + 1, columns.shape[1]))
    present = majority(ratings, items) > 0.5
    result = Posterior(
        np.empty((sweeps, items), np.float32),
        np.empty((sweeps, items), bool),
        np.empty((sweeps, raters)),
        np.empty((sweeps, raters)),
    )
    for sweep in range(-burn_in, sweeps):
        coefficients = _coefficients(coefficients, columns, description, present, rng)
        seen = present[ratings.item]
        sensitivity, specificity = (_rates(ratings, seen, of, raters, rng) for of in (True, False))
        true, false = sensitivity[ratings.rater], specificity[ratings.rater]
        evidence = np.where(ratings.yes, np.log(true / (1 - false)), np.log((1 - true) / false))
        odds = (columns * coefficients[description]).sum(axis=1) + np.bincount(ratings.item, evidence, items)
        probability = 1 / (1 + np.exp(-odds))
        present = rng.random(items) < probability
        if sweep >= 0:
            result.presence[sweep], result.shown[sweep] = probability, present
            result.sensitivity[sweep], result.specificity[sweep] = sensitivity, specificity
    return result


def _rates(ratings: Ratings, seen: np.ndarray, of: bool, raters: int, rng: np.random.Generator) -> np.ndarray:
    """Samples how often each rater is right where an item shows it (``of``) or does not, float64 (R,)."""
    concerned = seen == of
    right = np.bincount(ratings.rater, concerned & (ratings.yes == of), raters)
    wrong = np.bincount(ratings.rater, concerned & (ratings.yes != of), raters)
    return np.clip(rng.beta(PRIOR[0] + right, PRIOR[1] + wrong), 1e-9, 1 - 1e-9)


def _coefficients(
    coefficients: np.ndarray,
    columns: np.ndarray,
    description: np.ndarray,
    present: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """Samples each description's coefficients, float64 (D, K), from the normal approximation after one Newton step.

    One step is enough, because the next sweep starts where this one ends.
    """
    count, width = coefficients.shape
    share = 1 / (1 + np.exp(-(columns * coefficients[description]).sum(axis=1)))
    gradient = -coefficients / WIDTH**2
    curvature = np.zeros((count, width, width))
    for j in range(width):
        gradient[:, j] += np.bincount(description, columns[:, j] * (present - share), count)
        for k in range(j + 1):
            product = columns[:, j] * columns[:, k] * share * (1 - share)
            curvature[:, j, k] = curvature[:, k, j] = np.bincount(description, product, count)
    curvature += np.eye(width) / WIDTH**2
    step = np.linalg.solve(curvature, gradient[:, :, None])
    factor = np.linalg.cholesky(curvature).transpose(0, 2, 1)
    noise = np.linalg.solve(factor, rng.standard_normal((count, width, 1)))
    # A Newton step may overshoot where the data separate; steps of more than the prior's width are shortened.
    length = np.maximum(np.linalg.norm(step, axis=1, keepdims=True) / WIDTH, 1)
    result: np.ndarray = coefficients + (step / length + noise)[:, :, 0]
    return result


def majority(ratings: Ratings, items: int) -> np.ndarray:
    """The majority's answer on each item: 0, ½ where there is none, or 1, float64 (I,); the trivial baseline."""
    given = np.bincount(ratings.item, minlength=items)
    balance = 2 * np.bincount(ratings.item, ratings.yes, items) - given
    result: np.ndarray = (np.sign(balance) + 1) / 2
    return result
