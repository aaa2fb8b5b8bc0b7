"""What is concluded from an analysis: from made-up curves and shares, where the answer is known."""

from __future__ import annotations

import polars as pl

from milan_ray.showcase.paper.analysis import EARLY, LATE, MIDDLE, beside_random, importance, whereabouts
from milan_ray.studies.ablation.curves import RANDOM

SPREAD = (-0.01, 0.0, 0.01)


def curves(model: str, **heights: float) -> pl.DataFrame:
    """Flat curves: a condition each, and three random orders about .7."""
    rows = []
    for condition, trials in {**{name: [height] for name, height in heights.items()}, RANDOM: [0.7] * 3}.items():
        for trial, height in enumerate(trials):
            off = SPREAD[trial] if condition == RANDOM else 0
            for step, fraction in enumerate((0.0, 0.1)):
                rows.append(
                    (model, condition.replace("_", "-"), trial, fraction, 5 * step, height + off if step else 0.9)
                )
    return pl.DataFrame(rows, ["model", "condition", "trial", "fraction", "ablated", "accuracy"], orient="row")


def verdicts(**heights: float) -> list[bool | None]:
    rows = pl.concat([curves("a", **heights), curves("b", **heights)])
    return [claim.reproduced for claim in importance(beside_random(rows), rows)]


def test_units_matter_where_their_curve_leaves_the_range_of_random_orders():
    shape = {"adjectives": 0.5, "adpositions": 0.5, "nouns": 0.7, "max_word_difference": 0.8}
    assert verdicts(**shape) == [True, True, True, True]
    assert verdicts(**{**shape, "adjectives": 0.69}) == [False, True, True, False]
    assert verdicts(**{**shape, "max_word_difference": 0.6}) == [True, True, False, True]
    assert verdicts(nouns=0.7, adjectives=0.5) == [True, None, None, True]
    assert verdicts(adjectives=0.5) == [True, None, None]


def test_a_criterion_is_compared_on_the_networks_that_have_it():
    easy = curves("easy", adjectives=0.5).with_columns(accuracy=pl.col("accuracy") + 0.2)
    (row,) = beside_random(pl.concat([easy, curves("hard")])).filter(condition="adjectives").iter_rows(named=True)
    assert (row["networks"], round(row["accuracy"], 6), round(row["random"], 6)) == (1, 0.7, 0.9)


def shares(name: str, early: int, middle: int, late: int) -> pl.DataFrame:
    columns = {"property": name, "units": 100, "model": "a"}
    rows = [{**columns, "place": p, "holding": n} for p, n in ((EARLY, early), (MIDDLE, middle), (LATE, late))]
    return pl.DataFrame(rows)


def test_layers_differ_where_the_interval_of_the_difference_leaves_zero():
    properties = pl.concat(
        [
            shares("contains an adjective", 80, 50, 20),
            shares("top 10 % word difference", 10, 10, 12),
            shares("contains an adposition", 30, 10, 30),
        ]
    )
    adjectives, different, relations = whereabouts(properties)
    assert (adjectives.reproduced, different.reproduced, relations.reproduced) == (True, False, False)
    assert "first layers 80% of units, last 20%: difference +60%" in adjectives.ours
    assert whereabouts(properties.clear())[0].reproduced is None
    nowhere = whereabouts(properties.with_columns(holding=pl.lit(0)))
    assert [claim.reproduced for claim in nowhere] == [None, None, None]
