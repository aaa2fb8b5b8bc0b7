"""Levels: exact quantiles of what was counted, whatever the shards."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from milan_ray.exemplars.levels import RunningLevel, positions_per_image, sample_positions


def test_level_any_split_and_order_equals_numpys_hazen_quantile():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3, 5000)).astype(np.float32)
    expected = np.quantile(values.astype(np.float64), 0.99, axis=1, method="hazen")
    levels = []
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(5000)
        cuts = np.sort(np.random.default_rng(seed).choice(5000, 7, replace=False))
        total = RunningLevel.empty(3, 0.99, 5000)
        for part in np.split(order, cuts):
            shard = RunningLevel.empty(3, 0.99, 5000)
            for piece in np.array_split(part, 3):
                shard.update(torch.from_numpy(values[:, piece])[None])
            total.merge(shard)
        levels.append(total.result().numpy())
    np.testing.assert_allclose(levels[0], expected, rtol=1e-6)
    assert all((level == levels[0]).all() for level in levels)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(-10, 10, width=32) | st.sampled_from([np.nan, np.inf, -np.inf]), min_size=1, max_size=60),
    st.sampled_from([0.5, 0.9, 0.99, 1.0]),
    st.integers(1, 5),
)
def test_level_with_nonfinite_values_ignores_and_counts_them(values, quantile, parts):
    array = np.array(values, dtype=np.float32)
    state = RunningLevel.empty(1, quantile, len(array))
    for piece in np.array_split(array, parts):
        state.update(torch.from_numpy(piece[None, None]))
    finite = array[np.isfinite(array)]
    assert int(state.counted[0]) == len(finite)
    assert int(state.nonfinite[0]) == len(array) - len(finite)
    level = float(state.result()[0])
    if len(finite) == 0:
        assert np.isnan(level)
    else:
        expected = np.quantile(finite.astype(np.float64), quantile, method="hazen")
        assert level == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ["normal", "narrow", "offset", "heavy", "constant"])
def test_level_of_sampled_positions_lies_within_rank_tolerance(name):
    """4σ of a million sampled positions is 0.04 % in rank; here a tenth of them, so 0.13 %."""
    rng = np.random.default_rng(3)
    images, positions = 2000, 500
    base = rng.normal(size=(images, positions))
    values = {
        "normal": base,
        "narrow": base * 1e-6,
        "offset": base + 1000,
        "heavy": np.exp(3 * base),
        "constant": np.full_like(base, 2.5),
    }[name].astype(np.float32)
    count = positions_per_image(images, positions, 100_000)
    assert count == 50
    state = RunningLevel.empty(1, 0.99, images * count)
    for start in range(0, images, 256):
        ids = np.arange(start, min(images, start + 256))
        chosen = sample_positions(ids, count, positions)
        state.update(torch.from_numpy(np.take_along_axis(values[ids], chosen, axis=1).reshape(1, 1, -1)))
    level = state.result()[0].item()
    below, upto = (values < level).mean(), (values <= level).mean()
    assert below - 0.0013 <= 0.99 <= upto + 0.0013


def test_sample_positions_depends_on_the_image_alone_and_covers_strata():
    together = sample_positions(np.arange(100), 8, 49)
    alone = np.concatenate([sample_positions(np.array([i]), 8, 49) for i in range(100)])
    assert (together == alone).all()
    assert (np.diff(together, axis=1) > 0).all()
    assert together.min() >= 0 and together.max() < 49
    assert (sample_positions(np.arange(3), 49, 49) == np.arange(49)).all()
    counts = np.bincount(sample_positions(np.arange(20000), 8, 49).ravel(), minlength=49)
    assert counts.min() > 0.85 * counts.mean() and counts.max() < 1.2 * counts.mean()
