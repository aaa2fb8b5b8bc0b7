"""Masks and encodings of a zoo's winners that nobody found, for the benchmark of scale.

Winners are images at random. Masks come from a real pass over tiny pictures, encodings from an encoder of one
convolution, both in this process, so that every request below the work is counted.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from milan_ray.benchmarks import scale_network
from milan_ray.benchmarks.harness import Options
from milan_ray.benchmarks.requests import counting
from milan_ray.config import ExemplarConfig, Resources
from milan_ray.engine.references import ModelRef, ProbeRef
from milan_ray.engine.run_log import Cost
from milan_ray.engine.stage import Job, Shards, run_stage
from milan_ray.errors import MilanError
from milan_ray.exemplars.masks import pack
from milan_ray.schema import EXEMPLARS
from milan_ray.stages.captioners import EncoderRef
from milan_ray.stages.encodings import Encodings
from milan_ray.stages.exemplars import Exemplars, ModelWork, Run, store_manifest
from milan_ray.stages.exemplars.masks import MaskWorker, mask_arguments, mask_blocks, write_masked
from milan_ray.stages.exemplars.merge import WINNERS_SCHEMA, Merged
from milan_ray.stages.images import png
from milan_ray.storage import WORK, Storage
from milan_ray.storage.image_blocks import BLOCK, block_of, write_block

ENCODER = EncoderRef(scale_network.ENCODER, plugins=(scale_network.__name__,))

SIDE = 224
"""Side of the encoded exemplars' masks, pixels."""


@dataclass(frozen=True)
class Winners:
    """Winners of a zoo.

    Attributes:
        run: A run that dissects tiny pictures.
        item: The work of one of the models.
        manifest: The probe's manifest.
        models: Model → layers, whose exemplars are stored.
        images_of_model: Distinct winners of one model.
        images_of_zoo: Distinct winners of all models.
    """

    run: Run
    item: ModelWork
    manifest: pa.Table
    models: dict[str, tuple[str, ...]]
    images_of_model: int
    images_of_zoo: int


def store_winners(options: Options, folder: str, images: int, models: int) -> Winners:
    """Stores exemplars of a zoo, with their views, and the winners of one model whose masks are to be computed.

    Args:
        options: Options of the benchmark.
        folder: The run directory.
        images: Images of the probe.
        models: Models of the zoo.
    """
    storage, config = Storage(folder), ExemplarConfig()
    photos = Path(folder, "photos")
    photos.mkdir()
    for number in range(16):
        Image.fromarray(_picture(number)).save(photos / f"{number:02d}.jpg")
    probe = ProbeRef((str(photos),))
    few, digest = store_manifest(storage, probe)
    ref = ModelRef(scale_network.NAME, plugins=(scale_network.__name__,))
    (item,) = Exemplars([ref], probe, config).due(storage, digest, len(few))
    taken = pa.array(np.arange(images) % len(few))
    manifest = few.take(taken).set_column(0, "image_id", pa.array(np.arange(images)))
    rng = np.random.default_rng(0)
    used: list[np.ndarray] = []
    bits = pack(torch.from_numpy(_rectangles(rng, 64)))
    layers = tuple(scale_network.LAYERS)
    for model in range(models):
        of_model = {layer: _winners(rng, units, images, config.k) for layer, (units, _) in scale_network.LAYERS.items()}
        for layer, rows in of_model.items():
            if model == 0:
                storage.put_work(item.work, item.winners(layer), rows)
            _store_exemplars(storage, f"scale/{model:02d}", layer, rows, bits)
        used += [rows["image_id"].to_numpy() for rows in of_model.values()]
    zoo = np.unique(np.concatenate(used))
    _store_views(storage, zoo)
    names = [f"scale/{model:02d}" for model in range(models)]
    of_one = len(np.unique(np.concatenate(used[: len(layers)])))
    run = Run(storage, probe, config, Resources(device="cpu", cpus_per_actor=options.threads))
    return Winners(run, item, manifest, dict.fromkeys(names, layers), of_one, len(zoo))


def _picture(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def _rectangles(rng: np.random.Generator, count: int) -> np.ndarray:
    """Masks (count, SIDE, SIDE) of one rectangle each."""
    corners = np.sort(rng.integers(0, SIDE + 1, (count, 2, 2)), axis=1)
    (top, left), (bottom, right) = corners[:, 0].T, corners[:, 1].T
    places = np.arange(SIDE)
    rows = (places >= top[:, None]) & (places < bottom[:, None])
    columns = (places >= left[:, None]) & (places < right[:, None])
    rectangles: np.ndarray = rows[:, :, None] & columns[:, None, :]
    return rectangles


def _winners(rng: np.random.Generator, units: int, images: int, k: int) -> pa.Table:
    """The k winners of each unit, at random."""
    k = min(k, images)
    ids = np.concatenate([rng.choice(images, k, replace=False) for _ in range(units)])
    unit, rank = np.divmod(np.arange(units * k), k)
    activation, level = np.ones(len(ids), np.float32), np.full(len(ids), 0.5, np.float32)
    return pa.table([unit, rank, ids, activation, level], schema=WINNERS_SCHEMA)


def _store_exemplars(storage: Storage, model: str, layer: str, rows: pa.Table, bits: Sequence[bytes]) -> None:
    masks = [bits[n % len(bits)] for n in range(len(rows))]
    columns = {name: rows[name] for name in ("unit", "rank", "image_id", "activation")}
    metadata = {"mask_height": str(SIDE), "mask_width": str(SIDE), "probe": "scale", "view": "scale"}
    table = EXEMPLARS.table({**columns, "mask": masks}, metadata, model=model, layer=layer)
    storage.write(EXEMPLARS, table, f"{model} {layer}", model=model, layer=layer)


def _store_views(storage: Storage, ids: np.ndarray) -> None:
    pictures = [png(_picture(number)) for number in range(16)]
    for block in np.split(ids, np.flatnonzero(np.diff(ids // BLOCK)) + 1):
        shown = [pictures[n % len(pictures)] for n in block]
        write_block(storage, "scale", block.tolist(), shown, probe="scale", view="scale", block=block_of(block[0]))


# -- in processes of their own ------------------------------------------------------------------------------------


def mask(job: Winners) -> tuple[float, Counter[str]]:
    """What the driver and an actor do for a model whose maps are too large to carry.

    Returns:
        Seconds, and the requests below the work.
    """
    requests: Counter[str] = Counter()
    run = replace(job.run, storage=counting(job.run.storage, requests, WORK))
    merged = Merged(job.item, Cost(images=1), tuple(scale_network.LAYERS))
    started = time.perf_counter()
    worker = MaskWorker(**mask_arguments(run, [merged]))
    blocks = mask_blocks(run, merged, job.manifest)
    for row in blocks:
        if error := worker({**row, "model": 0})["error"]:
            raise MilanError(error)
    write_masked(run, merged, blocks, {})
    return time.perf_counter() - started, requests


class _Here(Encodings):
    """The stage in one process, where requests are counted, whatever its size."""

    few = sys.maxsize

    def shards(self, job: Job) -> Shards:
        """The shards, run by the driver."""
        return replace(super().shards(job), run_in_driver=True)


def encode(job: Winners) -> tuple[float, Counter[str]]:
    """What driver, actors and tasks do to encode the winners of a zoo.

    Returns:
        Seconds, and the requests below the work.
    """
    requests: Counter[str] = Counter()
    started = time.perf_counter()
    run_stage(_Here(job.models, ENCODER), counting(job.run.storage, requests, WORK), job.run.resources)
    return time.perf_counter() - started, requests
