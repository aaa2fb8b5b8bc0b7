"""Figure of an analysis: accuracy as units are ablated, and properties of descriptions by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl

from milan_ray.report.figures import new_figure
from milan_ray.studies.ablation.curves import RANDOM, plot_random_orders
from milan_ray.studies.analysis.statistics import SAME_LAYERS
from milan_ray.studies.tables import of_all_classes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SYNTACTIC = ("verbs", "adpositions", "adjectives", "nouns")
STRUCTURAL = ("max-word-difference", "parse-depth", "description-length")


def plot_analysis(rows: pl.DataFrame, properties: pl.DataFrame, language: str) -> Figure:
    """Plots the paper's Figure 4: accuracy over the share ablated, a panel per group of criteria; properties by layer.

    Args:
        rows: Rows of schema ABLATIONS.
        properties: Share of units with each property, by layer.
        language: Name of the spaCy pipeline that read the descriptions.
    """
    rows = of_all_classes(rows)
    conditions = list(dict.fromkeys(rows["condition"]))
    same = [name for name in conditions if name.endswith(SAME_LAYERS)]
    words = [name for name in conditions if name not in (*SYNTACTIC, *STRUCTURAL, *same, RANDOM)]
    groups = [("words of a kind", (*SYNTACTIC, *same)), ("structure", STRUCTURAL), ("likeness to a word", tuple(words))]
    groups = [(title, names) for title, names in groups if set(names) & set(conditions)]
    figure = new_figure(4 * (len(groups) + 1), 3.6)
    panels = figure.subplots(1, len(groups) + 1)
    shares = rows.with_columns(percent=100 * pl.col("fraction"))
    for axes, (title, names) in zip(panels, groups, strict=False):
        plot_random_orders(axes, shares, "percent")
        for name in names:
            line = shares.filter(pl.col("condition") == name)
            line = line.group_by("percent", maintain_order=True).agg(pl.col("accuracy").mean())
            if len(line):
                axes.plot(line["percent"], line["accuracy"], marker=".", label=name.removeprefix("similar to "))
        axes.set(xlabel="% units ablated", ylabel="accuracy")
        axes.set_title(title, fontsize="medium")
        axes.legend(fontsize="x-small")
    _plot_properties(panels[-1], properties)
    figure.suptitle(f"{rows['model'][0]} on {rows['n'][0]:,} images; sentences read by {language}", fontsize="small")
    return figure


def _plot_properties(axes: Axes, properties: pl.DataFrame) -> None:
    layers = list(dict.fromkeys(properties["layer"]))
    for name in dict.fromkeys(properties["property"]):
        line = properties.filter(pl.col("property") == name)
        axes.plot(range(len(layers)), line["share"], marker="o", label=name)
        axes.fill_between(range(len(layers)), line["low"], line["high"], alpha=0.1)
    axes.set_xticks(range(len(layers)), layers, rotation=30, ha="right")
    axes.set(ylabel="share of units", ylim=(0, 1))
    axes.set_title("descriptions by layer", fontsize="medium")
    axes.legend(fontsize="x-small")
