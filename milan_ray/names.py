"""Names that become parts of paths: those that users give, and those of features."""

from __future__ import annotations

import unicodedata
from urllib.parse import quote, unquote

from milan_ray.errors import MilanError

SIGN = "#"
"""Between a layer's path and the name of a feature set."""

LONGEST = 200
"""Bytes of a name in a path at most: with prefix and suffix it fits into 255."""

_UNSEEN = ("Cc", "Cs", "Zl", "Zp")  # Unicode's categories of control characters, halves of characters, and line breaks
_TURNING = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # make a name look like another one


def checked_name(what: str, name: str, *, slashes: bool = False) -> str:
    """Checks that a name may become part of a path, and returns it unchanged.

    Args:
        what: The named thing, for the error: ``the captioner``.
        name: The name.
        slashes: Whether it may contain ``/``, as names of models do: for names that are quoted in paths of tables.

    Raises:
        MilanError: The name is empty or too long, has invisible characters, or leads to another folder on some system.
    """
    if problem := _problem(name, slashes):
        raise MilanError(
            f"{what} cannot be called {shown(name)}: {problem}; a name becomes part of a path, so choose letters, "
            "digits, and '-', '_', '.' or spaces between them."
        )
    return name


def shown(name: str) -> str:
    """Formats a name for a message: quoted, and shortened to a line."""
    return repr(name if len(name) <= 80 else f"{name[:60]}…{name[-10:]}")


def _problem(name: str, slashes: bool) -> str | None:
    if not name.strip():
        return "it is empty"
    if any(unicodedata.category(character) in _UNSEEN or character in _TURNING for character in name):
        return "it holds characters that cannot be seen"
    if len(quote(name, safe=" ")) > LONGEST:
        return f"it is longer than {LONGEST} bytes"
    meant = unicodedata.normalize("NFKC", unquote(name))  # as systems that normalise names may read it
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
