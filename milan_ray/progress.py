"""Progress of long work: a bar in a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

LINE_INTERVAL = 10.0
"""Seconds between lines when the output is not a terminal."""


class Progress:
    """Counts finished items of one stage on standard error.

    Args:
        label: What is being done.
        total: Items in all.
        unit: What an item is.
    """

    def __init__(self, label: str, total: int, unit: str) -> None:
        self._label, self._total, self._unit = label, total, unit
        self._done = 0
        self._started = self._printed = time.monotonic()
        self._bar = tqdm(total=total, desc=label, unit=unit, dynamic_ncols=True) if sys.stderr.isatty() else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None:
            self._line()

    def advance(self, items: int = 1) -> None:
        """Counts finished items."""
        self._done += items
        if self._bar is not None:
            self._bar.update(items)
        elif time.monotonic() - self._printed >= LINE_INTERVAL:
            self._line()

    def _line(self) -> None:
        self._printed = time.monotonic()
        seconds = self._printed - self._started
        say(f"  {self._label}: {self._done}/{self._total} {self._unit} in {seconds:.0f} s")


def say(text: str) -> None:
    """One line for the user, on standard error."""
    print(text, file=sys.stderr, flush=True)
