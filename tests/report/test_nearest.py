from __future__ import annotations

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from milan_ray.report import nearest as module
from milan_ray.report.nearest import mean_features, nearest


def dense(features: np.ndarray, top: int) -> list[list[int]]:
    """All cosines, sorted: what the kernel must find, computed the obvious way."""
    apart = features - features.mean(axis=0)
    lengths = np.linalg.norm(apart, axis=1)
    found = []
    for unit in range(len(features)):
        cosines = [
            float(apart[unit] @ apart[other] / (lengths[unit] * lengths[other]))
            if lengths[unit] * lengths[other]
            else 0.0
            for other in range(len(features))
        ]
        others = [other for other in range(len(features)) if other != unit]
        found.append(sorted(others, key=lambda other: (-round(cosines[other], 4), other))[:top])
    return found


def test_nearest_is_what_sorting_all_cosines_finds(monkeypatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 7)  # several blocks
    features = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32) + 10
    places, cosines = nearest(features, 6)
    assert places.tolist() == dense(features, 6)
    assert (np.diff(cosines, axis=1) <= 0).all() and cosines.max() <= 1.001


def test_nearest_of_equals_is_the_first_and_never_itself() -> None:
    features = np.array([[1, 0], [1, 0], [1, 0], [-1, 0], [-1, 0], [-1, 0]], np.float32)
    places, cosines = nearest(features, 2)
    assert places.tolist() == [[1, 2], [0, 2], [0, 1], [4, 5], [3, 5], [3, 4]]
    np.testing.assert_allclose(cosines, 1, atol=1e-6)


def test_nearest_of_few_or_alike_units_has_no_nan() -> None:
    for units in (0, 1, 2, 3):
        places, cosines = nearest(np.ones((units, 4), np.float32), 8)
        assert places.shape == (units, max(0, units - 1)) and (cosines == 0).all()


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(12)), st.integers(1, 12))
def test_mean_features_do_not_depend_on_order_or_cut(order: list[int], cut: int) -> None:
    units = np.array([5, 5, 5, 2, 2, 2, 9, 9, 9, 0, 0, 0], np.int32)
    features = np.arange(24, dtype=np.float32).reshape(12, 2)
    table = pa.table(
        {
            "unit": pa.array(units[order]),
            "feature": pa.array(features[order].tolist(), pa.list_(pa.float32())),
        }
    )
    found, means = mean_features([table.slice(0, cut), table.slice(cut)])
    assert found.tolist() == [0, 2, 5, 9]
    np.testing.assert_allclose(means, [features[units == unit].mean(axis=0) for unit in found])
