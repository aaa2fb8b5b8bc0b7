"""Benchmark on a GPU: what a machine that is lent for ten minutes can show, the most important first.

Each part gets a share of the time that is left, sizes itself by it, and is left out, with its reason, where too little
is left. Figures are written after each part, so that a machine that is taken away leaves those that it has made.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

from milan_ray.benchmarks import gpu_parts
from milan_ray.benchmarks.gpu_parts import Bench
from milan_ray.benchmarks.harness import Options, Result, machine, photographs
from milan_ray.device import resolve_device
from milan_ray.errors import MilanError
from milan_ray.progress import say

MINUTES = 8.0
"""The time that all parts share, by default."""


@dataclass(frozen=True)
class Part:
    """One part of the benchmark.

    Attributes:
        name: Its name.
        run: Measures; given the bench and the seconds that it may take.
        least: Seconds that it takes at its smallest on a GPU; with less it is left out.
        weight: Its share of the time, relative to the parts after it.
    """

    name: str
    run: Callable[[Bench, float], Iterator[Result]]
    least: float
    weight: float


PARTS = (
    Part("tables", gpu_parts.tables, 20, 2),
    Part("forward", gpu_parts.forward, 15, 2),
    Part("stage", gpu_parts.stage, 15, 1),
    Part("beam", gpu_parts.beam, 10, 1),
    Part("encoder", gpu_parts.encoder, 10, 1),
    Part("zoo", gpu_parts.zoo, 60, 3),
    Part("ray", gpu_parts.ray, 60, 2),
)
"""All parts, the most important first."""


@dataclass
class Report:
    """What was measured, and what was left out.

    Attributes:
        about: The machine.
        device: The device of the measurements.
        results: Part → its figures.
        left_out: Part → why it has none.
        seconds: Part → seconds that it took.
    """

    about: dict[str, Any]
    device: str
    results: dict[str, list[Result]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Writes ``gpu.json`` and ``gpu.md``."""
        folder.mkdir(parents=True, exist_ok=True)
        results = {part: [result.record() for result in some] for part, some in self.results.items()}
        record = {"benchmark": "gpu", "date": date.today().isoformat(), "device": self.device, "machine": self.about}
        record |= {"seconds": self.seconds, "left_out": self.left_out, "results": results}
        (folder / "gpu.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        (folder / "gpu.md").write_text(self.markdown(), encoding="utf-8")

    def markdown(self) -> str:
        """The figures as a table for BENCHMARKS.md."""
        about = self.about
        where = about["gpu"] if self.device.startswith("cuda") else f"{about['cpu']}, without a GPU"
        versions = f"{about['cores']} cores, {about['threads']} threads, torch {about['torch']}"
        lines = [f"{where}; {versions}; {date.today().isoformat()}; {sum(self.seconds.values()):.0f} s.", ""]
        lines += ["| part | measured | speed | baseline | ratio | besides |", "|---|---|---|---|---|---|"]
        lines += [f"| {part} | {_row(result)} |" for part, results in self.results.items() for result in results]
        lines += [f"| {part} | left out: {reason} | | | | |" for part, reason in self.left_out.items()]
        return "\n".join(lines) + "\n"


def _row(result: Result) -> str:
    """A result's cells, from what was measured to its facts."""
    seconds = statistics.median(result.seconds)
    speed = f"{result.work / seconds:,.4g} {result.unit}/s"
    bare = f"{result.work / statistics.median(result.baseline):,.4g} {result.unit}/s" if result.baseline else ""
    ratio = f"{result.ratio:.2f} ({min(result.ratios):.2f} to {max(result.ratios):.2f})" if result.ratios else ""
    facts = (f"{name}: {value if isinstance(value, str) else f'{value:,.4g}'}" for name, value in result.facts.items())
    return " | ".join([result.name, speed, bare, ratio, "; ".join(facts)])


def check_device(name: str) -> torch.device:
    """The device to measure.

    Raises:
        MilanError: A GPU is asked for, and there is none; the message says what is missing.
    """
    if name.startswith("cuda") and not torch.cuda.is_available():
        missing = f"torch {torch.__version__} is built without CUDA"
        if torch.version.cuda:
            missing = "no GPU or driver is found"
        raise MilanError(
            f"benchmark gpu measures a GPU, but {missing} here: run it on a machine that has one, or try it with "
            "--device cpu --short."
        )
    return resolve_device(name)


def run(options: Options) -> Iterator[Result]:
    """Runs the parts one after the other, as far as the time goes, and writes the figures after each.

    Raises:
        MilanError: There is no such device.
    """
    device = check_device(options.device)
    ends = time.monotonic() + 60 * options.minutes
    report = Report(machine(options), str(device))
    with photographs(options, gpu_parts.photo_count(options)) as folder:
        bench = Bench(options, device, folder)
        for number, part in enumerate(PARTS):
            started = time.monotonic()
            left = ends - started
            least = 0.0 if options.short and left > 0 else part.least
            if left < max(least, 1e-9):
                report.left_out[part.name] = (
                    f"it takes at least {part.least:.0f} s, and {max(0.0, left):.0f} s were left"
                )
                say(f"{part.name}: {report.left_out[part.name]}")
            else:
                share = left * part.weight / sum(later.weight for later in PARTS[number:])
                for result in part.run(bench, share):
                    report.results.setdefault(part.name, []).append(result)
                    yield result
                report.seconds[part.name] = time.monotonic() - started
            if options.out is not None:
                report.write(options.out)
