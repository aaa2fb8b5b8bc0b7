"""Benchmark of a zoo: models of one view in one job, which decodes once, against a job for each of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from tempfile import TemporaryDirectory

from milan_ray.benchmarks import small_networks
from milan_ray.benchmarks.harness import Options, Result, compare, photographs
from milan_ray.config import ExemplarConfig, Resources
from milan_ray.engine.cluster import connected
from milan_ray.engine.references import ModelRef, ProbeRef
from milan_ray.stages.exemplars import Exemplars
from milan_ray.storage import Storage


def run(options: Options) -> Iterator[Result]:
    """Dissects 12 small networks over photographs in one job, against 12 jobs, on threads of one process."""
    count, models = (8, 2) if options.short else (300, len(small_networks.NETWORKS))
    refs = [ModelRef(name, plugins=(small_networks.__name__,)) for name in small_networks.NETWORKS[:models]]
    with photographs(options, count) as folder:
        probe = ProbeRef((str(folder),))
        yield compare(
            f"{models} networks of one view in one job, against {models} jobs",
            lambda: _dissect([refs], probe, options.threads),
            lambda: _dissect([[ref] for ref in refs], probe, options.threads),
            options.repeats,
            work=count * models,
            unit="images",
        )


def _dissect(jobs: Sequence[Sequence[ModelRef]], probe: ProbeRef, threads: int) -> None:
    """Runs jobs one after the other, each in a storage of its own, with few enough shards for threads."""
    for models in jobs:
        resources = Resources(cpus_per_actor=threads, device="cpu")
        with TemporaryDirectory(prefix="milan-zoo-") as folder, connected(resources):
            Exemplars(models, probe, ExemplarConfig(batch_size=16, shard_size=150)).run(Storage(folder), resources)
