"""Ends what is left of a local Ray when the process that started it is gone, however it went.

:mod:`milan_ray.engine.cluster` starts this file as a process of its own, which holds a pipe to that one. It knows
Ray's processes, and all that they start, by an environment variable, and needs ``/proc``.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time

VARIABLE = "MILAN_LOCAL_RAY"
"""Environment variable of a local Ray's processes; its value is that Ray's alone."""

PROC = "/proc"
PATIENCE = 30
"""Seconds after which processes that do not end are given up."""


def members(value: str) -> list[int]:
    """The living processes that carry the variable with this value."""
    wanted, found = f"{VARIABLE}={value}".encode(), []
    for name in filter(str.isdigit, os.listdir(PROC)):
        with contextlib.suppress(OSError), open(f"{PROC}/{name}/environ", "rb") as stream:  # ended, or another user's
            if wanted in stream.read().split(b"\0"):
                found.append(int(name))
    return found


def wait(parent: int) -> None:
    """Returns when the parent has closed the pipe on standard input, or is gone."""
    # The parent's other children may hold the pipe, too, so its end alone would not do.
    while os.getppid() == parent:
        if select.select([0], [], [], 0.5)[0]:
            return


def main(value: str, parent: int) -> None:
    """Waits, then kills."""
    wait(parent)
    deadline = time.monotonic() + PATIENCE
    while (found := members(value)) and time.monotonic() < deadline:
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
