"""The page of the paper's experiments: every claim, the paper's figure, the result on the world, and the evidence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from milan_ray.damaged import LeftOut
from milan_ray.errors import DamagedTable, MilanError
from milan_ray.progress import say
from milan_ray.report.pages import TEMPLATES, Pages, slug
from milan_ray.report.site import PAPER
from milan_ray.showcase.paper.claims import Claim, Evidence, Section
from milan_ray.storage import Storage

FIGURES = "figures"

_ASSETS = ("report.css", "report.js", "paper.css")

FOLDER = "paper"
"""Folder of the run directory with the results that the page shows, a file per experiment."""

TITLE = "The paper's claims on the built-in world"


def store_section(storage: Storage, section: Section) -> None:
    """Stores the results of an experiment, so that a later page can show them without running it again."""
    storage.put(f"{FOLDER}/{section.name}.json", json.dumps(asdict(section), ensure_ascii=False, indent=1).encode())


def stored_section(storage: Storage, name: str) -> Section | None:
    """The stored results of an experiment; None if there are none, or they are damaged, which is printed."""
    path = f"{FOLDER}/{name}.json"
    if not storage.exists(path):
        return None
    try:
        return _section(storage.json(path))
    except DamagedTable as error:
        LeftOut("page").note(error)
    except (KeyError, TypeError, AttributeError) as error:
        LeftOut("page").note(
            DamagedTable(f"{storage.uri(path)} is damaged ({error!r}); delete it and run the experiment again.")
        )
    return None


def _section(fields: dict[str, Any]) -> Section:
    fields |= {part: tuple(fields[part]) for part in ("figures", "failures", "examples")}
    fields["claims"] = tuple(Claim(**claim) for claim in fields["claims"])
    fields["tables"] = tuple(
        Evidence(table["title"], tuple(table["columns"]), tuple(map(tuple, table["rows"])), table["rows_in_all"])
        for table in fields["tables"]
    )
    return Section(**fields)


def write_page(
    storage: Storage, folder: str | Path, sections: Sequence[Section], absent: Sequence[str] = (), overview: bool = True
) -> Path:
    """Writes the page: a file that opens from disk, with its figures and styles next to it, without network requests.

    Args:
        storage: The run directory, which holds the figures.
        folder: The report's folder; made when missing. The page is :data:`~milan_ray.report.site.PAPER` in it.
        sections: Experiments, in the order of the page.
        absent: Experiments without results.
        overview: Whether to link to the report's overview.

    Returns:
        The path of the page.

    Raises:
        MilanError: The folder cannot be written.
    """
    page = Path(folder) / PAPER
    try:
        (page.parent / FIGURES).mkdir(parents=True, exist_ok=True)
        shown = [replace(section, figures=tuple(_figures(storage, page.parent, section))) for section in sections]
        for asset in _ASSETS:
            shutil.copyfile(TEMPLATES / asset, Path(folder) / asset)
        verdicts = [claim.reproduced for section in shown for claim in section.claims]
        Pages().write(
            "paper.html",
            page,
            root="../",
            title=TITLE,
            entries=shown,
            absent=absent,
            overview=overview,
            reproduced=verdicts.count(True),
            refuted=verdicts.count(False),
            untold=verdicts.count(None),
            seconds=sum(section.seconds for section in shown),
        )
    except OSError as error:
        raise MilanError(f"the page {page} could not be written: {error}; choose a folder that can.") from error
    return page


def _figures(storage: Storage, out: Path, section: Section) -> list[str]:
    """Copies an experiment's figures; returns their files, relative to the page."""
    files = []
    for place, name in enumerate(section.figures):
        path = name if name.endswith(".svg") else f"{name.removesuffix('.png')}.svg"
        if not storage.exists(path):
            say(f"page: {section.name} has no figure {storage.uri(path)}")
            continue
        file = f"{FIGURES}/{slug(f'paper {section.name} {place}')}.svg"
        (out / file).write_bytes(storage.get(path))
        files.append(file)
    return files
