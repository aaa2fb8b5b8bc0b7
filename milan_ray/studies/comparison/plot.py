"""Figure of a comparison."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from milan_ray.report.figures import new_figure
from milan_ray.scoring.evaluation import ANNOTATORS, SHUFFLED, TRIVIAL
from milan_ray.studies.comparison.statistics import EVERYBODY, PER_HOUR

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

PANELS = {
    "bertscore-f": "BERTScore with annotations",
    "rouge-l-f": "ROUGE-L with annotations",
    "auroc": "AUROC, held-out scenes",
    "causal-drop": "fall without the concept, σ",
    "simulation": "correlation, simulated",
    "cosy-auc": "AUROC, generated images",
    "planted-accuracy": "planted units named",
    PER_HOUR: "units per hour, one process",
}
"""Metrics that the figure shows, with what it calls them."""


def plot_comparison(scores: pl.DataFrame, by_kind: str) -> Figure:
    """Plots a panel per measure with 95 % intervals, and one of kinds of concepts.

    Args:
        scores: Columns of :data:`~milan_ray.schema.SCORES`.
        by_kind: Name of the experiment whose metrics are kinds of concepts.
    """
    from matplotlib.ticker import LogLocator, NullFormatter  # matplotlib takes a second to import

    rows = scores.filter(~pl.col("system").str.contains(" − "), pl.col("n") > 0)
    kinds = rows.filter(pl.col("experiment") == by_kind)
    rows = rows.filter(pl.col("experiment") != by_kind).unique(["system", "metric"], keep="first", maintain_order=True)
    systems = [name for name in dict.fromkeys(rows["system"]) if name != EVERYBODY]
    panels = [metric for metric in PANELS if metric in set(rows["metric"])]
    if "bertscore-f" in panels and len(panels) > 1:
        panels = [metric for metric in panels if metric != "rouge-l-f"]
    heights = [0.35 * len(systems) + 1.2] + ([0.32 * kinds["system"].n_unique() + 1.6] if len(kinds) else [])
    figure = new_figure(2.6 * max(3, len(panels)) + 1.5, sum(heights))
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    every = parts[0].subplots(1, max(1, len(panels)), sharey=True, squeeze=False)[0]
    for axes, metric in zip(every, panels, strict=False):
        for row in rows.filter(pl.col("metric") == metric, pl.col("system").is_in(systems)).iter_rows(named=True):
            place = systems.index(row["system"])
            trivial = row["system"] in TRIVIAL or row["system"].endswith(SHUFFLED)
            plot_score(axes, row, -place, "0.6" if trivial else f"C{place % 10}", size=5)
        if metric == PER_HOUR:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axes.xaxis.set_major_formatter("{x:,.0f}")
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.tick_params(axis="x", labelsize="small")
        axes.set_title(PANELS[metric], fontsize="medium")
        axes.set_yticks([-place for place in range(len(systems))], systems)
        axes.grid(axis="x", alpha=0.3)
    if len(kinds):
        _plot_kinds(parts[1], kinds)
    return figure


def plot_score(axes: Axes, row: dict[str, Any], place: float, colour: str, size: float) -> None:
    """Plots a value with its 95 % interval.

    Args:
        axes: The panel.
        row: A row of scores, with system, value, low and high.
        place: Position on the vertical axis.
        colour: Colour, unless the system is the annotators themselves.
        size: Size of the mark, points.
    """
    colour = "0.1" if row["system"] == ANNOTATORS else colour
    if row["low"] is not None:
        axes.plot([row["low"], row["high"]], [place, place], color=colour, linewidth=2)
    axes.plot(row["value"], place, "o", color=colour, markersize=size)


def _plot_kinds(part: SubFigure, kinds: pl.DataFrame) -> None:
    table = kinds.pivot(on="metric", index="system", values="value", maintain_order=True)
    sizes = dict(kinds.select("metric", "n").unique().iter_rows())
    names = table.columns[1:]
    values = table.select(names).to_numpy().astype(float)
    axes = part.subplots()
    image = axes.imshow(values, aspect="auto", cmap="RdYlGn", vmin=0.2, vmax=1.0)
    axes.set_xticks(range(len(names)), [f"{name}\n(n = {sizes[name]})" for name in names])
    axes.set_yticks(range(len(table)), table["system"].to_list())
    axes.set_title("AUROC by kind of the concept that fits the unit best", fontsize="medium")
    for (y, x), value in np.ndenumerate(values):
        if math.isfinite(value):
            axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize="small")
    part.colorbar(image, ax=axes, shrink=0.8)
