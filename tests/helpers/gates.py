"""Waiting for events of other processes, and jobs that stop at a chosen place: no test depends on a machine's speed."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

LIMIT = 300
"""Seconds after which a test that waits for an event fails; no event takes a tenth of them."""

Seen = TypeVar("Seen")


def wait_until(look: Callable[[], Seen], what: str, process: subprocess.Popen[Any] | None = None) -> Seen:
    """Looks again and again until there is something to see.

    Args:
        look: Returns what is true once the event has happened.
        what: The event, for the message of a failure.
        process: Whose end means that the event will not happen any more.

    Returns:
        What ``look`` returned.

    Raises:
        AssertionError: The process has ended, or :data:`LIMIT` is over.
    """
    end = time.monotonic() + LIMIT
    pause = threading.Event()
    while True:
        over = process is not None and process.poll() is not None
        if seen := look():
            return seen
        assert not over, f"the process ended before {what}"
        assert time.monotonic() < end, f"waited {LIMIT} s in vain: {what}"
        pause.wait(0.02)


def passes(where: Path) -> int:
    """How many forward passes of the network of ``plugins/slow_models.py`` have begun."""
    return len(where.read_text().split()) if where.exists() else 0


@dataclass(frozen=True)
class Gate:
    """Where a job of several processes stops: before its n-th rename to a path that matches a pattern.

    Attributes:
        folder: An empty folder of the gate's own.
        pattern: Regular expression for the target of a rename: of a file of the run directory that is complete.
        number: The rename before which, and all later ones, processes wait; counted from 1.
    """

    folder: Path
    pattern: str
    number: int

    @property
    def environment(self) -> dict[str, str]:
        """The variables of a job that stops at this gate, with those of this process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        here = Path(__file__).resolve().parent
        path = os.pathsep.join([str(here / "gate"), str(here), *filter(None, [os.environ.get("PYTHONPATH")])])
        return {
            **{name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
            "PYTHONPATH": path,
            "MILAN_TEST_GATE_FOLDER": str(self.folder),
            "MILAN_TEST_GATE_PATTERN": self.pattern,
            "MILAN_TEST_GATE_NUMBER": str(self.number),
        }

    def reached(self) -> list[int]:
        """The processes that wait, or have waited, at the gate: of the chosen rename, and of every later one."""
        file = self.folder / "reached"
        return [int(line) for line in file.read_text().split()] if file.exists() else []

    def wait(self, process: subprocess.Popen[Any]) -> None:
        """Waits until a process of the job has come to the gate."""
        wait_until(self.reached, "the gate was reached", process)

    def open(self, to: int | None = None) -> None:
        """Lets all processes go on: for good, or up to and with the rename of a number."""
        meanwhile = self.folder / "opening"
        meanwhile.write_text("" if to is None else str(to))
        meanwhile.rename(self.folder / "open")
