"""Figure of the edited networks of the built-in world."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from milan_ray.report.figures import new_figure
from milan_ray.studies.ablation.curves import RANDOM
from milan_ray.studies.editing.statistics import EVERY, FOUND, TEST, VALIDATION

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from milan_ray.showcase.paper.editing import Network


def plot_networks(networks: Sequence[Network]) -> Figure:
    """Plots the paper's Figures 8 and 15: accuracy as units are removed, mean and range over networks."""
    figure = new_figure(9, 3.6)
    for axes, split in zip(figure.subplots(1, 2), (TEST, VALIDATION), strict=True):
        for condition, label in ((FOUND, "found by description"), (EVERY, "all units"), (RANDOM, "random")):
            curves = [curve for network in networks for curve in network.curves(split, condition)]
            shortest = min(map(len, curves))
            values = np.array([curve[:shortest] for curve in curves])
            (line,) = axes.plot(values.mean(0), "--" if condition == RANDOM else "-", label=label)
            axes.fill_between(range(shortest), values.min(0), values.max(0), alpha=0.15, color=line.get_color())
        start = np.mean([network.edit.accuracy(split)[0] for network in networks])
        axes.axhline(start, color="0.6", linewidth=0.8, linestyle=":", label="all units kept")
        if split == TEST:
            plain = np.mean([network.plain for network in networks])
            axes.axhline(plain, color="0.2", linewidth=0.8, linestyle="-.", label="all units kept, no words")
        axes.set(xlabel="units removed", ylabel="accuracy")
        axes.set_title({TEST: "misleading scenes", VALIDATION: "scenes like those of training"}[split])
        axes.legend(fontsize="x-small")
    figure.suptitle(f"{len(networks)} networks, mean and range", fontsize="small")
    return figure
