"""Reads text files that people write: lists, CSV and YAML out of editors and spreadsheets.

One place for what such files bring along: byte-order marks, UTF-16, blanks, quotes, semicolons, composed and
decomposed letters.
"""

from __future__ import annotations

import codecs
import csv
import io
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from milan_ray.errors import MilanError

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""Byte-order marks, and the encodings that they announce."""

_INVISIBLE = "\ufeff\u200b\u2060"
"""Marks without width that are copied along with words."""

_QUOTES = (('"', '"'), ("'", "'"), ("“", "”"), ("„", "“"), ("«", "»"))


def decode_text(data: bytes) -> str:
    """The text of a file: UTF-8, or what its byte-order mark says; the mark is dropped.

    Raises:
        UnicodeDecodeError: It is in another encoding.
    """
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    return data.decode(encoding).removeprefix("\ufeff")


def read_text(path: str | Path) -> str:
    """The text of a local file; see :func:`decode_text`.

    Raises:
        OSError: It cannot be read.
        UnicodeDecodeError: It is in another encoding.
    """
    return decode_text(Path(path).read_bytes())


def clean(text: str) -> str:
    """A word or name without the blanks around it, in composed letters (NFC)."""
    return unicodedata.normalize("NFC", text).strip().strip(_INVISIBLE).strip()


def unquoted(text: str) -> str:
    """A cleaned line without the pair of quotes around it."""
    text = clean(text)
    for left, right in _QUOTES:
        if len(text) > 1 and text.startswith(left) and text.endswith(right):
            return clean(text[len(left) : -len(right)])
    return text


def same_name(name: str) -> str:
    """What two spellings of a file's name have in common: composed letters, ``/`` between folders, no ``./``."""
    return clean(name).replace("\\", "/").removeprefix("./")


def read_lines(text: str) -> list[str]:
    """The lines of a list: cleaned, unquoted, empty ones left out."""
    return [line for line in map(unquoted, text.splitlines()) if line]


def read_rows(text: str) -> list[list[str]]:
    """The rows of a CSV, cells cleaned, empty rows left out.

    Raises:
        csv.Error: It is no CSV.
    """
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter(text), skipinitialspace=True)
    cleaned = ([clean(cell) for cell in row] for row in rows)
    return [row for row in cleaned if any(row)]


def dict_reader(text: str) -> csv.DictReader[str]:
    """The rows of a CSV by its header, which is cleaned; cells are as they are written, for what people have said."""
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter(text))
    if reader.fieldnames is not None:
        reader.fieldnames = [clean(name) for name in reader.fieldnames]
    return reader


@contextmanager
def csv_in(where: object) -> Iterator[None]:
    """Turns what is said of a damaged CSV, while its rows are read, into one sentence.

    Args:
        where: Name of the file.

    Raises:
        MilanError: It is no CSV.
    """
    try:
        yield
    except csv.Error as error:
        raise MilanError(
            f"{where} is no CSV ({error}): look whether a quote is left open, or write it again."
        ) from error


def delimiter(text: str) -> str:
    """What stands between the cells of a CSV: a comma, or the semicolon or tab that its first line has instead."""
    first = text.lstrip("\r\n").partition("\n")[0]
    if "," in first:
        return ","
    return next((mark for mark in (";", "\t") if mark in first), ",")
