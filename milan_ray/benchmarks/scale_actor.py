"""The ceiling of one actor in Python, for the benchmark of scale: its network costs next to nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from milan_ray.benchmarks import scale_network
from milan_ray.benchmarks.harness import Options, Result, alone
from milan_ray.config import ExemplarConfig, Resources
from milan_ray.engine.references import ModelRef, ProbeRef
from milan_ray.models.registry import ModelSpec
from milan_ray.stages.exemplars import Exemplars, Run, store_manifest
from milan_ray.stages.exemplars.worker import ExemplarWorker, ShardReader
from milan_ray.storage import Storage

SHARD = 256
"""Images of a shard."""

WARM = 2
"""Shards that are not measured: the first ones have all that is new to the actor."""

GPU_PASS = 128
"""Images per forward pass of an actor with a GPU."""


@dataclass(frozen=True)
class _Actor:
    """What an actor is measured on.

    Attributes:
        folder: Its run directory.
        photos: Its pictures.
        shards: Number of shards.
        read_apart: Whether tasks read for it.
        images: Images per forward pass.
    """

    folder: str
    photos: str
    shards: int
    read_apart: bool
    images: int


def actor_ceiling(options: Options) -> Iterator[Result]:
    """Runs one actor's shards in a loop; what is measured is its own processor time."""
    shards = WARM + (2 if options.short else 16)
    with TemporaryDirectory(prefix="milan-pictures-") as folder:
        photos = Path(folder, "photos")
        photos.mkdir()
        for number in range(shards * SHARD):
            pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(photos / f"{number:05d}.jpg")
        for images in (16, GPU_PASS):
            for read_apart in (False, True):
                actor = _Actor(folder, str(photos), shards, read_apart, images)
                runs = [alone(_run, actor)[0] for _ in range(options.repeats)]
                reads = "tasks read for it" if read_apart else "it reads itself"
                yield Result(
                    f"one actor's processor time, passes of {images} images, {reads}",
                    tuple(runs),
                    (),
                    (shards - WARM) * SHARD,
                    "images",
                )


class _Worker(ExemplarWorker):
    """An actor with passes of a given size."""

    images = 16

    def _pass_size(self, spec: ModelSpec) -> int:
        return self.images


def _run(actor: _Actor) -> float:
    """Runs an actor's shards; returns the seconds of processor time."""
    storage, config = Storage(actor.folder), ExemplarConfig(shard_size=SHARD)
    probe = ProbeRef((actor.photos,))
    manifest, digest = store_manifest(storage, probe)
    ref = ModelRef(scale_network.THREE, plugins=(scale_network.__name__,))
    work = Exemplars([ref], probe, config).due(storage, digest, len(manifest))
    arguments = Run(storage, probe, config, Resources(device="cpu", cpus_per_actor=1)).arguments(work)
    _Worker.images = actor.images
    worker, reader, seconds = _Worker(**arguments), ShardReader(**arguments), 0.0
    for shard in range(actor.shards):
        row = {"group": 0, "models": [0], "shard": shard, "start": shard * SHARD, "images": SHARD}
        read = [reader(row)] if actor.read_apart else []
        started = time.process_time()
        worker(row, *read)
        seconds += (time.process_time() - started) * (shard >= WARM)
    return seconds
