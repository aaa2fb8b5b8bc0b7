"""Accuracy as more and more units are switched off, in several orders: sets of units, table ABLATIONS, figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import pyarrow as pa

from milan_ray.models.ablation import UnitSet
from milan_ray.schema import ABLATIONS
from milan_ray.studies.ablation.run import Accuracies
from milan_ray.studies.tables import by_layer, table_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RANDOM = "random"
"""The condition that the others are compared with: units in random order."""


@dataclass(frozen=True)
class Order:
    """An order in which units are ablated.

    Attributes:
        criterion: What orders the units: a criterion, or :data:`RANDOM`.
        trial: Counted from 0; only random orders, and those with ties broken at random, have several.
        units: Places of the units in the table of units, first ablated first.
    """

    criterion: str
    trial: int
    units: np.ndarray


def units_of(units: pl.DataFrame, places: np.ndarray) -> UnitSet:
    """The units at some places of a table with columns layer and unit, by layer."""
    return by_layer(units[places].select("layer", "unit").iter_rows())


def step_sets(units: pl.DataFrame, orders: Sequence[Order], counts: Sequence[int]) -> list[UnitSet]:
    """The first units of every order, a set per order and count."""
    return [units_of(units, order.units[:count]) for order in orders for count in counts]


def ablation_rows(
    keys: Mapping[str, str],
    split: str,
    curves: Sequence[tuple[str, int]],
    steps: Sequence[tuple[float, int]],
    accuracies: Accuracies,
) -> pa.Table:
    """Rows of schema ABLATIONS: every step of every curve, over all images and by class.

    Args:
        keys: Partition keys.
        split: Name of the images.
        curves: Condition and trial of each curve.
        steps: Share of all units, and number of units, that each step switches off.
        accuracies: Accuracies of all sets: curve by curve, step by step.
    """
    shown = np.flatnonzero(accuracies.images)
    names = ["", *(accuracies.classes[number] for number in shown)]
    images = np.concatenate([[accuracies.images.sum()], accuracies.images[shown]])
    correct = np.concatenate([accuracies.correct.sum(1, keepdims=True), accuracies.correct[:, shown]], axis=1)
    rows = [(*curve, *step, name) for curve in curves for step in steps for name in names]
    frame = pl.DataFrame(rows, ["condition", "trial", "fraction", "ablated", "class"], orient="row")
    frame = frame.with_columns(
        pl.Series("accuracy", (correct / images).ravel()), pl.Series("n", np.tile(images, len(correct)))
    )
    return table_of(ABLATIONS, frame, split=split, **keys)


def plot_random_orders(axes: Axes, rows: pl.DataFrame, x: str) -> None:
    """Plots mean and range of accuracy over random orders, if there are any.

    Args:
        axes: The panel.
        rows: Columns condition, accuracy and ``x``.
        x: Column of the horizontal axis.
    """
    accuracy = pl.col("accuracy")
    spread = (
        rows.filter(pl.col("condition") == RANDOM)
        .group_by(x, maintain_order=True)
        .agg(accuracy.mean().alias("mean"), accuracy.min().alias("low"), accuracy.max().alias("high"))
    )
    if len(spread):
        axes.plot(spread[x], spread["mean"], "--", color="0.4", label="random, mean and range")
        axes.fill_between(spread[x], spread["low"], spread["high"], color="0.4", alpha=0.2)
