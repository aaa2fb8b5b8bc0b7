"""The world's raters: simulated people who say whether a scene shows a concept, and err at rates of their own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

OVERLOOKED = 0.01
"""Share of the image below which a concept is small."""


@dataclass(frozen=True)
class Rater:
    """One simulated person.

    Attributes:
        name: The person's name.
        sensitivity: Probability of yes where the concept shows.
        specificity: Probability of no where it does not.
    """

    name: str
    sensitivity: float
    specificity: float


RATERS = (
    Rater("careful", 0.95, 0.98),
    Rater("quick", 0.80, 0.97),
    Rater("generous", 0.94, 0.90),
    Rater("strict", 0.75, 0.99),
    Rater("tired", 0.78, 0.92),
    Rater("steady", 0.90, 0.95),
    Rater("doubtful", 0.82, 0.98),
    Rater("eager", 0.88, 0.91),
)
"""The raters; their mean sensitivity is .85 and their mean specificity .95."""


def rate(area: np.ndarray, rater: np.ndarray, rng: np.random.Generator, overlook: float = 0.0) -> np.ndarray:
    """Simulates answers.

    Args:
        area: Share of the image that the concept covers, (M,); 0 where it does not show.
        rater: Who rates, int (M,), places in :data:`RATERS`.
        rng: Source of randomness.
        overlook: By how much sensitivity is lower, as a share, where the concept is small; the same images are then
            difficult for all raters, which a model of raters who err independently does not know.

    Returns:
        bool (M,): whether the rater says yes.
    """
    sensitivity = np.array([each.sensitivity for each in RATERS])[rater]
    specificity = np.array([each.specificity for each in RATERS])[rater]
    sensitivity = sensitivity * np.where(area < OVERLOOKED, 1 - overlook, 1)
    answers: np.ndarray = rng.random(len(area)) < np.where(area > 0, sensitivity, 1 - specificity)
    return answers
