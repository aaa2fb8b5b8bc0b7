"""Errors meant for the user's eyes.

Everything a user can cause (a wrong name, a missing file, a bad image) is raised as a :class:`MilanError` whose text
is one sentence: what went wrong, where, and what to do. The command line prints that sentence and exits with a
non-zero status; anything else that escapes is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from urllib.parse import unquote


class MilanError(Exception):
    """A user-facing error: one sentence saying what, where and what to do."""


class UnreadableImage(MilanError):
    """An image that cannot be used; the pipelines skip, count and list it with this reason."""


class DamagedTable(MilanError):
    """A file of a run directory that is not what it should be: torn, overwritten, or with other columns.

    A stage that can make it anew does; what reads many leaves it out and says so; else this sentence is for the user.

    Args:
        said: The sentence.
        path: The file, relative to the run directory.
    """

    def __init__(self, said: str, path: str = "") -> None:
        super().__init__(said)
        self.path = path

    @property
    def model(self) -> str | None:
        """The model that the file is about; None where it is about none."""
        found = re.search(r"(?:^|/)model=([^/]+)/", self.path)
        return None if found is None else unquote(found[1])


def unknown_name(kind: str, name: str, known: Iterable[str], hint: str = "") -> MilanError:
    """The error for a name that is not registered, with the nearest known ones.

    Args:
        kind: What was looked for, e.g. ``"model"``.
        name: The name as the user gave it.
        known: All names that would have been accepted.
        hint: A closing sentence on how to list or register names.
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=5, cutoff=0.4)
    if not near:
        near = [candidate for candidate in names if name in candidate][:5]
    nearest = f"; nearest: {', '.join(near)}" if near else ""
    return MilanError(f"unknown {kind} {name!r}{nearest}.{' ' + hint if hint else ''}")


def all_failed(failed: Mapping[str, str], tried: int) -> None:
    """Refuses to go on when nothing is left.

    Args:
        failed: Model → why it failed.
        tried: How many there were.

    Raises:
        MilanError: All of them failed; it says why.
    """
    if failed and len(failed) == tried:
        raise MilanError("; ".join(dict.fromkeys(failed.values())))


def reason(error: BaseException) -> str:
    """What an error of somebody else's says, on one line; its type when it says nothing."""
    return str(error).strip().split("\n")[0] or type(error).__name__
