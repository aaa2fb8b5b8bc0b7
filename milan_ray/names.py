"""Names that users give and that become parts of paths: one rule for all of them."""

from __future__ import annotations

import unicodedata
from urllib.parse import quote, unquote

from milan_ray.errors import MilanError

LONGEST = 200
"""Bytes of a name, as it is written into a path: what is put before and behind it fits into 255."""

_UNSEEN = ("Cc", "Cs", "Zl", "Zp")  # Unicode's categories of control characters, halves of characters, and line breaks
_TURNING = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # make a name look like another one


def checked_name(what: str, name: str, *, slashes: bool = False) -> str:
    """A name that may become part of a path, as it was given.

    Args:
        what: What is called so, for the error: ``the captioner``.
        name: The name.
        slashes: Whether it may have ``/`` inside, as names of models have: of those that tables are kept under, where
            it is quoted.

    Raises:
        MilanError: It is empty or too long, leads to another folder, there or on another system, or cannot be seen.
    """
    if problem := _problem(name, slashes):
        raise MilanError(
            f"{what} cannot be called {shown(name)}: {problem}; a name becomes part of a path, so choose letters, "
            "digits, and '-', '_', '.' or spaces between them."
        )
    return name


def shown(name: str) -> str:
    """A name for a message: quoted, and not longer than a line."""
    return repr(name if len(name) <= 80 else f"{name[:60]}…{name[-10:]}")


def _problem(name: str, slashes: bool) -> str | None:
    if not name.strip():
        return "it is empty"
    if any(unicodedata.category(character) in _UNSEEN or character in _TURNING for character in name):
        return "it holds characters that cannot be seen"
    if len(quote(name, safe=" ")) > LONGEST:
        return f"it is longer than {LONGEST} bytes"
    meant = unicodedata.normalize("NFKC", unquote(name))  # what systems may take it for that read names in other ways
    meant = meant.translate({ord(character): "/" for character in "\\∕⁄⧸"})
    parts = meant.split("/")
    if len(parts) - 1 > (name.count("/") if slashes else 0):
        return "it holds a separator of folders"
    if not all(part.strip(". ") for part in parts):
        return "a part of it leads to another folder"
    for part in name.split("/"):
        if part[0] in "~-. " or part[-1] in ". ":
            return "it begins with '~', '-', '.' or a space, or ends with '.' or a space"
    return None
