"""Views: the exemplars' images as a model saw them, stored once per image and geometry."""

from __future__ import annotations

import io
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL import Image
from torch import nn

from milan_ray.config import ExemplarConfig, Resources, config_hash
from milan_ray.device import resolve_device
from milan_ray.errors import MilanError
from milan_ray.exemplars.forward import Forward, read_inputs
from milan_ray.models.registry import ModelSpec, source_of
from milan_ray.models.weights import weights_digest
from milan_ray.pipelines import requests
from milan_ray.pipelines.cluster import gpus_each
from milan_ray.pipelines.fanout import FEW_IMAGES, run_parallel
from milan_ray.probe.base import ImageRef
from milan_ray.progress import Progress
from milan_ray.schema import MANIFEST, VIEWS
from milan_ray.storage import Storage

BLOCK = 256
"""Images of the manifest that share one partition."""


@dataclass(frozen=True)
class Pictures:
    """Where the images of one view come from.

    Attributes:
        probe: The probe.
        digest: Its manifest's digest.
        key: The view's key, as :func:`view_key` gives it.
        model: A model with this view; a generator draws its images itself.
        config: How its exemplars were made.
    """

    probe: requests.ProbeRequest
    digest: str
    key: str
    model: requests.ModelRequest
    config: ExemplarConfig

    @property
    def hash(self) -> str:
        """The configuration hash of the view's blocks; which images a block holds is not part of it."""
        return config_hash({"views": self.digest, "view": self.key})


@dataclass(frozen=True)
class _Block:
    storage: Storage
    pictures: Pictures
    block: str
    refs: tuple[ImageRef, ...]
    resources: Resources


def block_of(image_id: int) -> str:
    """The partition that holds an image."""
    return f"{image_id // BLOCK:06d}"


def view_key(spec: ModelSpec, model: nn.Module, weights: str, config: ExemplarConfig) -> str:
    """Names the view that shows a model's exemplars: equal exactly when the pixels are.

    The views of models that take images are shared by all of the same geometry; a generator's images are its own.

    Args:
        spec: The model.
        model: The model, built.
        weights: Digest of its weights.
        config: How its exemplars are made.
    """
    view = spec.preprocess.view
    if spec.images is None and not config.truncate_bytes:
        return view.key
    identity = {"preprocess": spec.preprocess, "truncate_bytes": config.truncate_bytes}
    if spec.images is None:
        return f"{view.key}-truncated-{config_hash(identity)}"
    identity |= {
        "weights": weights,
        "structure": repr(model),
        "inputs": source_of(spec.inputs),
        "images": source_of(spec.images),
        "batch_size": spec.batch(config.batch_size),
    }
    return f"{spec.name} {config_hash(identity)}"


def ensure_views(storage: Storage, pictures: Pictures, image_ids: list[int], resources: Resources) -> None:
    """Stores the views of these images where they are missing; a block keeps what it had.

    Args:
        storage: The run directory.
        pictures: Where the images come from.
        image_ids: Manifest rows.
        resources: What of the cluster a generator may use.
    """
    manifest = storage.read(MANIFEST, ["image_id", "root", "path"], probe=pictures.digest)
    blocks: dict[str, list[int]] = {}
    for image_id in image_ids:
        blocks.setdefault(block_of(image_id), []).append(image_id)
    tasks = []
    for block, wanted in blocks.items():
        stored = _stored(storage, pictures, block)
        rows = manifest.take(sorted({*wanted, *stored})).to_pylist()
        if len(rows) > len(stored):
            refs = tuple(ImageRef(row["image_id"], row["root"], row["path"]) for row in rows)
            tasks.append(_Block(storage, pictures, block, refs, resources))
    if not tasks:
        return
    generator = requests.model(pictures.model).images is not None
    cpus, gpus = (resources.cpus_per_actor, gpus_each(resources)) if generator else (1, 0)
    with Progress(f"views {pictures.key}", sum(len(task.refs) for task in tasks), "images") as progress:
        here = len(manifest) <= FEW_IMAGES and not generator
        for index, _ in run_parallel(_write_block, tasks, cpus, gpus, here):
            progress.advance(len(tasks[index].refs))


def _stored(storage: Storage, pictures: Pictures, block: str) -> list[int]:
    """The images that a block holds already."""
    keys = {"probe": pictures.digest, "view": pictures.key, "block": block}
    if not storage.is_current(VIEWS, pictures.hash, **keys):
        return []
    return storage.read(VIEWS, ["image_id"], **keys)["image_id"].to_pylist()


def _write_block(task: _Block) -> None:
    pictures = task.pictures
    pixels = _draw(pictures, task.refs, task.resources)
    ids, pngs = [ref.image_id for ref in task.refs], [png(image) for image in pixels]
    write_block(task.storage, pictures.hash, ids, pngs, probe=pictures.digest, view=pictures.key, block=task.block)


def write_block(storage: Storage, config: str, image_ids: list[int], pngs: list[bytes], **keys: str) -> None:
    """Writes a block of views under its partition keys, with its configuration hash."""
    columns: dict[str, object] = {name: [value] * len(pngs) for name, value in keys.items()}
    storage.write(VIEWS, VIEWS.table(columns | {"image_id": image_ids, "image": pngs}), config, **keys)


def _draw(pictures: Pictures, refs: Sequence[ImageRef], resources: Resources) -> np.ndarray:
    """The images of these rows, uint8 (n, H, W, 3).

    Raises:
        MilanError: One can no longer be read, or the generator has other weights than before.
    """
    spec = requests.model(pictures.model)
    size, truncate = spec.batch(pictures.config.batch_size), pictures.config.truncate_bytes
    forward = None if spec.images is None else _generator(pictures, resources)
    drawn = []
    for start in range(0, len(refs), size):
        batch = read_inputs(requests.probe(pictures.probe), refs[start : start + size], spec)
        if batch.unreadable:
            ref, reason = batch.unreadable[0]
            raise MilanError(f"{ref.location} was read before but not now ({reason}); run the job again.")
        if forward is not None:
            drawn.append(forward.images(batch.inputs, truncate))
        elif truncate:
            drawn.append(spec.preprocess.truncated(batch.views))
        else:
            drawn.append(batch.views)
    return np.concatenate(drawn)


@lru_cache(maxsize=1)  # a worker process draws block after block
def _generator(pictures: Pictures, resources: Resources) -> Forward:
    torch.set_num_threads(resources.threads)
    spec = requests.model(pictures.model)
    model = spec.load()
    if view_key(spec, model, weights_digest(model), pictures.config) != pictures.key:
        raise MilanError(
            f"{spec.name} on {platform.node()} is not the generator whose exemplars these are; every node must see the "
            "same weights, and random ones need a seed."
        )
    return Forward(spec, model.to(resolve_device(resources.device)), (), spec.batch(pictures.config.batch_size))


def png(pixels: np.ndarray) -> bytes:
    """Encodes uint8 (H, W, 3) without loss."""
    buffer = io.BytesIO()
    # Level 1: half the time of the default for a tenth more bytes.
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def read_block(storage: Storage, digest: str, view_key: str, block: str, image_ids: list[int]) -> pa.Table:
    """The views of these images from one block, in the order asked for.

    Raises:
        MilanError: One is missing.
    """
    table = storage.read(VIEWS, ["image_id", "image"], probe=digest, view=view_key, block=block)
    places = pc.index_in(pa.array(image_ids, pa.int64()), table["image_id"].combine_chunks())
    if places.null_count:
        raise MilanError(f"views block {block} of {view_key} lacks images of the exemplars; run jobs.exemplars again.")
    return table.take(places)
