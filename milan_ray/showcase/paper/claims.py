"""Claims of the paper's experiments, and the results on the built-in world."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl


@dataclass(frozen=True)
class Claim:
    """One claim of the paper.

    Attributes:
        text: The claim, in a sentence.
        paper: The paper's figures for it, and where they stand.
        ours: What was found here, with intervals where there are any.
        reproduced: Whether the shape of the result is the same here; None where it cannot be said.
        note: Why not, or what is different here.
    """

    text: str
    paper: str
    ours: str
    reproduced: bool | None
    note: str = ""


@dataclass(frozen=True)
class Section:
    """One experiment.

    Attributes:
        name: Short name, e.g. ``editing``.
        title: Its heading, with the paper's section.
        claims: What is claimed and what was found.
        figures: Names under which its figures lie in the run directory (``schema.FIGURE``).
        tables: Title → rows.
        failures: Examples of where it goes wrong, in plain text.
        examples: Random examples, in plain text.
    """

    name: str
    title: str
    claims: tuple[Claim, ...]
    figures: tuple[str, ...] = ()
    tables: tuple[tuple[str, pl.DataFrame], ...] = ()
    failures: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()
