"""Benchmark of Ray's overhead over a plain loop of the same functions: a fixed start-up cost, and a cost per shard."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from tempfile import TemporaryDirectory

from milan_ray.benchmarks.exemplars import resnet18
from milan_ray.benchmarks.harness import Options, Result, compare, elapsed, photographs
from milan_ray.benchmarks.plain_stage import PlainStage
from milan_ray.config import ExemplarConfig, Resources
from milan_ray.engine.cluster import connected
from milan_ray.engine.references import ModelRef, ProbeRef
from milan_ray.stages.exemplars import Exemplars
from milan_ray.storage import Storage

JOB = 600.0
"""Duration in seconds of the job for which the overhead is reported."""


def run(options: Options) -> Iterator[Result]:
    """Runs the exemplars stage with one Ray actor and without Ray, over few images and over three times as many."""
    few, many = (4, 8) if options.short else (128, 384)
    config = ExemplarConfig(shard_size=4 if options.short else 32)
    model = resnet18(options)
    times: dict[int, Result] = {}
    for count in (few, many):
        with photographs(options, count) as folder:
            probe = ProbeRef((str(folder),))
            ours, plain = [], []
            for _ in range(options.repeats):
                plain.append(_plain(model, probe, config))
                ours.append(_ray(model, probe, config, options.threads))
        times[count] = Result(
            f"{count} images through Ray, against a plain loop", tuple(ours), tuple(plain), count, "images"
        )
        if count == few:
            yield times[few]

    def line(seconds: dict[int, float]) -> tuple[float, float]:
        """Fits a line: fixed seconds of a run, and seconds per image."""
        slope = (seconds[many] - seconds[few]) / (many - few)
        return seconds[few] - slope * few, slope

    fixed, slope = line({count: min(result.seconds) for count, result in times.items()})
    plain_fixed, plain_slope = line({count: min(result.baseline) for count, result in times.items()})
    images = (JOB - plain_fixed) / plain_slope
    facts = {
        "Ray's fixed cost, seconds": fixed - plain_fixed,
        "Ray's cost per shard, seconds": (slope - plain_slope) * (config.shard_size or 0),
        f"overhead of a job of {JOB:.0f} s, %": 100 * ((fixed + slope * images) / JOB - 1),
    }
    yield times[many].with_facts(**facts)
    yield _import(options)


def _plain(model: ModelRef, probe: ProbeRef, config: ExemplarConfig) -> float:
    with TemporaryDirectory(prefix="milan-overhead-") as folder:
        return elapsed(lambda: PlainStage().run(Storage(folder), model, probe, config))


def _ray(model: ModelRef, probe: ProbeRef, config: ExemplarConfig, threads: int) -> float:
    resources = Resources(actors=1, cpus_per_actor=threads, device="cpu")

    def job() -> None:
        with TemporaryDirectory(prefix="milan-overhead-") as folder, connected(resources):
            Exemplars([model], probe, config).run(Storage(folder), resources)

    return elapsed(job)


def _import(options: Options) -> Result:
    def start(code: str) -> None:
        subprocess.run([sys.executable, "-c", code], check=True)

    name = "import milan_ray in a fresh interpreter, against an interpreter that does nothing"
    return compare(name, lambda: start("import milan_ray.cli"), lambda: start("pass"), options.repeats)
