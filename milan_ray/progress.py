"""Progress of long work: a bar in a terminal, a line every ten seconds in a log."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from types import TracebackType
from typing import Any

from tqdm import tqdm

LINE_INTERVAL = 10.0
"""Seconds between lines when the output is not a terminal."""


LOG = "MILAN_LOG"
"""Environment variable: ``json`` makes every line of the log a JSON object."""

QUIET = "MILAN_QUIET"
"""Environment variable: ``1`` prints only warnings and errors, and no bars."""

NOTEBOOK_WIDTH = 100
"""Characters of a bar in a notebook, whose width is unknown."""


@contextmanager
def speaking(log: str | None, quiet: bool) -> Iterator[None]:
    """Temporarily overrides log format and verbosity.

    Args:
        log: ``text`` or ``json``; None keeps the environment's setting.
        quiet: Whether to print only warnings and errors; False keeps the environment's setting.
    """
    wanted = {name: value for name, value in ((LOG, log), (QUIET, "1" if quiet else None)) if value is not None}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _quiet_wanted() -> bool:
    return os.environ.get(QUIET) == "1"


def _json_wanted() -> bool:
    return os.environ.get(LOG) == "json"


class Progress:
    """Counts finished items of one stage on standard error.

    Args:
        label: Name of the work.
        total: Number of items; None when it is unknown.
        unit: Name of an item.
        pieces: (model, layer) of every piece of work, to count the finished models and layers.
    """

    def __init__(self, label: str, total: int | None, unit: str, pieces: Iterable[tuple[str, str]] = ()) -> None:
        self._label, self._total, self._unit = label, total, unit
        self._done = 0
        self._left = Counter(pieces)
        self._started = self._printed = time.monotonic()
        # In a notebook, a bar of text needs no widgets and stays readable when the page is shared.
        width: dict[str, Any] = {"ncols": NOTEBOOK_WIDTH} if _in_notebook() else {"dynamic_ncols": True}
        self._bar = tqdm(total=total, desc=label, unit=f" {unit}", **width) if _bar_wanted() else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None:
            self._line()

    def advance(self, items: int = 1, pieces: Iterable[tuple[str, str]] = ()) -> None:
        """Counts finished items and finished pieces of work."""
        self._done += items
        self._left.subtract(pieces)
        if self._bar is not None:
            if self._left:
                self._bar.set_postfix_str(self._finished(), refresh=False)
            self._bar.update(items)
        elif time.monotonic() - self._printed >= LINE_INTERVAL:
            self._line()

    def _line(self) -> None:
        self._printed = time.monotonic()
        seconds = self._printed - self._started
        total = "" if self._total is None else f"/{self._total}"
        finished = f" ({self._finished()})" if self._left else ""
        say(
            f"  {self._label}: {self._done}{total} {self._unit} in {seconds:.0f} s{finished}",
            stage=self._label,
            done=self._done,
            total=self._total,
            unit=self._unit,
            seconds=round(seconds, 3),
        )

    def _finished(self) -> str:
        waiting = [piece for piece, left in self._left.items() if left > 0]
        models, unfinished = {model for model, _ in self._left}, {model for model, _ in waiting}
        return (
            f"{len(models) - len(unfinished)}/{len(models)} models, "
            f"{len(self._left) - len(waiting)}/{len(self._left)} layers"
        )


@contextmanager
def watched(look: Callable[[], None], interval: float = LINE_INTERVAL) -> Iterator[None]:
    """Calls a function regularly while the body runs, and once more when it has ended.

    Args:
        look: The function; it is called in a separate thread.
        interval: Seconds between two calls.
    """
    over = threading.Event()

    def watch() -> None:
        stopped = False
        while not stopped:
            stopped = over.wait(interval)
            look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def say(text: str, level: str = "info", **fields: object) -> None:
    """Prints one line for the user on standard error; with ``MILAN_LOG=json``, as a JSON object.

    Args:
        text: The message.
        level: ``info``, ``warning`` or ``error``; ``MILAN_QUIET=1`` suppresses ``info``.
        **fields: Further entries of the JSON object.
    """
    if level == "info" and _quiet_wanted():
        return
    if _json_wanted():
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        text = json.dumps({"time": now, "level": level, "message": text.strip(), **fields}, ensure_ascii=False)
    if _bar_wanted():
        tqdm.write(text, file=sys.stderr)  # above the bar, if there is one
        sys.stderr.flush()
    else:
        print(text, file=sys.stderr, flush=True)


def _bar_wanted() -> bool:
    return (sys.stderr.isatty() or _in_notebook()) and not _json_wanted() and not _quiet_wanted()


def _in_notebook() -> bool:
    """Whether a Jupyter kernel runs this process; its output cells can overwrite a line."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return getattr(shell, "kernel", None) is not None
