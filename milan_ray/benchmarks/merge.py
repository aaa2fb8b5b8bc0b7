"""Benchmark of merging shards: cost per additional shard, bytes sent by an actor, and scaling with actors."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from functools import partial
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import torch

from milan_ray.benchmarks.exemplars import resnet18
from milan_ray.benchmarks.harness import Options, Result, compare, elapsed, photographs
from milan_ray.benchmarks.plain_stage import PlainStage
from milan_ray.config import ExemplarConfig
from milan_ray.engine.references import ProbeRef
from milan_ray.exemplars.shard import Committed, LayerState, StateConfig, fold, to_table
from milan_ray.storage import Storage

IMAGES = 64
"""Images per shard, except in short runs."""

ACTORS = (1, 2, 4, 8, 16, 32, 64)


def run(options: Options) -> Iterator[Result]:
    """Folds 8 to 128 shards of one layer, then simulates 128 recorded shards on 1 to 64 actors."""
    units, shards, images = (16, 8, 16) if options.short else (32, 128, IMAGES)
    plan = StateConfig(shards * images, 15, 0.99, 2**20, 2**28)
    single = _tables(plan, units, shards, images, actors=1)
    sizes = [_bytes(table) for table in single]
    facts = {f"shard {n + 1} leaves, kB": sizes[n] / 1e3 for n in (0, 1, 3, 15, 63, 127) if n < len(sizes)}
    for count in (shards // 16, shards // 4, shards) if not options.short else (shards,):
        folding = partial(fold, single[:count], plan)
        folded = compare(f"fold {count} shards", folding, None, options.repeats, work=count, unit="shards")
        yield folded.with_facts(**facts) if count == shards else folded
    yield from _scaling(options, plan, units, shards, images)


def _tables(plan: StateConfig, units: int, shards: int, images: int, actors: int) -> list[pa.Table]:
    """Returns the output of actors that take shards in turn: a layer of 14 × 14 maps, units of different scales."""
    empty = LayerState.empty(plan, units, (14, 14))
    known = [Committed(empty) for _ in range(actors)]
    tables = []
    scale = torch.linspace(0.5, 2, units)[:, None, None]
    for shard in range(shards):
        state, actor = LayerState.empty(plan, units, (14, 14)), known[shard % actors]
        maps = torch.randn(images, units, 14, 14, generator=torch.Generator().manual_seed(shard)) * scale
        state.update(maps, np.arange(images) + shard * images, actor)
        tables.append(to_table(state, actor.delta(state)))
        actor.commit(shard, state)
    return tables


def _bytes(table: pa.Table) -> int:
    """Returns the size of a partial result in bytes, as the storage writes it."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer:
        writer.write_table(table)
    return int(sink.getvalue().size)


def _scaling(options: Options, plan: StateConfig, units: int, shards: int, images: int) -> list[Result]:
    """Estimates the seconds until the last actor is done, from recorded shard times, plus a real merge."""
    count = 8 if options.short else 128
    with photographs(options, count) as photos, TemporaryDirectory(prefix="milan-merge-") as folder:
        stage = PlainStage()
        config = ExemplarConfig(shard_size=4 if options.short else 16)
        stage.run(Storage(folder), resnet18(options), ProbeRef((str(photos),)), config)
    recorded = [stage.shards[n % len(stage.shards)] for n in range(shards)]
    alone = 0.0
    results = []
    for actors in ACTORS:
        tables = _tables(plan, units, shards, images, actors)
        merging = min(elapsed(partial(fold, tables, plan)) for _ in range(3))
        seconds = _last_done(recorded, actors) + merging
        alone = alone or seconds
        facts = {
            "merge, seconds": merging,
            "all that leaves the actors, MB": sum(map(_bytes, tables)) / 1e6,
            "speed-up": alone / seconds,
        }
        name = f"{shards} recorded shards played on {actors} actors, and merged"
        results.append(Result(name, (seconds,), (), shards, "shards", facts))
    return results


def _last_done(seconds: list[float], actors: int) -> float:
    """Returns the time when the last actor is done, if each takes the next shard as soon as it is free."""
    free = [0.0] * actors
    for duration in seconds:
        heapq.heappush(free, heapq.heappop(free) + duration)
    return max(free)
