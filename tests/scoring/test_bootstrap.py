import numpy as np
import pytest

from milan_ray.scoring.bootstrap import difference, interval, intervals, ratio, resampling_counts
from milan_ray.scoring.text import bleu, bleu_statistics, bleu_values


def test_counts_same_seed_same_resamples() -> None:
    first = resampling_counts(7, 50, seed=3)
    assert np.array_equal(first, resampling_counts(7, 50, seed=3))
    assert not np.array_equal(first, resampling_counts(7, 50, seed=4))
    assert first.shape == (50, 7)
    assert (first.sum(1) == 7).all()


def test_counts_without_units_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one unit"):
        resampling_counts(0)


def test_interval_of_a_mean_has_the_width_theory_gives() -> None:
    values = np.random.default_rng(0).normal(3, 2, 2000)
    got = interval(np.stack([np.ones(2000), values], 1), ratio, resampling_counts(2000, 2000))
    assert got.value == pytest.approx(values.mean())
    assert got.high - got.low == pytest.approx(2 * 1.96 * 2 / np.sqrt(2000), rel=0.1)


def test_interval_of_one_unit_is_a_point() -> None:
    assert interval(np.array([[1.0, 5.0]]), ratio, resampling_counts(1, 10)) == (5, 5, 5)


def test_intervals_are_those_of_each_system() -> None:
    rng = np.random.default_rng(0)
    counts = resampling_counts(30, 200)
    for statistics, measure in (
        (np.stack([np.ones((4, 30)), rng.normal(size=(4, 30))], 2), ratio),
        (rng.integers(1, 9, (4, 30, 10)), bleu_values),
    ):
        got = intervals(statistics, measure, counts)
        np.testing.assert_allclose(got, [interval(of_one, measure, counts) for of_one in statistics], rtol=1e-12)


def test_ratio_of_nothing_is_zero() -> None:
    assert ratio(np.zeros((2, 2))).tolist() == [0, 0]


def test_difference_is_paired() -> None:
    noise = np.random.default_rng(0).normal(0, 100, 200)
    ones = np.ones(200)
    a, b = np.stack([ones, noise + 1], 1), np.stack([ones, noise], 1)
    assert difference(a, b, ratio, resampling_counts(200, 100)) == pytest.approx((1, 1, 1))


def test_bleu_from_resampled_statistics_is_bleu_of_the_resampled_corpus() -> None:
    predictions = ["a red dog", "striped texture", "the wheel of a car", "blue"]
    references = [
        ["a big red dog", "dog"],
        ["stripes"],
        ["the wheel of a truck", "wheels"],
        ["blue areas", "blue", "sky"],
    ]
    counts = resampling_counts(4, 5, seed=1)
    want = []
    for row in counts.astype(int):
        drawn = np.repeat(np.arange(4), row)
        want.append(bleu([predictions[i] for i in drawn], [references[i] for i in drawn]).score)
    assert bleu_values(counts @ bleu_statistics(predictions, references)) == pytest.approx(want)
