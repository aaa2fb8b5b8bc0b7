"""Leaves damaged files out where many are read, with a warning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from milan_ray.errors import DamagedTable
from milan_ray.progress import say

Result = TypeVar("Result")
Other = TypeVar("Other")


@dataclass(frozen=True)
class LeftOut:
    """Files that a report or a search leaves out, with one warning for each.

    Attributes:
        what: Name of the reader, with which its warnings begin.
        said: The warnings so far.
    """

    what: str
    said: list[str] = field(default_factory=list)

    def unless_damaged(self, read: Callable[[], Result], otherwise: Other) -> Result | Other:
        """Returns the result of a read, or a replacement where a file is damaged.

        Args:
            read: Reads files of a run directory.
            otherwise: The replacement.
        """
        try:
            return read()
        except DamagedTable as error:
            self.note(error)
            return otherwise

    def note(self, error: DamagedTable) -> None:
        """Warns that a file is left out, unless it was warned of before."""
        if (sentence := str(error)) not in self.said:
            self.said.append(sentence)
            say(f"{self.what}: left out: {sentence}", level="warning")
