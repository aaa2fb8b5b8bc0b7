"""The page of the paper's experiments: every claim, the paper's figure, what was found here, and the evidence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from milan_ray.damaged import LeftOut
from milan_ray.errors import DamagedTable, MilanError
from milan_ray.progress import say
from milan_ray.report.pages import TEMPLATES, Pages, number, slug
from milan_ray.report.site import PAPER
from milan_ray.showcase.paper.claims import Claim, Section
from milan_ray.storage import Storage

FIGURES = "figures"

_ASSETS = ("report.css", "report.js", "paper.css")

FOLDER = "paper"
"""Folder of the run directory with what the page shows, a file per experiment."""

TITLE = "The paper's claims on the built-in world"

ROWS_SHOWN = 60
"""Rows of a table on the page."""


@dataclass(frozen=True)
class Evidence:
    """A table of an experiment, as the page shows it.

    Attributes:
        title: What it shows.
        columns: Names of its columns.
        rows: Its first rows, a text per cell.
        rows_in_all: How many it has.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    rows_in_all: int


@dataclass(frozen=True)
class Entry:
    """One experiment on the page.

    Attributes:
        name: Its short name.
        title: Its heading.
        claims: What is claimed and what was found.
        figures: Where its figures lie in the run directory.
        tables: Its tables.
        failures: Examples of where it goes wrong.
        examples: Random examples.
        small: Whether sizes were those of a test.
        seconds: What it took.
        finished: When, in ISO 8601.
        error: Why it could not be done; empty when it was.
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


def entry_of(section: Section, name: str, small: bool, seconds: float) -> Entry:
    """The results of an experiment, as the page shows them."""
    return Entry(
        name,
        section.title,
        tuple(_plain(claim) for claim in section.claims),
        section.figures,
        tuple(
            Evidence(
                title,
                tuple(frame.columns),
                tuple(tuple(map(_cell, row)) for row in frame.head(ROWS_SHOWN).rows()),
                len(frame),
            )
            for title, frame in section.tables
        ),
        section.failures,
        section.examples,
        small,
        seconds,
        datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def _plain(claim: Claim) -> Claim:
    """A claim whose verdict is Python's own: comparisons of numpy's numbers are not."""
    return replace(claim, reproduced=None if claim.reproduced is None else bool(claim.reproduced))


def _cell(value: Any) -> str:
    if value is None or isinstance(value, float):
        return number(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_cell, value))
    return str(value)


def store_entry(storage: Storage, entry: Entry) -> None:
    """Keeps what an experiment found, so that a later page has it without running it again."""
    storage.put(f"{FOLDER}/{entry.name}.json", json.dumps(asdict(entry), ensure_ascii=False, indent=1).encode())


def stored_entry(storage: Storage, name: str) -> Entry | None:
    """The stored results of an experiment; None if there are none, or they are damaged, which is printed."""
    path = f"{FOLDER}/{name}.json"
    if not storage.exists(path):
        return None
    try:
        return _entry(storage.json(path))
    except DamagedTable as error:
        LeftOut("page").note(error)
    except (KeyError, TypeError, AttributeError) as error:
        LeftOut("page").note(
            DamagedTable(f"{storage.uri(path)} is damaged ({error!r}); delete it and run the experiment again.")
        )
    return None


def _entry(fields: dict[str, Any]) -> Entry:
    fields |= {part: tuple(fields[part]) for part in ("figures", "failures", "examples")}
    fields["claims"] = tuple(Claim(**claim) for claim in fields["claims"])
    fields["tables"] = tuple(
        Evidence(table["title"], tuple(table["columns"]), tuple(map(tuple, table["rows"])), table["rows_in_all"])
        for table in fields["tables"]
    )
    return Entry(**fields)


def write_page(
    storage: Storage, folder: str | Path, entries: Sequence[Entry], absent: Sequence[str] = (), overview: bool = True
) -> Path:
    """Writes the page: a file that opens from disk, with its figures and style next to it and no request to anywhere.

    Args:
        storage: The run directory, which holds the figures.
        folder: The report's folder; made when missing. The page is :data:`~milan_ray.report.site.PAPER` in it.
        entries: Experiments, in the order they are shown.
        absent: Experiments that have never run here.
        overview: Whether the report's overview lies, or will lie, next to it.

    Returns:
        The path of the page.

    Raises:
        MilanError: The folder cannot be written.
    """
    page = Path(folder) / PAPER
    try:
        (page.parent / FIGURES).mkdir(parents=True, exist_ok=True)
        shown = [replace(entry, figures=tuple(_figures(storage, page.parent, entry))) for entry in entries]
        for asset in _ASSETS:
            shutil.copyfile(TEMPLATES / asset, Path(folder) / asset)
        told = [claim.reproduced for entry in shown for claim in entry.claims]
        Pages().write(
            "paper.html",
            page,
            root="../",
            title=TITLE,
            entries=shown,
            absent=absent,
            overview=overview,
            reproduced=told.count(True),
            refuted=told.count(False),
            untold=told.count(None),
            seconds=sum(entry.seconds for entry in shown),
        )
    except OSError as error:
        raise MilanError(f"the page {page} could not be written: {error}; choose a folder that can.") from error
    return page


def _figures(storage: Storage, out: Path, entry: Entry) -> list[str]:
    """Copies an experiment's figures; returns their files, relative to the page."""
    files = []
    for place, name in enumerate(entry.figures):
        path = name if name.endswith(".svg") else f"{name.removesuffix('.png')}.svg"
        if not storage.exists(path):
            say(f"page: {entry.name} has no figure {storage.uri(path)}")
            continue
        file = f"{FIGURES}/{slug(f'paper {entry.name} {place}')}.svg"
        (out / file).write_bytes(storage.get(path))
        files.append(file)
    return files
