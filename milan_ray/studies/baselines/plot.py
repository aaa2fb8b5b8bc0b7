"""Figure of the baselines."""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl

from milan_ray.report.figures import new_figure
from milan_ray.scoring.evaluation import TRIVIAL
from milan_ray.studies.baselines.statistics import LABELERS, METRICS
from milan_ray.studies.comparison.plot import PANELS, plot_score

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_baselines(rows: pl.DataFrame) -> Figure:
    """Plots a panel per measure, a line per network and labeler, with 95 % intervals.

    Args:
        rows: From :func:`milan_ray.studies.baselines.statistics.collected`.
    """
    models = list(dict.fromkeys(rows["model"]))
    metrics = [name for name in METRICS if name in set(rows["metric"]) and name != "bleu-2"]
    systems = [name for name in dict.fromkeys((*LABELERS, *rows["system"])) if name in set(rows["system"])]
    height = len(models) * (len(systems) + 1)
    figure = new_figure(3 * len(metrics) + 2, 0.22 * height + 1)
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    places = {
        (model, system): -(number * (len(systems) + 1) + place)
        for number, model in enumerate(models)
        for place, system in enumerate(systems)
    }
    for axes, metric in zip(panels, metrics, strict=True):
        for row in rows.filter(metric=metric).iter_rows(named=True):
            colour = "0.6" if row["system"] in TRIVIAL else f"C{systems.index(row['system']) % 10}"
            plot_score(axes, row, places[row["model"], row["system"]], colour, size=4)
        axes.set_title(PANELS.get(metric, metric), fontsize="medium")
        axes.grid(axis="x", alpha=0.3)
    names = [LABELERS.get(system, system) for system in systems]
    labels = [label for model in models for label in (f"{names[0]}, {model}", *names[1:])]
    panels[0].set_yticks(list(places.values()), labels, fontsize="small")
    return figure
