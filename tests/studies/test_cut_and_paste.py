"""Which units, what is cut out, and what is counted."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from milan_ray.studies.cut_and_paste.statistics import (
    CRITERION,
    DIFFERENT,
    OTHERS,
    best_examples,
    between_groups,
    choose_units,
    describe_rates,
    grown,
    paste,
    rates,
)


def test_units_of_different_words_and_as_many_others():
    scores = pl.DataFrame(
        {"layer": "l", "unit": range(7), "description": list("abcdefg"), CRITERION: [1.0, 5.0, 0.0, 5.0, 2.0, 3.0, 0.5]}
    )
    chosen = choose_units(scores, 2, seed=1)
    assert chosen.filter(pl.col("group") == DIFFERENT)["unit"].to_list() == [1, 3]  # equal: the table's order
    others = chosen.filter(pl.col("group") == OTHERS)
    assert len(others) == 2 and not {1, 3} & set(others["unit"])
    assert chosen.equals(choose_units(scores, 2, seed=1))
    assert chosen["score"].to_list()[:2] == [5.0, 5.0]
    assert len(choose_units(scores, 50)) == 6


def test_a_cut_is_the_mask_with_a_margin_in_the_images_size():
    mask = np.zeros((32, 32), bool)
    mask[8:16, 16:24] = True
    cut = grown(mask, (64, 64))
    expected = np.zeros((64, 64), bool)
    expected[16 - 4 : 32 + 4, 32 - 4 : 48 + 4] = True
    np.testing.assert_array_equal(cut, expected)
    assert not grown(np.zeros((8, 8), bool), (16, 16)).any()


def test_every_cut_goes_on_every_original_at_its_place():
    originals = np.stack([np.full((4, 4, 3), value, np.uint8) for value in (10, 20, 30)])
    distractors = np.stack([np.full((4, 4, 3), value, np.uint8) for value in (100, 200)])
    cuts = np.zeros((2, 4, 4), bool)
    cuts[0, 0, 0], cuts[1, 2:] = True, True
    made = paste(originals, distractors, cuts)
    assert made.shape == (3, 2, 4, 4, 3) and made.dtype == np.uint8
    assert made[1, 0, 0, 0].tolist() == [100] * 3 and (made[1, 0].reshape(-1, 3)[1:] == 20).all()
    assert (made[2, 1, 2:] == 200).all() and (made[2, 1, :2] == 30).all()


def pairs() -> pl.DataFrame:
    """Unit 0 misleads always, 1 half the time, both a quarter by the control; the other units only by the control."""
    rows = [
        {"layer": "l", "unit": unit, "group": group, "fooled": fooled[n % 4], "control_fooled": n % 4 == 0, "n": n}
        for group, units in (
            (DIFFERENT, {0: (1, 1, 1, 1), 1: (0, 1, 0, 1)}),
            (OTHERS, {2: (0, 0, 0, 1), 3: (1, 0, 0, 0)}),
        )
        for unit, fooled in units.items()
        for n in range(8)
    ]
    return pl.DataFrame(rows).with_columns(pl.col("fooled") == 1)


def test_rates_count_every_unit_the_same_and_compare_with_the_control():
    found = rates(pairs(), samples=200)
    assert found[DIFFERENT]["fooled"].value == pytest.approx(0.75)
    assert (found[DIFFERENT]["fooled"].low, found[DIFFERENT]["fooled"].high) == (0.5, 1.0)
    assert found[DIFFERENT]["beyond control"].value == pytest.approx(0.5)
    assert found[OTHERS]["beyond control"].value == pytest.approx(0)
    more = between_groups(pairs(), samples=200)
    assert more.value == pytest.approx(0.5)
    assert 0.25 <= more.low <= more.value <= more.high <= 0.75
    assert (
        describe_rates(found)
        .splitlines()[0]
        .startswith("  different words: fooled 0.750 [0.500, 1.000], control 0.250")
    )


def test_examples_are_of_the_units_that_mislead_most():
    shown = best_examples(pairs(), 2)
    assert shown["unit"].to_list() == [0, 1] and shown["fooled"].all() and shown["n"].to_list() == [0, 1]
    assert best_examples(pairs().filter(~pl.col("fooled"))).is_empty()
