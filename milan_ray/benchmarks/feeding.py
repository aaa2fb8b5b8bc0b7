"""Benchmark of feeding: how busy an actor with a GPU is kept by decoding in tasks, and by decoding for itself.

The GPU is pretended: Ray is told of one, and the actor sleeps for as long as a forward pass would take. Reading,
decoding, what travels through Ray and what the actor does around its passes are the product's own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from milan_ray.benchmarks.harness import Options, Result, alone, photographs
from milan_ray.config import ExemplarConfig, Resources
from milan_ray.engine import references
from milan_ray.engine.actor_pool import Read, Row, run_pool
from milan_ray.engine.cluster import pretended
from milan_ray.engine.references import ModelRef, ProbeRef
from milan_ray.exemplars.forward import read_inputs
from milan_ray.probe.manifest import image_refs
from milan_ray.schema import MANIFEST
from milan_ray.stages.exemplars import Exemplars, ModelWork, Run, ShardsWorker, shard_name, store_manifest
from milan_ray.stages.exemplars.worker import ShardReader
from milan_ray.stages.images import read_refs
from milan_ray.storage import Storage

H100 = 0.15e-3
"""Seconds that an H100 takes per image of ResNet-18 at 224 pixels."""

SUPPLY = 1.5
"""Images that decoding supplies for each that the pretended GPU takes: enough, with some for the actor's own work."""

REPLAYING = 6
"""Tasks that replay decoding for an H100, asleep most of the time."""

OBJECT_STORE = 4 * 2**30
"""Bytes of Ray's object store: a node with a GPU has more."""


@dataclass(frozen=True)
class Feeding:
    """One run.

    Attributes:
        run: Of the exemplars stage.
        item: Its only model's work.
        shards: Number of shards.
        cpus: CPUs that decode.
        seconds: Seconds of the GPU per image.
        reader: Reads for the actor; None where the actor does.
        replayed: Seconds that this reader sleeps per image in place of decoding.
    """

    run: Run
    item: ModelWork
    shards: int
    cpus: int
    seconds: float
    reader: type[ShardReader] | None
    replayed: float = 0.0


class PretendedGpu(ShardsWorker):
    """Gives batches to a GPU that is a clock: as with CUDA, the host waits for it only at the end of a shard."""

    def __init__(self, seconds: float, replayed: float, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._seconds = seconds

    def __call__(self, row: Row, read: Read | None = None) -> Row:
        """Runs a shard; says when it began and ended."""
        started = time.time()
        return {**super().__call__(row, read), "started": started, "ended": time.time()}

    def _run(self, row: Row) -> None:
        spec = references.model(self._work[row["model"]].model)
        done = 0.0
        for _, batch in self._inputs.batches(spec, self._config.batch_size):
            done = max(done, time.monotonic()) + self._seconds * len(batch.ids)
        time.sleep(max(0.0, done - time.monotonic()))


class ReplayingReader(ShardReader):
    """Sleeps in place of decoding, and passes on black views."""

    def __init__(self, seconds: float, replayed: float, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._replayed = replayed

    def __call__(self, row: Row) -> Read | None:
        """Makes black views, as long as decoding would take."""
        item = self._work[row["models"][0]]
        refs = read_refs(self._storage, item.probe, row["start"], row["start"] + row["images"])
        time.sleep(self._replayed * len(refs))
        facts = {"places": list(range(len(refs))), "sha256": ["0" * 64] * len(refs), "unreadable": [], "notes": []}
        return Read(facts, np.zeros((len(refs), *references.model(item.model).view_shape), np.uint8))


def run(options: Options) -> Iterator[Result]:
    """Feeds a GPU that the CPUs can just feed, by tasks and by its actor, then one as fast as an H100 with replays."""
    count, shards, size = (32, 2, 16) if options.short else (256, 48, 128)
    with photographs(options, count) as folder, TemporaryDirectory(prefix="milan-feeding-") as root:
        storage, source = Storage(root), ProbeRef((str(folder),))
        job, item, each = _job(storage, source, shards, size)
        slow = SUPPLY * each / options.threads
        fed = Feeding(job, item, shards, options.threads, slow, ShardReader)
        yield _compared(
            f"photographs, for a GPU that {options.threads} CPUs can feed {SUPPLY:g} times over",
            fed, None if options.short else replace(fed, reader=None), options.repeats,
        ).with_facts(**{"decoding, ms per image of a core": 1e3 * each, "GPU, ms per image": 1e3 * slow})  # fmt: skip
        shards, size = (2, 16) if options.short else (120, 1024)
        job, item, _ = _job(storage, source, shards, size)
        fast = Feeding(job, item, shards, REPLAYING, H100, ReplayingReader, H100 * REPLAYING / SUPPLY)
        yield _compared("as fast as an H100, decoding replayed", fast, None, options.repeats)


def _job(storage: Storage, source: ProbeRef, shards: int, size: int) -> tuple[Run, ModelWork, float]:
    """A probe that repeats some photographs, as many as the shards need, and seconds to read one of them."""
    config = ExemplarConfig(batch_size=128, shard_size=size)
    manifest, digest = store_manifest(storage, source)
    (item,) = Exemplars([ModelRef("resnet18/imagenet", "random", ("layer4",))], source, config).due(
        storage, digest, len(manifest)
    )
    refs = image_refs(manifest.slice(0, 64))
    started = time.perf_counter()
    read_inputs(references.probe(source), refs, references.model(item.model))
    each = (time.perf_counter() - started) / len(refs)
    rows = np.arange(shards * size) % len(manifest)
    repeated = manifest.take(rows).set_column(0, manifest.schema.field(0), [np.arange(len(rows))])
    storage.write(MANIFEST, repeated, "feeding", probe=f"feeding-{size}")
    item = replace(item, probe=f"feeding-{size}", plan=replace(item.plan, images=len(rows)))
    return Run(storage, source, config, Resources(gpus_per_actor=1, device="cpu", actors=1)), item, each


def _compared(name: str, subject: Feeding, baseline: Feeding | None, repeats: int) -> Result:
    """Times both in turns, each in a process with a Ray of its own; without a baseline, against the GPU's own time."""
    size = subject.run.config.shard(subject.item.plan.images)
    ends: list[list[float]] = []
    bare: list[list[float]] = []
    for turn in range(repeats):
        pair = [(subject, ends), *([(baseline, bare)] if baseline else [])]
        for each, into in pair if turn % 2 == 0 else pair[::-1]:
            into.append(alone(_ends, each)[0])
    images = (subject.shards - 1) * size
    facts = _busy("GPU busy", ends, size * subject.seconds)
    if baseline:
        facts |= _busy("GPU busy where the actor decodes", bare, size * subject.seconds)
    spans = [tuple(run[-1] - run[0] for run in runs) for runs in (ends, bare)]
    return Result(name, spans[0], spans[1] or (images * subject.seconds,), images, "images").with_facts(**facts)


def _busy(what: str, runs: list[list[float]], seconds: float) -> dict[str, float]:
    """Shares of a GPU's time, over the whole of the median run and in the median shard of all.

    Args:
        what: Name of the fact.
        runs: When each run's shards ended.
        seconds: Of the GPU per shard.
    """
    between = [np.diff(run) for run in runs]
    whole = float(np.median([each.mean() for each in between]))
    return {
        f"{what}, %": 100 * seconds / whole,
        f"{what}, median shard, %": 100 * seconds / float(np.median(np.concatenate(between))),
    }


def _ends(feeding: Feeding) -> list[float]:
    """When the actor's shards ended: the first, in which it imports what it needs, counts no further than that."""
    own = 1 if feeding.reader else feeding.cpus
    cpus = feeding.cpus + own if feeding.reader else own
    run = replace(feeding.run, resources=replace(feeding.run.resources, cpus_per_actor=own))
    size = run.config.shard(feeding.item.plan.images)
    rows: Sequence[Row] = [
        {"group": 0, "models": [0], "shard": n, "name": shard_name(n), "start": n * size, "images": size}
        for n in range(feeding.shards)
    ]
    arguments = {**run.arguments([feeding.item]), "seconds": feeding.seconds, "replayed": feeding.replayed}
    with pretended(cpus, 1, OBJECT_STORE):
        answers = list(run_pool(PretendedGpu, arguments, list(rows), run.resources, reader=feeding.reader))
    for answer in answers:
        assert answer["models"][0]["error"] is None, answer
    return sorted(float(answer["ended"]) for answer in answers)
