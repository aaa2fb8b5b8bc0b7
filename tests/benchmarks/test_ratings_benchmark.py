from __future__ import annotations

import numpy as np

from milan_ray.benchmarks.ratings import BASELINE, Arm, Case, campaign
from milan_ray.scoring.simulation import highest


def cases() -> list[Case]:
    """Descriptions of which half of the images that excite most show what they name."""
    rng = np.random.default_rng(0)
    activations = rng.gamma(0.5, size=(6, 800))
    area = np.where(rng.random((6, 800)) < np.clip(activations / 3, 0.05, 0.6), 0.1, 0.0)
    return [Case(*each, None, highest(each[0], 16)) for each in zip(activations, area, strict=True)]


def test_campaigns_count_their_ratings_and_estimate_near_the_truth() -> None:
    units = cases()
    truth = np.stack([case.truth() for case in units])
    uniform, asked = campaign(BASELINE, units, np.random.default_rng(1))
    modelled, fewer = campaign(Arm("", "importance", 100, 2), units, np.random.default_rng(1))
    assert uniform.shape == modelled.shape == (6, 5, 3)
    assert 0 < fewer <= 6 * 100 * 2 < asked <= 6 * 100 * 3
    assert np.abs(modelled[..., 0] - truth).mean() < np.abs(uniform[..., 0] - truth).mean()
    assert ((modelled[..., 1] <= truth) & (truth <= modelled[..., 2])).mean() > 0.8
