"""Contrasts: the probe images most like a unit's exemplars that do not excite the unit (docs/contrast.md).

Everything here is about one unit and does not depend on the order of its images: ties go to the lower image id.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from milan_ray.config import ContrastConfig

CONTRASTS_VERSION = "contrasts-1"
"""Part of every fingerprint of contrasts; increased when the choice below changes its results."""

SIMILAR, RANDOM = "similar", "random"
"""Kinds of contrasts."""


@dataclass(frozen=True)
class Contrasts:
    """The contrasts of one unit, n of them: the similar ones by rank, then the random ones.

    Attributes:
        rows: Place of each among the unit's images, int64 (n,).
        exemplars: Place of the exemplar that each is paired with, int64 (n,).
        similar: Whether it is similar, else random, bool (n,).
    """

    rows: np.ndarray
    exemplars: np.ndarray
    similar: np.ndarray


def not_exciting(activations: np.ndarray, exemplars: np.ndarray, quantile: float) -> np.ndarray:
    """Marks the images that do not excite a unit.

    An image does not if its activation is at most the lower ``quantile`` of all finite activations, and below the
    lowest exemplar's. The second condition matters for units that saturate: there, most images tie with the exemplars.

    Args:
        activations: float32 (N,), NaN where there is none.
        exemplars: bool (N,), the exemplars.
        quantile: Between 0 and 1.

    Returns:
        bool (N,); none of them is an exemplar.
    """
    finite: np.ndarray = np.isfinite(activations)
    values = np.sort(activations[finite])
    if not len(values):
        return finite
    threshold = values[math.floor(quantile * (len(values) - 1))]
    own = np.where(finite, activations, np.inf)
    chosen: np.ndarray = finite & ~exemplars & (own <= threshold)
    if (finite & exemplars).any():
        chosen &= own < activations[finite & exemplars].min()
    return chosen


def quantiles(activations: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The share of a unit's images that excite it less than each of some images.

    Args:
        activations: float32 (N,), NaN where there is none.
        rows: Places of n images, int64 (n,).

    Returns:
        float32 (n,).
    """
    values = np.sort(activations[np.isfinite(activations)])
    below = np.searchsorted(values, activations[rows], "left")
    return np.asarray(below / max(1, len(values)), np.float32)


def choose(
    ids: np.ndarray, similarity: np.ndarray, eligible: np.ndarray, unit: int, config: ContrastConfig
) -> Contrasts:
    """Chooses a unit's contrasts.

    Exemplars take turns, best first: each takes the image most like itself that no other has taken, until there are
    enough. So every exemplar has a counterpart, also where many images are like one of them. Random images are paired
    with exemplars in turn.

    Args:
        ids: Image ids, int64 (N,), distinct, in any order.
        similarity: Similarity of each image to each exemplar, (N, k), exemplars best first.
        eligible: The images that may be chosen, bool (N,), as :func:`not_exciting` gives them.
        unit: The unit, for the random choice.
        config: How many.
    """
    may = np.flatnonzero(eligible)
    k = similarity.shape[1]
    most = min(config.similar, len(may)) if k else 0
    order = [_nearest(ids, similarity[:, exemplar], may, most) for exemplar in range(min(k, most))]
    taken: list[int] = []
    used: set[int] = set()
    places = [0] * len(order)
    for turn in range(most):
        exemplar = turn % len(order)
        while order[exemplar][places[exemplar]] in used:
            places[exemplar] += 1
        row = order[exemplar][places[exemplar]]
        taken.append(row)
        used.add(row)
    left = may[~np.isin(may, taken)]
    drawn = left[np.lexsort((ids[left], _scrambled(ids[left], unit, config.seed)))][: config.random if k else 0]
    number = np.concatenate([np.arange(most) % max(1, len(order)), np.arange(len(drawn)) % max(1, k)])
    rows = np.concatenate([np.array(taken, np.int64), drawn])
    return Contrasts(rows, number.astype(np.int64), np.arange(len(rows)) < most)


def _nearest(ids: np.ndarray, similarity: np.ndarray, may: np.ndarray, count: int) -> list[int]:
    """The ``count`` images with the highest similarity (N,) among some, best first; ties go to the lower id."""
    values = similarity[may]
    if count < len(values):
        least = np.partition(values, len(values) - count)[len(values) - count]
        may = may[values >= least]
        values = similarity[may]
    rows: list[int] = may[np.lexsort((ids[may], -values))][:count].tolist()
    return rows


def _scrambled(ids: np.ndarray, unit: int, seed: int) -> np.ndarray:
    """A fixed pseudo-random number for each image of a unit, uint64 (N,)."""
    # splitmix64's finalizer of a different start for every unit and seed, so that units do not share random images.
    start = (unit * 0xD1342543DE82EF95 + seed * 0xA0761D6478BD642F + 0x632BE59BD9B4E019) % 2**64
    x = ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(start)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
