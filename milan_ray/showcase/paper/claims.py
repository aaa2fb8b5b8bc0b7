"""Claims of the paper's experiments, and the results on the built-in world."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import polars as pl

from milan_ray.report.pages import number
from milan_ray.scoring.bootstrap import Interval

ROWS_SHOWN = 60
"""Maximum number of rows of a table on the page."""


@dataclass(frozen=True)
class Claim:
    """One claim of the paper.

    Attributes:
        text: The claim, in a sentence.
        paper: The paper's figures for it, and where the paper shows them.
        ours: The result on the built-in world, with intervals if there are any.
        reproduced: Whether the result has the same shape; None if this cannot be decided.
        note: The reason, or differences from the paper's experiment.
    """

    text: str
    paper: str
    ours: str
    reproduced: bool | None
    note: str = ""

    def __post_init__(self) -> None:
        if self.reproduced is not None:  # JSON cannot store numpy's booleans
            object.__setattr__(self, "reproduced", bool(self.reproduced))


@dataclass(frozen=True)
class Evidence:
    """A table of an experiment, as the page shows it.

    Attributes:
        title: Its title.
        columns: Names of its columns.
        rows: Its first rows, a text per cell.
        rows_in_all: Number of all its rows.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    rows_in_all: int


@dataclass(frozen=True)
class Section:
    """One experiment on the page.

    Attributes:
        name: Its short name.
        title: Its heading, with the paper's section.
        claims: Claims and results.
        figures: Paths of its figures in the run directory.
        tables: Its tables.
        failures: Examples of failures, in plain text.
        examples: Random examples, in plain text.
        small: Whether its sizes were those of a test.
        seconds: Duration.
        finished: Time of its end, in ISO 8601.
        error: Why it failed; empty if it did not fail.
    """

    name: str
    title: str
    claims: tuple[Claim, ...] = ()
    figures: tuple[str, ...] = ()
    tables: tuple[Evidence, ...] = ()
    failures: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()
    small: bool = False
    seconds: float = 0.0
    finished: str = ""
    error: str = ""


def evidence(title: str, frame: pl.DataFrame) -> Evidence:
    """A data frame as the page shows it."""
    rows = tuple(tuple(map(_cell, row)) for row in frame.head(ROWS_SHOWN).rows())
    return Evidence(title, tuple(frame.columns), rows, len(frame))


def _cell(value: Any) -> str:
    if value is None or isinstance(value, float):
        return number(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_cell, value))
    return str(value)


def shown(interval: Interval, spec: str = ".2f", scale: float = 1) -> str:
    """A value with the ends of its interval, all formatted in the same way."""
    value, low, high = (format(scale * end, spec) for end in interval)
    return f"{value} [{low}, {high}]"


def unit_lines(units: pl.DataFrame, count: int) -> tuple[str, ...]:
    """Some random units with their descriptions, as lines of text.

    Args:
        units: Columns model, layer, unit, description.
        count: Maximum number of units.
    """
    chosen = units.select("model", "layer", "unit", "description").sample(min(count, len(units)), seed=0)
    return tuple(f"{model} {layer} {unit}: “{text}”" for model, layer, unit, text in chosen.iter_rows())
