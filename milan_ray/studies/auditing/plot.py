"""Figure of an audit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import polars as pl

from milan_ray.report.figures import new_figure
from milan_ray.studies.auditing.statistics import BLURRED, PLAIN

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_audit(pairs: pl.DataFrame, words: Sequence[str]) -> Figure:
    """Plots the paper's Figure 5: units found in both networks of each pair, a line per pair.

    Args:
        pairs: From :func:`milan_ray.studies.auditing.statistics.count_pairs`.
        words: Words that were searched for.
    """
    figure = new_figure(3.6, 3.6)
    axes = figure.subplots()
    for model, before, after in pairs.select("model", "units", "other_units").iter_rows():
        axes.plot([0, 1], [before, after], "-o", label=model)
    axes.set_xticks([0, 1], [PLAIN, BLURRED])
    axes.set(xlim=(-0.3, 1.3), ylabel="units found")
    axes.set_ylim(bottom=0)
    axes.set_title(", ".join(words), fontsize="small")
    if len(pairs) <= 12:
        axes.legend(fontsize="x-small")
    return figure
