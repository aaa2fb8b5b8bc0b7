"""Errors for the user.

Everything a user can cause (a wrong name, a missing file, a bad image) is raised as a :class:`MilanError` whose text
is one sentence: what happened, where, and what to do. The command line prints that sentence and exits with a
non-zero status. Any other exception is a defect of this package and keeps its traceback.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from urllib.parse import unquote


class MilanError(Exception):
    """A user-facing error: one sentence saying what, where and what to do."""


class UnreadableImage(MilanError):
    """An image that cannot be read; the pipelines skip, count and list it with this reason."""


class DamagedTable(MilanError):
    """A damaged file of a run directory: torn, overwritten, or with other columns.

    A stage that makes the file makes it again; a reader of many files leaves it out and says so; otherwise the error
    reaches the user.

    Args:
        message: The message.
        path: The file, relative to the run directory.
    """

    def __init__(self, message: str, path: str = "") -> None:
        super().__init__(message)
        self.path = path

    @property
    def model(self) -> str | None:
        """The model that the file belongs to, from its path; None where there is none."""
        match = re.search(r"(?:^|/)model=([^/]+)/", self.path)
        return None if match is None else unquote(match[1])


def unknown_name(kind: str, name: str, known: Iterable[str], hint: str = "") -> MilanError:
    """The error for a name that is not registered, with the nearest known ones.

    Args:
        kind: Kind of the name, e.g. ``"model"``.
        name: The name as the user gave it.
        known: All accepted names.
        hint: Last sentence: how to list or register names.
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=5, cutoff=0.4)
    if not near:
        near = [candidate for candidate in names if name in candidate][:5]
    nearest = f"; nearest: {', '.join(near)}" if near else ""
    return MilanError(f"unknown {kind} {name!r}{nearest}.{' ' + hint if hint else ''}")


def all_failed(failed: Mapping[str, str], tried: int) -> None:
    """Raises an error when all models failed.

    Args:
        failed: Model → why it failed.
        tried: Number of models.

    Raises:
        MilanError: All models failed; the message has the reasons.
    """
    if failed and len(failed) == tried:
        raise MilanError("; ".join(dict.fromkeys(failed.values())))


def reason(error: BaseException) -> str:
    """The first line of another library's error message; the error's type when it is empty."""
    return str(error).strip().split("\n")[0] or type(error).__name__


@contextmanager
def explained(what: str, remedy: str, *errors: type[Exception]) -> Iterator[None]:
    """Converts errors of other libraries into one sentence: ``what (their message): remedy``.

    Args:
        what: What failed, and where.
        remedy: What to do.
        *errors: The types to convert; all types if none is given. A MilanError always passes unchanged.

    Raises:
        MilanError: In place of these errors.
    """
    converted = errors or (Exception,)
    try:
        yield
    except MilanError:
        raise
    except converted as error:
        raise MilanError(f"{what} ({reason(error)}): {remedy}") from error
