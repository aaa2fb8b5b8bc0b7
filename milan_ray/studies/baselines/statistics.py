"""MILAN and other labelers on networks that are new to its captioner (paper §4, Table 2)."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl

from milan_ray.labelers.compexp import CompExp
from milan_ray.labelers.milan import LIKELIHOOD, MILAN
from milan_ray.labelers.netdissect import NetDissect
from milan_ray.scoring.bootstrap import Interval
from milan_ray.scoring.evaluation import ANNOTATORS, TRIVIAL, Row
from milan_ray.studies.generalization.statistics import main_metric

LABELERS = {CompExp.name: "CE", NetDissect.name: "ND", LIKELIHOOD: "p(d|E)", MILAN: "wPMI"}
"""Labelers in the order of the paper's Table 2, with their names there."""

METRICS = ("bertscore-f", "rouge-l-f", "bleu-2", "auroc", "causal-drop", "planted-accuracy")
"""Measures that are shown: agreement with annotations, and judgements by the built-in world."""


def collected(comparisons: Mapping[str, pl.DataFrame]) -> pl.DataFrame:
    """Joins comparisons of single networks into one table.

    Args:
        comparisons: Model → rows of schema SCORES from a comparison.

    Returns:
        Columns model, system, metric, value, low, high, n, note; metrics of :data:`METRICS`, differences left out.
    """
    frames = [
        rows.filter(pl.col("metric").is_in(METRICS), ~pl.col("system").str.contains(" − |, shuffled$"), pl.col("n") > 0)
        .select(pl.lit(model).alias("model"), "system", "metric", "value", "low", "high", "n", "note")
        .unique(["model", "system", "metric"], keep="first", maintain_order=True)
        for model, rows in comparisons.items()
    ]
    return pl.concat(frames)


def table_2(rows: pl.DataFrame, metric: str | None = None) -> pl.DataFrame:
    """The paper's Table 2: a line per network, a column per labeler; then other labelers and trivial baselines.

    Args:
        rows: From :func:`collected`.
        metric: The measure; None uses BERTScore, or ROUGE-L if there is no model for BERTScore.
    """
    rows = rows.filter(metric=metric or main_metric(rows))
    wide = rows.pivot(on="system", index=["model", "n"], values="value", maintain_order=True)
    first = [name for name in LABELERS if name in wide.columns]
    rest = [name for name in wide.columns if name not in ("model", "n", *first)]
    rest.sort(key=lambda name: (name == ANNOTATORS, name in TRIVIAL))
    # If some units have one annotation, agreement among annotators counts fewer units: a second row, merged here.
    lines = wide.group_by("model", maintain_order=True).agg(
        pl.col("n").max(), *(pl.col(name).drop_nulls().first() for name in (*first, *rest))
    )
    return lines.rename({name: LABELERS[name] for name in first} | {"n": "units"})


def score_rows(rows: pl.DataFrame) -> list[Row]:
    """The same as rows of a table of scores, whose systems are labelers on networks."""
    filled = rows.with_columns(pl.col("low", "high").fill_null(float("nan")))
    return [
        (f"{model}: {system}", metric, Interval(*ends), n, note)
        for model, system, metric, *ends, n, note in filled.select(
            "model", "system", "metric", "value", "low", "high", "n", "note"
        ).iter_rows()
    ]


def summary(rows: pl.DataFrame) -> str:
    """The paper's Table 2 as lines of text, for every measure."""
    lines = []
    for metric in METRICS:
        if metric in set(rows["metric"]):
            lines.append(f"  {metric}")
            for row in table_2(rows, metric).iter_rows(named=True):
                model, units = row.pop("model"), row.pop("units")
                values = (f"{name} {value:.3f}" for name, value in row.items() if value is not None)
                lines.append(f"    {model} ({units} units): {' · '.join(values)}")
    return "\n".join(lines)
