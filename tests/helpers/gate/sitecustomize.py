"""Python imports this when it starts, in every process of a job whose environment `gates.Gate` has set.

Every local file of a run directory is put in its place by a rename. The renames of all processes are counted; the
chosen one, and all later ones, wait until the test opens the gate, for good or up to a later one. So a test decides
where a job is killed, and not the machine's speed.
"""

import os
import re
import sys
import time
from typing import Any

PATIENCE = 600
"""Seconds that a process waits for the gate, so that none outlives a failed test for long."""


def _install(folder: str, pattern: re.Pattern[str], number: int) -> None:
    count, reached, opened = (os.path.join(folder, name) for name in ("count", "reached", "open"))

    def passes(mine: int) -> bool:
        if not os.path.exists(opened):
            return False
        with open(opened) as file:
            last = file.read()
        return not last or mine <= int(last)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event != "os.rename" or not pattern.search(os.fspath(arguments[1])):
            return
        with open(count, "a") as file:
            file.write(f"{os.fspath(arguments[1])}\n")
            place = file.tell()
        with open(count) as file:
            mine = len(file.read(place).splitlines())
        if mine < number:
            return
        with open(reached, "a") as file:
            file.write(f"{os.getpid()}\n")
        end = time.monotonic() + PATIENCE
        while not passes(mine):
            if time.monotonic() > end:
                raise RuntimeError(f"nobody opens the gate {folder}")
            time.sleep(0.02)

    sys.addaudithook(hook)


if os.environ.get("MILAN_TEST_GATE_FOLDER"):
    _install(
        os.environ["MILAN_TEST_GATE_FOLDER"],
        re.compile(os.environ["MILAN_TEST_GATE_PATTERN"]),
        int(os.environ["MILAN_TEST_GATE_NUMBER"]),
    )
