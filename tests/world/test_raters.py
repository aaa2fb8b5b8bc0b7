from __future__ import annotations

import numpy as np
import pytest

from milan_ray.world.raters import OVERLOOKED, RATERS, rate


def test_raters_err_at_their_own_rates() -> None:
    rng = np.random.default_rng(0)
    for number, rater in enumerate(RATERS):
        who = np.full(20_000, number)
        assert rate(np.full(20_000, 0.1), who, rng).mean() == pytest.approx(rater.sensitivity, abs=0.015)
        assert rate(np.zeros(20_000), who, rng).mean() == pytest.approx(1 - rater.specificity, abs=0.015)


def test_small_things_are_overlooked_where_asked_for() -> None:
    rng, who = np.random.default_rng(1), np.zeros(20_000, int)
    small = np.full(20_000, OVERLOOKED / 2)
    assert rate(small, who, rng, 0.5).mean() == pytest.approx(RATERS[0].sensitivity / 2, abs=0.015)
    assert rate(np.full(20_000, 0.1), who, rng, 0.5).mean() == pytest.approx(RATERS[0].sensitivity, abs=0.015)
    assert rate(small, who, rng).mean() == pytest.approx(RATERS[0].sensitivity, abs=0.015)
