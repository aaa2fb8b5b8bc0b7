"""Damaged files where many are read: they are left out, and it is said."""

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
    """What a report or a search leaves out, each file said once.

    Attributes:
        what: Who reads, as its lines begin.
        said: The sentences so far.
    """

    what: str
    said: list[str] = field(default_factory=list)

    def unless_damaged(self, read: Callable[[], Result], otherwise: Other) -> Result | Other:
        """What a reading gives; something else where its file is damaged.

        Args:
            read: Reads files of a run directory.
            otherwise: What to go on with where one is damaged.
        """
        try:
            return read()
        except DamagedTable as error:
            self.note(error)
            return otherwise

    def note(self, error: DamagedTable) -> None:
        """Says that a file is left out, unless it was said before."""
        if (sentence := str(error)) not in self.said:
            self.said.append(sentence)
            say(f"{self.what}: left out: {sentence}", level="warning")
