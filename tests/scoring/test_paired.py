from __future__ import annotations

from itertools import product
from statistics import NormalDist

import numpy as np
import pytest

from milan_ray.scoring.auroc import average_ranks
from milan_ray.scoring.paired import sign, signed_rank


def by_hand(differences: list[float]) -> float:
    """All signs of the ranks, one after the other."""
    values = np.array([value for value in differences if value])
    if not len(values):
        return 1.0
    ranks = average_ranks(np.abs(values)[:, None])[:, 0]
    sums = np.array([ranks[np.array(signs)].sum() for signs in product([False, True], repeat=len(ranks))])
    seen = ranks[values > 0].sum()
    return min(1.0, 2 * min((sums <= seen).mean(), (sums >= seen).mean()))


@pytest.mark.parametrize(
    "differences",
    [
        [1, 2, 3, 4, 5, 6],
        [3, 1, -2, 4, 4, -1, 5],
        [1, 1, -1, 2],
        [0, 0, 5, -3, 8],
        [0.5, -0.5],
        [-7],
        [],
        [0, 0],
    ],
)
def test_signed_rank_counts_all_signs(differences: list[float]) -> None:
    assert signed_rank(differences) == pytest.approx(by_hand(differences))
    assert signed_rank([-value for value in differences]) == pytest.approx(signed_rank(differences))


def test_signed_rank_of_twelve_pairs_of_one_sign_is_the_least_there_is() -> None:
    assert signed_rank(range(1, 13)) == pytest.approx(2**-11) == sign([1] * 12)


def test_signed_rank_of_many_pairs() -> None:
    # With so many the exact distribution is that of the normal approximation.
    values = np.random.default_rng(0).normal(0.1, size=300)
    ranks = average_ranks(np.abs(values)[:, None])[:, 0]
    z = (ranks[values > 0].sum() - ranks.sum() / 2) / np.sqrt((ranks**2).sum() / 4)
    assert signed_rank(values.tolist()) == pytest.approx(2 * NormalDist().cdf(-abs(z)), rel=0.02)


def test_sign_test_leaves_out_zeros() -> None:
    assert sign([1, 2, -1, 0]) == 1.0
    assert sign([1, 2, 3, 4, -1]) == pytest.approx(2 * (1 + 5) / 32)
