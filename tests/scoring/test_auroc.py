import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from milan_ray.scoring.auroc import auroc, average_ranks


def by_definition(activations: np.ndarray, target: np.ndarray) -> float:
    """Share of (inside, outside) pairs in the right order, ties one half."""
    inside, outside = activations[target], activations[~target]
    if not len(inside) or not len(outside):
        return float("nan")
    gaps = inside[:, None] - outside[None]
    return float(((gaps > 0) + 0.5 * (gaps == 0)).mean())


@given(
    st.integers(1, 20).flatmap(
        lambda n: st.tuples(arrays(np.float32, (n, 3), elements=st.integers(-2, 2).map(float)), arrays(bool, (n, 2)))
    )
)
def test_auroc_with_ties_equals_the_definition(case: tuple[np.ndarray, np.ndarray]) -> None:
    activations, targets = case
    want = [[by_definition(activations[:, u], targets[:, t]) for t in range(2)] for u in range(3)]
    np.testing.assert_allclose(auroc(activations, targets), want)


def test_auroc_extremes() -> None:
    target = np.array([[True], [False], [True], [False]])
    activations = np.array([[2.0, 0, 7], [1, 1, 7], [4, -np.inf, 7], [0, np.inf, 7]])
    assert auroc(activations, target).ravel().tolist() == [1, 0, 0.5]


def test_auroc_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        auroc(np.array([[np.nan]]), np.array([[True]]))
    with pytest.raises(ValueError, match="2 rows"):
        auroc(np.zeros((2, 1)), np.zeros((3, 1), bool))


def test_average_ranks_share_ties() -> None:
    assert average_ranks(np.array([[5], [1], [5], [5]])).ravel().tolist() == [3, 1, 3, 3]
