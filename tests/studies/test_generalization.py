"""Units divided, held-out descriptions scored: against what is known of both by hand."""

from __future__ import annotations

import polars as pl
import pytest
import spacy

from milan_ray.annotations.splits import Split
from milan_ray.report.figures import files
from milan_ray.scoring.evaluation import ANNOTATORS, evaluate_text
from milan_ray.studies.generalization.plot import plot_generalization
from milan_ray.studies.generalization.statistics import (
    disagreements,
    divided,
    main_metric,
    score_split,
    summary,
    table_3,
    table_6,
    text_rows,
)

WITHIN = Split("within-network", "within-m", "m", "m", ("m",), ("m",))
ACROSS = Split("own", "m-to-n", "m", "n", ("m",), ("n",))
UNITS = {"m": [("m", "b", 1), ("m", "a", 1), ("m", "a", 0), *(("m", "c", n) for n in range(17))], "n": [("n", "a", 0)]}


def test_units_are_divided_anew_in_every_trial_and_always_alike() -> None:
    train, test = divided(WITHIN, UNITS, 0.1, 0, 0)
    assert len(test) == 2 and sorted(train + test) == sorted(UNITS["m"]) and train == sorted(train)
    assert (train, test) == divided(WITHIN, {"m": UNITS["m"][::-1]}, 0.1, 0, 0)
    assert len({tuple(divided(WITHIN, UNITS, 0.1, 0, trial)[1]) for trial in range(8)}) > 4
    assert divided(WITHIN, UNITS, 0.1, 0, 1)[1] != divided(WITHIN, UNITS, 0.1, 1, 1)[1]
    assert len(divided(WITHIN, UNITS, 0.001, 0, 0)[1]) == 1
    assert divided(ACROSS, UNITS, 0.1, 0, 0) == divided(ACROSS, UNITS, 0.1, 0, 5) == (sorted(UNITS["m"]), UNITS["n"])


PEOPLE = {("m", "a", unit): [f"a {word} house", f"{word} houses on a hill"] for unit, word in enumerate(
    ("red", "blue", "green", "old", "tall", "small")
)}  # fmt: skip


def said(trials: int = 1) -> pl.DataFrame:
    rows = []
    for trial in range(trials):
        for unit, (key, people) in enumerate(PEOPLE.items()):
            of_system = {
                "milan": people[0] if unit != trial else "a green boat at night",
                "milan-pdE": "houses",
                "constant": "a house",
                "nearest-copy": "things",
            }
            rows += [(trial, system, *key, text) for system, text in of_system.items()]
    schema = {"trial": pl.Int32, **dict.fromkeys(("system", "model", "layer"), pl.String), "unit": pl.Int64}
    return pl.DataFrame(rows, {**schema, "description": pl.String}, orient="row")


def rows_of(trials: int = 1) -> pl.DataFrame:
    scored = score_split("within-m", said(trials), PEOPLE, samples=50)
    texts = text_rows(said(trials), spacy.blank("en"), "rules")
    names = {"experiment": "g", "split": "within-m", "kind": "within-network", "train": "m", "test": "m"}
    return pl.concat([scored, texts]).with_columns(pl.lit(value).alias(name) for name, value in names.items())


def test_split_is_scored_by_every_bleu_beside_what_costs_nothing() -> None:
    rows = rows_of()
    metrics = {"bleu", "bleu-1", "bleu-2", "bleu-3", "rouge-1-f", "rouge-2-f", "rouge-l-f"}
    assert metrics <= set(rows["metric"]) and main_metric(rows) == "rouge-l-f"
    systems = {"milan", "milan-pdE", "constant", "nearest-copy", "shuffled", ANNOTATORS}
    systems |= {"milan − constant", "milan − nearest-copy", "milan − shuffled"}
    assert set(rows["system"]) == systems
    own = rows.filter(system="milan", metric="rouge-l-f", trial=0)
    texts = [text for trial, _, _, _, _, text in said().filter(system="milan").iter_rows() if trial == 0]
    alone = evaluate_text("e", {"milan": texts}, list(PEOPLE.values()), samples=50).to_pylist()
    expected = next(row for row in alone if row["metric"] == "rouge-l-f")
    assert own.select("value", "low", "high", "n").row(0) == tuple(
        expected[key] for key in ("value", "low", "high", "n")
    )
    every = rows.filter(pl.col("trial").is_null(), system="milan", metric="rouge-l-f")
    assert every["value"].item() == own["value"].item()


def test_units_that_several_trials_describe_are_resampled_as_one() -> None:
    rows = rows_of(trials=3)
    mine = rows.filter(system="milan", metric="rouge-l-f")
    of_trials = mine.drop_nulls("trial")
    together = mine.filter(pl.col("trial").is_null())
    assert together["value"].item() == pytest.approx(of_trials["value"].mean())
    assert together["n"].to_list() == [6] and of_trials["n"].to_list() == [6, 6, 6]
    same = rows.filter(system="constant", metric="rouge-l-f")
    assert same["low"].n_unique() == 1, "three trials that say the same have the interval of one"


def test_evaluation_of_units_described_twice_has_the_interval_of_units() -> None:
    people = list(PEOPLE.values())
    once = evaluate_text("e", {"s": ["a house"] * 6}, people, samples=50).to_pylist()
    twice = evaluate_text(
        "e", {"s": ["a house"] * 12}, people + people, owners=[*range(6), *range(6)], samples=50
    ).to_pylist()
    by_hand = [row for row in once if row["metric"].startswith("rouge")]
    assert by_hand and [row for row in twice if row["metric"].startswith("rouge")] == by_hand


def test_tables_figure_and_summary_show_every_split() -> None:
    rows = rows_of(trials=2)
    other = rows.with_columns(pl.lit("m-to-n").alias("split"), pl.lit("own").alias("kind"), pl.lit("n").alias("test"))
    both = pl.concat([other, rows])
    table = table_3(both)
    assert table["split"].to_list() == ["within-m", "m-to-n"] and table["units"].to_list() == [6, 6]
    assert table["low"][0] <= table["rouge-l-f"][0] <= table["high"][0]
    assert {"constant", "shuffled", "nearest-copy", ANNOTATORS} <= set(table.columns)
    texts = table_6(rows)
    assert texts["texts"].to_list() == [12] and texts["length"].item() == pytest.approx((5 * 3 + 5) / 6)
    assert "noun" not in texts.columns
    assert files(plot_generalization(both))["svg"] == files(plot_generalization(both))["svg"]
    assert "within m" in summary(both) and "m → n" in summary(both)


def test_descriptions_without_a_word_of_anybodys_are_shown_as_failures() -> None:
    frame = said().with_columns(pl.lit("within-m").alias("split"))
    failures, examples = disagreements(frame, PEOPLE, 3)
    assert failures[0].startswith("1 of 6 ") and len(failures) == 2
    assert "a green boat at night" in failures[1] and "red houses on a hill" in failures[1]
    assert len(examples) == 3
