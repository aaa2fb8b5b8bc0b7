"""Benchmark of a change: encodings and descriptions by this checkout and by another one, in turns, on one core.

Each version runs in a process of its own, which both stay; what counts is processor time, so that other load on the
machine matters little. The floor is the time of the matrix products and convolutions alone, at the best rate that this
core reaches.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from milan_ray.benchmarks import describing_path
from milan_ray.benchmarks.describing_path import Work
from milan_ray.benchmarks.harness import Options, Result, photographs
from milan_ray.captioner.products import Product
from milan_ray.errors import MilanError

PARTS = ("encodings", "trained", "untrained")


class Version:
    """A process that runs the parts with the package of one checkout.

    Args:
        checkout: The checkout's folder.
        arguments: Of :func:`milan_ray.benchmarks.describing_path.main`.
    """

    def __init__(self, checkout: Path, arguments: list[str]) -> None:
        environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        run = f"import runpy; runpy.run_path({str(Path(describing_path.__file__).absolute())!r}, run_name='__main__')"
        self._process = subprocess.Popen(
            [sys.executable, "-c", run, *arguments],
            cwd=checkout,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._checkout = checkout
        self._line()

    def __enter__(self) -> Version:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.communicate()

    def run(self, part: str) -> dict[str, Any]:
        """Runs a part: ``cpu`` and ``wall``, seconds, and ``result``."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{part}\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._line())
        return answer

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise MilanError(f"the benchmark fails with the package of {self._checkout}: see above.")
        return line


def run(options: Options) -> Iterator[Result]:
    """Measures every part by both versions.

    Raises:
        MilanError: There is no other checkout.
    """
    if options.against is None or not (options.against / "milan_ray").is_dir():
        raise MilanError("which version to compare with: give --against DIR, another checkout of this repository.")
    own = Path(__file__).absolute().parents[2]
    annotations = "" if options.annotations is None else str(options.annotations.absolute())
    with photographs(options, describing_path.IMAGES) as photos, ExitStack() as stack:
        arguments = [str(photos), annotations, str(int(options.short))]
        work = Work(str(photos), annotations, options.short)  # trains the captioner, if there is none
        versions = [stack.enter_context(Version(path, arguments)) for path in (own, options.against.absolute())]
        rate = best_rate(options.short)
        for part in PARTS:
            yield _compare(part, versions, options.repeats).with_facts(**_floor(work, part, rate))


def _compare(part: str, versions: list[Version], repeats: int) -> Result:
    answers: list[list[dict[str, Any]]] = [[], []]
    for turn in range(repeats):
        for side in (0, 1) if turn % 2 == 0 else (1, 0):
            answers[side].append(versions[side].run(part))
    (ours, theirs), last = (
        ([[each["cpu"] for each in side] for side in answers]),
        [side[-1]["result"] for side in answers],
    )
    wall = [min(each["wall"] for each in side) for side in answers]
    if part == "encodings":
        name, unit, work, same = "encodings", "images", describing_path.IMAGES, str(last[0] == last[1])
    else:
        best = [text[0] for text in last[0]], [text[0] for text in last[1]]
        same = f"{sum(map(str.__eq__, *best))} of {len(best[0])} descriptions, {_equal(last)} candidates"
        name, unit, work = f"descriptions, {part}", "units", describing_path.UNITS
    return Result(f"{name}, CPU seconds", tuple(ours), tuple(theirs), work, unit).with_facts(
        identical=same, least_seconds_by_the_clock=f"{wall[0]:.3f}, the other {wall[1]:.3f}"
    )


def _equal(texts: list[list[list[str]]]) -> str:
    pairs = [a == b for unit in zip(*texts, strict=True) for a, b in zip(*unit, strict=True)]
    return f"{sum(pairs)} of {len(pairs)}"


def best_rate(short: bool) -> float:
    """The best rate of float32 products on this core, floating-point operations per second."""
    rows, product = torch.rand(256, 1024), Product(torch.rand(1024, 1024))
    best = float("inf")
    for _ in range(2 if short else 50):
        started = time.process_time()
        product(rows)
        best = min(best, time.process_time() - started)
    return 2 * 256 * 1024 * 1024 / best


def _floor(work: Work, part: str, rate: float) -> dict[str, float]:
    flops = operations(work.encodings if part == "encodings" else lambda: work.descriptions(part))
    return {"GFLOP": flops / 1e9, "GFLOP_per_second": rate / 1e9, "floor_in_seconds": flops / rate}


def operations(function: Callable[[], object]) -> int:
    """The floating-point operations of a call's convolutions and matrix products."""

    def lstm(x: torch.Size, w_ih: torch.Size, w_hh: torch.Size, *rest: object, **options: object) -> int:
        return 2 * (x[0] * x[1]) * (w_ih[0] * w_ih[1] + w_hh[0] * w_hh[1])

    def linear(x: torch.Size, weight: torch.Size, *rest: object, **options: object) -> int:
        return 2 * x[0] * weight[0] * weight[1]

    own = {torch.ops.aten.mkldnn_rnn_layer: lstm, torch.ops.aten.mkldnn_linear: linear}
    with FlopCounterMode(display=False, custom_mapping=own) as counter:
        function()
    return int(counter.get_total_flops())
