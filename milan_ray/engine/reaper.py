"""Ends the remaining processes of a local Ray when the process that started it is gone, for whatever reason.

:mod:`milan_ray.engine.cluster` runs this file as a separate process, connected by a pipe. It identifies Ray's
processes, and all that they start, by an environment variable, and needs ``/proc``.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time

VARIABLE = "MILAN_LOCAL_RAY"
"""Environment variable of a local Ray's processes; each local Ray has its own value."""

PROC = "/proc"
PATIENCE = 30
"""Seconds after which the reaper gives up on processes that do not end."""


def members(value: str) -> list[int]:
    """The living processes that carry the variable with this value."""
    entry, pids = f"{VARIABLE}={value}".encode(), []
    for name in filter(str.isdigit, os.listdir(PROC)):
        with (
            contextlib.suppress(OSError),
            open(f"{PROC}/{name}/environ", "rb") as stream,
        ):  # has ended, or is another user's
            if entry in stream.read().split(b"\0"):
                pids.append(int(name))
    return pids


def wait(parent: int) -> None:
    """Returns when the parent has closed the pipe on standard input, or is gone."""
    # The parent's other children may hold the pipe too, so its closing alone is not enough.
    while os.getppid() == parent:
        if select.select([0], [], [], 0.5)[0]:
            return


def main(value: str, parent: int) -> None:
    """Waits for the parent's end, then kills all marked processes."""
    wait(parent)
    deadline = time.monotonic() + PATIENCE
    while (pids := members(value)) and time.monotonic() < deadline:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
