"""The plot of a sweep of decoding settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib
import polars as pl

from milan_ray.report.figures import files, new_figure
from milan_ray.stages.tuning_statistics import BEAM, BEAM_MI, GREEDY, GREEDY_MI, RERANK, VALIDATION


def plot_trials(trials: pl.DataFrame, metric: str, chosen: Mapping[str, Any]) -> bytes:
    """Plots scores on the validation units over λ, a line per beam size; returns SVG.

    Args:
        trials: Columns of :data:`~milan_ray.schema.TRIALS`.
        metric: The metric to plot.
        chosen: The row that was chosen. Only trials of its length are plotted, and its line has 95 % intervals.
    """
    rows = trials.filter(
        pl.col("split") == VALIDATION, pl.col("metric") == metric, pl.col("length") == chosen["length"]
    )
    figure = new_figure(7, 4.5)
    axes = figure.add_subplot()
    colours = matplotlib.colormaps["viridis"]
    beams = sorted(rows["beam_size"].drop_nulls().unique())
    for beam_size in beams:
        colour = colours(beams.index(beam_size) / max(1, len(beams) - 1) * 0.9)
        beam_rows = rows.filter(pl.col("beam_size") == beam_size).sort("lam")
        for strategies, style in (((BEAM, RERANK), "-"), ((BEAM_MI,), "--")):
            line = beam_rows.filter(pl.col("strategy").is_in(list(strategies)))
            if not line.is_empty():
                label = f"beam {beam_size}" + (", MI in the search" if strategies == (BEAM_MI,) else "")
                axes.plot(line["lam"], line["value"], style, color=colour, label=label, marker=".", markersize=3)
                if beam_size == chosen["beam_size"] and chosen["strategy"] in strategies:
                    axes.fill_between(line["lam"], line["low"], line["high"], color=colour, alpha=0.15, linewidth=0)
    for strategy, style in ((GREEDY, "x"), (GREEDY_MI, ":")):
        line = rows.filter(pl.col("strategy") == strategy).sort("lam")
        if not line.is_empty():
            axes.plot(line["lam"], line["value"], style, color="black", label=strategy)
    axes.plot(chosen["lam"], chosen["value"], "o", markersize=10, fillstyle="none", color="crimson", label="chosen")
    axes.set_xlabel("λ")
    axes.set_ylabel(f"{metric} on {chosen['n']} validation units")
    axes.legend(fontsize="small", ncols=2)
    return files(figure)["svg"]
