"""Benchmark of a job over a million images and a zoo, whose forward passes are replayed.

Shards of one network are recorded and stored again and again under the names of a whole probe and of a whole zoo. What
is measured is what the driver and the store do then: listing what is done after a kill, reading which images were read,
merging a layer, and handing rows to actors; what passes through the store for masks and encodings of a zoo's winners;
and how many images one actor takes where the network costs next to nothing. All of it lies on this machine's disk;
requests are those that an object store would get.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from milan_ray.benchmarks import scale_network
from milan_ray.benchmarks.harness import Options, Result, alone, photographs
from milan_ray.benchmarks.requests import counting
from milan_ray.benchmarks.scale_actor import actor_ceiling
from milan_ray.benchmarks.scale_winners import Winners, encode, mask, store_winners
from milan_ray.config import ExemplarConfig, Resources
from milan_ray.engine.actor_pool import Row, run_pool
from milan_ray.engine.cluster import connected
from milan_ray.engine.model_cache import MOST_TOGETHER
from milan_ray.engine.references import ModelRef, ProbeRef
from milan_ray.engine.run_log import Cost
from milan_ray.exemplars.shard import Committed, LayerStates, to_table
from milan_ray.schema import MANIFEST
from milan_ray.stages.exemplars import Exemplars, ModelWork, Run, run_shards, shard_name, store_manifest
from milan_ray.stages.exemplars.merge import finish_images, merge_layer
from milan_ray.stages.exemplars.worker import IMAGES, IMAGES_SCHEMA, SECONDS, ExemplarWorker
from milan_ray.storage import WORK, Storage

RECORDED = 64
"""Shards that are recorded, of one actor; the last of them stands for all later ones."""

Parts = dict[str, pa.Table]


@dataclass(frozen=True)
class Job:
    """What a fresh process needs to know of the job.

    Attributes:
        run: The run.
        work: The models' work.
    """

    run: Run
    work: tuple[ModelWork, ...]


def run(options: Options) -> Iterator[Result]:
    """Stores the work of a whole zoo, and measures what the driver does with it."""
    images = options.images or (2048 if options.short else 1_281_167)
    models = options.models or (2 if options.short else 24)
    with TemporaryDirectory(prefix="milan-scale-") as folder:
        job, storing = _stored(options, folder, images, models)
        item, shards = job.work[0], job.work[0].shards(job.run.config)
        sizes = [stat.size for stat in job.run.storage.stat(f"{WORK}/{item.work}").values()]
        yield Result(
            f"store the shards of a model, {len(item.layers)} layers", (storing,), (), shards, "shards"
        ).with_facts(**{"objects of the job": len(sizes) * models, "GB of the job": sum(sizes) * models / 1e9})
        for name, function, count, unit in (
            (f"list what is done of {models} models", _resume, models, "models"),
            ("see which images a model's shards read", _finish, images, "images"),
            ("merge the largest layer", _merge, shards, "shards"),
        ):
            runs = [alone(function, job) for _ in range(options.repeats)]
            (_, requests), peak = runs[0]
            facts = {f"requests: {kind}": float(requests[kind]) for kind in sorted(requests)}
            yield Result(name, tuple(seconds for (seconds, _), _ in runs), (), count, unit).with_facts(
                **{"peak memory, MB": peak, **facts}
            )
    with TemporaryDirectory(prefix="milan-scale-") as folder:
        yield from _winners(options, folder, images, models)
    yield from actor_ceiling(options)
    rows = shards * -(-models // MOST_TOGETHER)
    handed = [alone(_submit, rows) for _ in range(options.repeats)]
    seconds, ((first, _, cpu), peak) = tuple(seconds for (_, seconds, _), _ in handed), handed[0]
    yield Result("hand rows to an actor that does nothing", seconds, (), rows, "rows").with_facts(
        **{"the first after, seconds": first, "processor time of the driver, seconds": cpu, "peak memory, MB": peak}
    )


def _winners(options: Options, folder: str, images: int, models: int) -> Iterator[Result]:
    """Computes masks and encodings of winners, and counts what is stored below the work while it is in progress."""
    job = store_winners(options, folder, images, models)
    steps: tuple[tuple[str, Callable[[Winners], tuple[float, Counter[str]]], float, str], ...] = (
        ("compute masks of one model's winners again", mask, job.images_of_model, "images"),
        (f"encode the winners of {models} models", encode, job.images_of_zoo, "images"),
    )
    for name, function, count, unit in steps:
        (seconds, requests), peak = alone(function, job)
        facts = {f"requests: {kind}": float(requests[kind]) for kind in sorted(requests)}
        yield Result(name, (seconds,), (), count, unit).with_facts(**{"peak memory, MB": peak, **facts})


def _stored(options: Options, folder: str, images: int, models: int) -> tuple[Job, float]:
    """Stores the work of all models; returns the job, and how long one model took."""
    storage, config = Storage(folder), ExemplarConfig()
    with photographs(replace(options, photos=None), 16) as photos:
        probe = ProbeRef((str(photos),))
        manifest, digest = store_manifest(storage, probe)
        ref = ModelRef(scale_network.NAME, plugins=(scale_network.__name__,))
        (item,) = Exemplars([ref], probe, config).due(storage, digest, len(manifest))
    item = replace(item, probe="scale", work="model-00", plan=replace(item.plan, images=images))
    names = [f"n{n // 1300:04d}/image-{n:08d}.jpg" for n in range(images)]
    blank = {name: [None] * images for name in ("size", "mtime_ns", "etag", "class_label", "sha256")}
    columns: dict[str, object] = {"image_id": range(images), "root": ["photos"] * images, "path": names, **blank}
    storage.write(MANIFEST, MANIFEST.table(columns), "scale", probe="scale")
    recorded = _recorded(item, config.shard(images))
    started = time.perf_counter()
    for shard in range(item.shards(config)):
        parts = _replayed(recorded, shard, config.shard(images), images)
        storage.put_piece(item.work, shard_name(shard), item.parts, parts.items())
    seconds = time.perf_counter() - started
    work = [item, *(replace(item, work=f"model-{n:02d}") for n in range(1, models))]
    for other in work[1:]:
        for path in storage.files(f"{WORK}/{item.work}"):
            target = Path(folder, path.replace(item.work, other.work, 1))
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(Path(folder, path), target)
    return Job(Run(storage, probe, config, Resources(device="cpu")), tuple(work)), seconds


def _recorded(item: ModelWork, size: int) -> list[Parts]:
    """The parts of an actor's first shards, of maps that nobody computed."""
    known: dict[str, Committed] = {}
    recorded = []
    for shard in range(min(RECORDED, -(-item.plan.images // size))):
        states = LayerStates(item.plan)
        random = torch.Generator().manual_seed(shard)
        shapes = {layer: (size, units, side, side) for layer, (units, side) in scale_network.LAYERS.items()}
        maps = {layer: torch.randn(shape, generator=random) for layer, shape in shapes.items()}
        states.update(maps, np.arange(size) + shard * size, known)
        recorded.append({item.part(layer): to_table(s, known[layer].delta(s)) for layer, s in states.states.items()})
        for layer, state in states.states.items():
            known[layer].commit(shard, state)
    return recorded


def _replayed(recorded: list[Parts], shard: int, size: int, images: int) -> Parts:
    """The parts of a shard of any number, with its own images."""
    last = min(shard, len(recorded) - 1)
    ids = np.arange(shard * size, min((shard + 1) * size, images))
    parts = {name: _shifted(table, (shard - last) * size) for name, table in recorded[last].items()}
    digests = np.random.default_rng(shard).bytes(32 * len(ids)).hex()
    columns = {"image_id": ids, "sha256": [digests[64 * n : 64 * (n + 1)] for n in range(len(ids))]}
    blank = pa.nulls(len(ids), pa.string())
    arrays = [pa.array(columns[name]) if name in columns else blank for name in IMAGES_SCHEMA.names]
    return {**parts, IMAGES: pa.Table.from_arrays(arrays, schema=IMAGES_SCHEMA.with_metadata({SECONDS: "1"}))}


def _shifted(table: pa.Table, by: int) -> pa.Table:
    """A contribution of other images."""
    lists = table["image_ids"].combine_chunks()
    ids = pa.LargeListArray.from_arrays(lists.offsets, pc.add(lists.flatten(), by))
    return table.set_column(table.schema.get_field_index("image_ids"), "image_ids", ids)


# -- in processes of their own ------------------------------------------------------------------------------------


def _resume(job: Job) -> tuple[float, Counter[str]]:
    """What a driver does before the first row, when all shards are done."""
    with _counted(job) as (counted, requests):
        started = time.perf_counter()
        run_shards(counted.run, ExemplarWorker, counted.work, [item.parts for item in counted.work], "exemplars")
        return time.perf_counter() - started, requests


def _finish(job: Job) -> tuple[float, Counter[str]]:
    """What a driver does for a model before its layers are merged."""
    with _counted(job) as (counted, requests):
        started = time.perf_counter()
        finish_images(counted.run, counted.work[0], counted.work[0].plan.images)
        return time.perf_counter() - started, requests


def _merge(job: Job) -> tuple[float, Counter[str]]:
    """What a task does for a layer."""
    item = job.work[0]
    pieces = finish_images(job.run, item, item.plan.images)[2]
    with _counted(job) as (counted, requests):
        started = time.perf_counter()
        merge_layer(counted.run, counted.work[0], pieces, Cost(images=1), item.layers[-1])
        return time.perf_counter() - started, requests


class Nothing:
    """A worker that does nothing."""

    def __init__(self, **arguments: Any) -> None:
        return

    def __call__(self, row: Row) -> Row:
        """Answers at once."""
        return {"shard": row["shard"]}


def _submit(count: int) -> tuple[float, float, float]:
    """Hands rows to an actor; returns the seconds to the first answer and from it to the last, and processor time."""
    resources = Resources(actors=1, cpus_per_actor=1, device="cpu")
    models = list(range(MOST_TOGETHER))
    rows: list[Row] = [
        {"group": 0, "models": models, "shard": n, "start": n * 256, "images": 256} for n in range(count)
    ]
    with connected(resources):
        started, cpu = time.perf_counter(), time.process_time()
        answers = run_pool(Nothing, {"threads": 1}, rows, resources)
        next(answers)
        first = time.perf_counter()
        for _ in answers:
            pass
        return first - started, time.perf_counter() - first, time.process_time() - cpu


@contextmanager
def _counted(job: Job) -> Iterator[tuple[Job, Counter[str]]]:
    """The job on a storage that counts requests, as on an object store."""
    requests: Counter[str] = Counter()
    storage = counting(job.run.storage, requests)
    yield replace(job, run=replace(job.run, storage=storage)), requests
