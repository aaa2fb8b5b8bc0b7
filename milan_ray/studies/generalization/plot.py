"""Figure of generalization."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from milan_ray.labelers.milan import LIKELIHOOD
from milan_ray.report.figures import new_figure
from milan_ray.studies.generalization.statistics import main_metric, table_3, where

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKS = {"constant": ("x", "0.6"), "shuffled": ("+", "0.6"), "nearest-copy": ("d", "0.6"), LIKELIHOOD: ("s", "C1")}


def plot_generalization(rows: pl.DataFrame) -> Figure:
    """Plots agreement by split with 95 % intervals, alongside trivial baselines and the annotators themselves.

    Args:
        rows: Rows of schema GENERALIZATION.
    """
    table, metric = table_3(rows), main_metric(rows)
    figure = new_figure(7.5, 0.32 * len(table) + 1.2)
    axes = figure.subplots()
    places = -np.arange(len(table))
    for number, kind in enumerate(dict.fromkeys(table["kind"])):
        colour = f"C{number * 2 % 10}"
        of_kind = table.with_columns(pl.Series("place", places)).filter(kind=kind)
        axes.hlines(of_kind["place"], of_kind["low"], of_kind["high"], color=colour, linewidth=2)
        axes.plot(of_kind[metric], of_kind["place"], "o", color=colour, label=f"MILAN, {kind}")
    for system, (mark, colour) in _MARKS.items():
        if system in table.columns:
            axes.plot(table[system], places, mark, color=colour, markersize=5, label=system, linestyle="none")
    for name in table.columns:
        if name.startswith("annotators"):
            axes.plot(table[name], places, "|", color="0.1", markersize=9, label=name, linestyle="none")
    axes.set_yticks(places, [where(row) for row in table.iter_rows(named=True)], fontsize="small")
    axes.set_xlabel("BERTScore, F" if metric == "bertscore-f" else "ROUGE-L, F")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure
