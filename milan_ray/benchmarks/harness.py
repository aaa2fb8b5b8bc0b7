"""Times a subject against a baseline, interleaved, so that other load on the machine affects both alike.

A benchmark is a module of this package with one function ``run(options: Options) -> Iterator[Result]``, found by its
name (``milan-ray benchmark NAME``). Each result is printed as soon as it is available.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image

from milan_ray.errors import MilanError
from milan_ray.progress import say

QUIET = 1.5
"""Minimum speed-up by two threads; below it, the machine counts as busy."""

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Options:
    """Options of every benchmark.

    Attributes:
        repeats: Interleaved runs of subject and baseline.
        threads: Torch threads, already set; actors get as many.
        short: Use tiny sizes, to check in seconds that everything works. The resulting figures are meaningless.
        photos: Folder of JPEG photographs; None generates noise of the same size.
        annotations: Folder of human annotations, for benchmarks that train on real captions; None generates some.
        device: Device that the benchmark of a GPU measures.
        minutes: Minutes that it may take.
        out: Folder for its figures; None writes none.
        images: Images of the job of the benchmark of scale; None takes ImageNet's, and few where it is short.
        models: Models of that job; None takes 24, and 2 where it is short.
        against: Another checkout, for the benchmark of versions.
    """

    repeats: int = 3
    threads: int = 2
    short: bool = False
    photos: Path | None = None
    annotations: Path | None = None
    device: str = "cuda"
    minutes: float = 8.0
    out: Path | None = None
    images: int | None = None
    models: int | None = None
    against: Path | None = None


@dataclass(frozen=True)
class Result:
    """One comparison.

    Attributes:
        name: What was compared.
        seconds: The subject's times.
        baseline: The baseline's times, run for run; a single one if measured elsewhere; empty without a baseline.
        work: Amount of work in one run, in ``unit``.
        unit: What ``work`` counts, e.g. ``images``.
        facts: Further figures by name, e.g. ``{"peak memory, MB": 1210}``.
    """

    name: str
    seconds: tuple[float, ...]
    baseline: tuple[float, ...] = ()
    work: float = 1.0
    unit: str = "runs"
    facts: Mapping[str, float | str] = field(default_factory=dict)

    @property
    def ratios(self) -> tuple[float, ...]:
        """Ratio of the subject's time to the baseline's, for each interleaved pair."""
        baseline = self.baseline * len(self.seconds) if len(self.baseline) == 1 else self.baseline
        return tuple(ours / bare for ours, bare in zip(self.seconds, baseline, strict=False))

    @property
    def ratio(self) -> float:
        """Median of the pairs' ratios; NaN without a baseline."""
        return statistics.median(self.ratios) if self.ratios else float("nan")

    def with_facts(self, **facts: float | str) -> Result:
        """Returns a copy with further figures; underscores in their names become spaces."""
        return replace(self, facts={**self.facts, **{name.replace("_", " "): value for name, value in facts.items()}})

    def record(self) -> dict[str, Any]:
        """Converts the result to JSON, with ratio and spread."""
        spread = [min(self.ratios), max(self.ratios)] if self.ratios else None
        return {**asdict(self), "ratio": self.ratio if self.ratios else None, "spread": spread}

    def __str__(self) -> str:
        ours = statistics.median(self.seconds)
        text = f"{self.name}: {ours:.3g} s ({self.work / ours:.3g} {self.unit}/s)"
        if self.ratios:
            bare = statistics.median(self.baseline)
            text += (
                f", baseline {bare:.3g} s, ratio {self.ratio:.3f} ({min(self.ratios):.3f} to {max(self.ratios):.3f})"
            )
        for name, value in self.facts.items():
            text += f"\n    {name}: {value if isinstance(value, str) else f'{value:,.4g}'}"
        return text


def compare(
    name: str,
    subject: Callable[[], object],
    baseline: Callable[[], object] | float | None,
    repeats: int,
    *,
    work: float = 1.0,
    unit: str = "runs",
    warm_up: bool = True,
) -> Result:
    """Times a subject and its baseline in turns; they alternate in starting.

    Args:
        name: What is compared.
        subject: Does the work once.
        baseline: Does the bare work once; or its seconds, measured elsewhere; or None.
        repeats: Runs of each.
        work: Amount of work in one run, in ``unit``.
        unit: What ``work`` counts.
        warm_up: Whether each runs once untimed first.
    """
    timed: list[Callable[[], object]] = [subject, *([baseline] if callable(baseline) else [])]
    if warm_up:
        for function in timed:
            function()
    seconds: dict[Callable[[], object], list[float]] = {function: [] for function in timed}
    for turn in range(repeats):
        for function in timed if turn % 2 == 0 else timed[::-1]:
            seconds[function].append(elapsed(function))
    elsewhere = () if baseline is None or callable(baseline) else (baseline,)
    bare = tuple(seconds[baseline]) if callable(baseline) else elsewhere
    return Result(name, tuple(seconds[subject]), bare, work, unit)


def elapsed(function: Callable[[], object]) -> float:
    """Measures the wall-clock seconds of one call."""
    _wait()
    started = time.perf_counter()
    function()
    _wait()
    return time.perf_counter() - started


def _wait() -> None:
    """Waits for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def alone(function: Callable[..., Answer], *arguments: object) -> tuple[Answer, float]:
    """Calls a function in a fresh process.

    Args:
        function: A picklable function, defined at module level.
        *arguments: Picklable arguments.

    Returns:
        The function's result, and the process's peak resident memory in MB (Linux).
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_call_and_peak, function, torch.get_num_threads(), arguments).result()


def _call_and_peak(function: Callable[..., Answer], threads: int, arguments: Sequence[object]) -> tuple[Answer, float]:
    torch.set_num_threads(threads)
    answer = function(*arguments)
    return answer, peak_memory()


def peak_memory() -> float:
    """Returns this process's peak resident memory so far, in MB (Linux)."""
    # Does not use getrusage, because its maximum survives exec and would be the parent's.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    kilobytes = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    return kilobytes * 1024 / 1e6


@contextmanager
def photographs(options: Options, count: int) -> Iterator[Path]:
    """Provides a folder of ``count`` JPEGs: the first given photographs, or noise of 500 × 375 pixels if none given.

    Raises:
        MilanError: The given folder has no photographs.
    """
    with TemporaryDirectory(prefix="milan-photos-") as folder:
        if options.photos is not None:
            files = sorted(path for path in options.photos.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
            if not files:
                raise MilanError(f"no JPEG photographs in --photos {options.photos}: give a folder that holds some.")
            for number, file in enumerate(files[:count]):
                os.symlink(file.absolute(), Path(folder, f"{number:05d}.jpg"))
        else:
            rng = np.random.default_rng(0)
            for number in range(count):
                coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
                coarse.resize((500, 375), Image.Resampling.BICUBIC).save(Path(folder, f"{number:05d}.jpg"), quality=90)
        yield Path(folder)


def speed_up(threads: int) -> float:
    """Measures the current speed-up of matrix products by ``threads`` threads over one."""
    square = torch.rand(1024, 1024)

    def run(count: int) -> float:
        torch.set_num_threads(count)
        return elapsed(lambda: [square @ square for _ in range(8)])

    before = torch.get_num_threads()
    run(1), run(threads)
    ratios = [run(1) / run(threads) for _ in range(5)]
    torch.set_num_threads(before)
    return statistics.median(ratios)


def machine(options: Options) -> dict[str, Any]:
    """Describes the environment of the measurements: processor, threads, versions."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": options.threads,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def run_benchmark(name: str, options: Options, json_file: Path | None = None) -> list[Result]:
    """Runs one benchmark of :data:`~milan_ray.benchmarks.BENCHMARKS`, prints its figures and writes them as JSON.

    Args:
        name: Name of the benchmark.
        options: Its options.
        json_file: File for machine and figures; None writes none.
    """
    torch.set_num_threads(options.threads)
    about = machine(options)
    if (os.cpu_count() or 1) > 1:
        about["speed_up_by_two_threads"] = round(speed_up(2), 2)
        if about["speed_up_by_two_threads"] < QUIET:
            say(
                f"the machine is BUSY: two threads are {about['speed_up_by_two_threads']} times as fast as one; "
                "figures below mean little."
            )
    say(", ".join(f"{key} {value}" for key, value in about.items() if value is not None))
    module = importlib.import_module(f"milan_ray.benchmarks.{name.replace('-', '_')}")
    results: list[Result] = []
    for result in module.run(options):
        print(result, flush=True)
        results.append(result)
    if json_file is not None:
        record = {"benchmark": name, "machine": about, "results": [result.record() for result in results]}
        json_file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return results
