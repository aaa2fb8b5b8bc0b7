"""Converts raw crowdsourcing results into annotations: drops rejected rows and cleans texts with replacement tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from milan_ray.annotations.layout import read_csv, write_annotations
from milan_ray.errors import MilanError, explained

LAYER, UNIT, TEXT, REJECTED, WORKER = "Input.layer", "Input.unit", "Answer.summary", "RejectionTime", "WorkerId"
"""Columns of Mechanical Turk's results; the worker's is needed only if a table has replacements per worker."""

_Table = Mapping[str, str]


@dataclass(frozen=True)
class CleaningTables:
    """Replacement tables, applied one after the other, each from its first entry to its last.

    They apply to lower-case texts. An empty replacement deletes the matched part.

    Attributes:
        prefixes: Start of a text → replacement.
        substrings: Part of a text, everywhere → replacement.
        suffixes: End of a text → replacement.
        exact: Whole text → replacement.
        words: Misspelt word → correction; appends entries for the word with surrounding punctuation to the tables
            above.
        workers: Worker → part of a text → replacement; applied last, only to texts by that worker.
    """

    prefixes: _Table = field(default_factory=dict)
    substrings: _Table = field(default_factory=dict)
    suffixes: _Table = field(default_factory=dict)
    exact: _Table = field(default_factory=dict)
    words: _Table = field(default_factory=dict)
    workers: Mapping[str, _Table] = field(default_factory=dict)

    def spelled(self) -> CleaningTables:
        """Returns the tables with ``words`` expanded into entries of the other tables."""
        prefixes, substrings, suffixes, exact = map(dict, (self.prefixes, self.substrings, self.suffixes, self.exact))
        for word, correction in self.words.items():
            for mark in (" ", ",", "--", "-", "'", '"', ":", ";"):
                prefixes.setdefault(f"{word}{mark}", f"{correction}{mark}")
            for mark in (" ", ",", ".", "'", '"', "--", "-"):
                substrings.setdefault(f" {word}{mark}", f" {correction}{mark}")
            for mark in ("", ".", "'"):
                suffixes.setdefault(f" {word}{mark}", f" {correction}{mark}")
            exact.setdefault(word, correction)
        return CleaningTables(prefixes, substrings, suffixes, exact, {}, self.workers)

    def clean(self, text: str, worker: str = "") -> str:
        """Cleans one text: lower-cases it, applies the tables in order, strips it, then applies the worker's table."""
        text = text.lower()
        for old, new in self.prefixes.items():
            if text.startswith(old):
                text = new + text[len(old) :]
        for old, new in self.substrings.items():
            text = text.replace(old, new)
        for old, new in self.suffixes.items():
            if text.endswith(old):
                text = text[: len(text) - len(old)] + new
        for old, new in self.exact.items():
            if text == old:
                text = new
        text = text.strip()
        for old, new in self.workers.get(worker, {}).items():
            text = text.replace(old, new)
        return text


def read_tables(path: Path) -> CleaningTables:
    """Reads tables from JSON: an object with any of the fields of :class:`CleaningTables`.

    Raises:
        MilanError: The file cannot be read, or holds something else.
    """
    with explained(f"the tables in {path} cannot be read", "give a JSON file.", OSError, ValueError):
        content = json.loads(path.read_text(encoding="utf-8"))
    names = [item.name for item in fields(CleaningTables)]
    tables = dict(content) if isinstance(content, dict) else {"": None}
    workers = tables.pop("workers", {})
    every = [*tables.values(), *(workers.values() if isinstance(workers, dict) else [None])]
    if not tables.keys() <= set(names) or not all(map(_is_table, every)):
        raise MilanError(
            f"{path} is no set of tables: expected a JSON object of {', '.join(names)}, each a table of texts and "
            "replacements, workers a table of such tables."
        )
    return CleaningTables(**content)


def _is_table(value: object) -> bool:
    return isinstance(value, dict) and "" not in value and all(isinstance(text, str) for text in value.values())


def clean_results(
    results: Path, out: Path, tables: CleaningTables | None = None, *, keep_rejected: bool = False
) -> tuple[int, int]:
    """Cleans raw results into an ``annotations.csv``.

    Args:
        results: Mechanical Turk's CSV, with columns ``Input.layer``, ``Input.unit``, ``Answer.summary`` and
            ``RejectionTime``, and ``WorkerId`` if a table has replacements per worker.
        out: CSV to write, with columns layer, unit, summary; may be the same file.
        tables: Replacements to apply.
        keep_rejected: Keep rejected rows.

    Returns:
        Number of rows written, and number of rejected rows left out.

    Raises:
        MilanError: A file cannot be read or written, or a column is missing.
    """
    tables = (tables or CleaningTables()).spelled()
    needed = [LAYER, UNIT, TEXT, REJECTED, *([WORKER] if tables.workers else [])]
    rows, rejected = read_results(results, needed, keep_rejected=keep_rejected)
    cleaned = [(row[LAYER], row[UNIT], tables.clean(row[TEXT], row.get(WORKER) or "")) for row in rows]
    part = out.parent / f".{out.name}.part"
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        write_annotations(part, cleaned)
        part.replace(out)
    except OSError as error:
        raise MilanError(f"{results} cannot be cleaned into {out} ({error}).") from error
    return len(rows), rejected


def read_results(
    results: Path, needed: Sequence[str], *, keep_rejected: bool = False
) -> tuple[list[dict[str, str]], int]:
    """Reads Mechanical Turk's CSV.

    Args:
        results: The file, as downloaded.
        needed: Columns that every row must have, including :data:`REJECTED`.
        keep_rejected: Keep rejected rows.

    Returns:
        The rows, and the number of rejected rows left out.

    Raises:
        MilanError: The file cannot be read, a column is missing, or a row is incomplete.
    """
    needs = "give the results as downloaded."
    rows = [row for _, row in read_csv(results, needed, needs, "give Mechanical Turk's results as CSV.")]
    for number, row in enumerate(rows, 1):
        if any(row[column] is None for column in needed):
            raise MilanError(f"{results}: row {number} is incomplete: {needs}")
    kept = [row for row in rows if keep_rejected or not row[REJECTED].strip()]
    return kept, len(rows) - len(kept)
