"""Figures of an editing: accuracy as units are removed, and images of the splits and of units."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from milan_ray.report.figures import new_figure
from milan_ray.studies.ablation.curves import plot_random_orders
from milan_ray.studies.editing.statistics import EVERY, FOUND, TEST, VALIDATION
from milan_ray.studies.tables import of_all_classes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_editing(rows: pl.DataFrame) -> Figure:
    """Plots the paper's Figures 8 and 15: accuracy as units are removed, on each split.

    Args:
        rows: Rows of schema ABLATIONS.
    """
    rows = of_all_classes(rows)
    splits = [split for split in (TEST, VALIDATION) if split in set(rows["split"])]
    figure = new_figure(4.5 * len(splits), 3.6)
    for axes, split in zip(figure.subplots(1, len(splits), squeeze=False)[0], splits, strict=True):
        of_split = rows.filter(pl.col("split") == split).sort("ablated", maintain_order=True)
        plot_random_orders(axes, of_split, "ablated")
        for condition, label in ((FOUND, "found by description"), (EVERY, "all units")):
            line = of_split.filter(pl.col("condition") == condition)
            axes.plot(line["ablated"], line["accuracy"], label=label)
        axes.axhline(of_split["accuracy"][0], color="0.6", linewidth=0.8, linestyle=":")
        axes.set(xlabel="units removed", ylabel="accuracy")
        axes.set_title(f"{split} images (n = {of_split['n'][0]:,})", fontsize="medium")
        axes.legend(fontsize="x-small")
    figure.suptitle(rows["model"][0], fontsize="small")
    return figure


def plot_images(rows: Sequence[tuple[str, np.ndarray]], columns: int) -> Figure:
    """Plots the paper's Figure 7: rows of images.

    Args:
        rows: Title and images, uint8 (n, H, W, 3), of each row.
        columns: Images per row at most.
    """
    figure = new_figure(1.1 * columns + 1.5, 1.15 * len(rows))
    panels = figure.subplots(len(rows), columns, squeeze=False)
    for places, (title, images) in zip(panels, rows, strict=True):
        places[0].set_ylabel(title, fontsize="x-small", rotation=0, ha="right", va="center")
        for number, axes in enumerate(places):
            axes.set(xticks=[], yticks=[], frame_on=False)
            if number < len(images):
                axes.imshow(images[number])
    return figure
