"""Views: the exemplars' images as a model saw them, stored once per image and geometry."""

from __future__ import annotations

import io
import json
import platform
import uuid
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from functools import lru_cache, partial

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import nn

from milan_ray.config import ExemplarConfig, Resources, config_hash
from milan_ray.device import resolve_device
from milan_ray.engine import references
from milan_ray.engine.cluster import gpus_each
from milan_ray.engine.tasks import FEW_IMAGES, run_parallel
from milan_ray.errors import DamagedTable, MilanError
from milan_ray.exemplars.forward import Forward, read_inputs, read_views
from milan_ray.models.registry import ModelSpec, source_of
from milan_ray.models.weights import weights_digest
from milan_ray.probe.base import ImageRef, LatentProbe
from milan_ray.progress import Progress, say
from milan_ray.schema import MANIFEST, VIEWS
from milan_ray.storage import Storage
from milan_ray.storage.image_blocks import BLOCK, block_of, write_block

WANTED = "wanted"
"""Folder of a view in which jobs announce the images that they need."""

FORGET = timedelta(days=1)
"""Age at which announcements are deleted that their jobs did not withdraw, because they were killed or not alone."""


@dataclass(frozen=True)
class ExemplarImages:
    """Where the images of one view come from.

    Attributes:
        probe: The probe.
        digest: Its manifest's digest.
        key: The view's key, as :func:`view_key` gives it.
        model: A model with this view; a generator renders its images itself.
        config: How its exemplars were made.
    """

    probe: references.ProbeRef
    digest: str
    key: str
    model: references.ModelRef
    config: ExemplarConfig

    @property
    def hash(self) -> str:
        """The configuration hash of the view's blocks; which images a block holds is not part of it."""
        return config_hash({"views": self.digest, "view": self.key})


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
        "arithmetic": config.arithmetic,
    }
    return f"{spec.name} {config_hash(identity)}"


def ensure_views(storage: Storage, images: ExemplarImages, image_ids: list[int], resources: Resources) -> None:
    """Stores the views of these images where they are missing; a block keeps the images that it holds.

    Jobs of other models may extend the same blocks at the same time. None loses what another wrote: each announces the
    images that it wants before it reads a block, and looks after it has replaced one whether more were announced.

    Args:
        storage: The run directory.
        images: Where the images come from.
        image_ids: Manifest rows.
        resources: What of the cluster a generator may use.
    """
    blocks: dict[str, set[int]] = defaultdict(set)
    for image_id in image_ids:
        blocks[block_of(image_id)].add(image_id)
    tasks = [(block, wanted) for block, wanted in blocks.items() if wanted - _stored(storage, images, block)]
    if not tasks:
        return
    own = f"{_board(storage, images)}/{uuid.uuid4().hex}.json"
    storage.put(own, json.dumps(image_ids).encode())
    generator = references.model(images.model).images is not None
    cpus, gpus = (resources.cpus_per_actor, gpus_each(resources)) if generator else (1, 0)
    with Progress(f"views {images.key}", sum(len(wanted) for _, wanted in tasks), "images") as progress:
        in_driver = storage.count(MANIFEST, probe=images.digest) <= FEW_IMAGES and not generator
        write = partial(_write_block, storage, images, resources)
        for index, _ in run_parallel(write, tasks, cpus, gpus, in_driver):
            progress.advance(len(tasks[index][1]))
    _withdraw(storage, images, own)


def _keys(images: ExemplarImages, block: str) -> dict[str, str]:
    return {"probe": images.digest, "view": images.key, "block": block}


def _stored(storage: Storage, images: ExemplarImages, block: str) -> set[int]:
    """The images that a block holds already."""
    table = _read(storage, images, block, "image_id")
    return set() if table is None else set(table["image_id"].to_pylist())


def _read(storage: Storage, images: ExemplarImages, block: str, *columns: str) -> pa.Table | None:
    """Columns of a block; None where it is missing, of another view or damaged, so that it is made again."""
    keys = _keys(images, block)
    if not storage.is_current(VIEWS, images.hash, **keys):
        return None
    try:
        return storage.read(VIEWS, list(columns), **keys)
    except DamagedTable as error:
        say(f"{error} It is made anew.", level="warning")
        return None


def _announced(storage: Storage, images: ExemplarImages) -> set[str]:
    """The files in which jobs announce the images of a view that they need; deletes old ones."""
    old = datetime.now(timezone.utc) - FORGET
    recent = set()
    for path, stat in storage.stat(_board(storage, images)).items():
        if stat.modified is not None and stat.modified < old:
            storage.remove_file(path)
        else:
            recent.add(path)
    return recent


def _board(storage: Storage, images: ExemplarImages) -> str:
    return f"{storage.path(VIEWS, **_keys(images, '')).rsplit('/', 2)[0]}/{WANTED}"


def _withdraw(storage: Storage, images: ExemplarImages, own: str) -> None:
    """Withdraws an announcement, unless another job is at work, which may have to read it.

    A job that begins after this look reads blocks that are as they should be; one that began before has announced
    what it wants.
    """
    if _announced(storage, images) == {own}:
        storage.remove_file(own)


def _write_block(
    storage: Storage, images: ExemplarImages, resources: Resources, task: tuple[str, Iterable[int]]
) -> None:
    """Extends a block by the images that this job and all other jobs need."""
    block, keys = task[0], _keys(images, task[0])
    wanted, read = set(task[1]), set[str]()
    rendered: dict[int, bytes] = {}
    while True:
        for path in _announced(storage, images) - read:
            read.add(path)
            wanted.update(i for i in _read_announcement(storage, path) if block_of(i) == block)
        lacking = wanted - rendered.keys() - _stored(storage, images, block)
        if lacking:
            rendered.update(_render(images, _refs(storage, images, block, lacking), resources))
        # As late as can be: what is stored between this and the next line is found by the look after it.
        stored = _read(storage, images, block, "image_id", "image")
        if stored is None and (lost := wanted - rendered.keys()):  # their ids were legible, and their images are not
            rendered.update(_render(images, _refs(storage, images, block, lost), resources))
        together = dict(rendered)
        if stored is not None:
            together |= zip(stored["image_id"].to_pylist(), stored["image"].to_pylist(), strict=True)
        if stored is None or len(together) > len(stored):
            ids = sorted(together)
            write_block(storage, images.hash, ids, [together[image_id] for image_id in ids], **keys)
        if _announced(storage, images) <= read:
            return


def _read_announcement(storage: Storage, path: str) -> list[int]:
    try:
        image_ids = json.loads(storage.get(path))
    except FileNotFoundError:  # withdrawn since it was listed: its blocks are as they should be
        return []
    except ValueError as error:
        say(f"{storage.uri(path)} is damaged ({error}): the job that wrote it makes its own images", level="warning")
        return []
    return [image for image in image_ids if isinstance(image, int)] if isinstance(image_ids, list) else []


def read_refs(storage: Storage, probe: str, start: int, stop: int) -> list[ImageRef]:
    """References to the images in some rows of a probe's manifest."""
    rows = storage.read_rows(MANIFEST, start, stop, ["image_id", "root", "path"], probe=probe)
    return [ImageRef(**row) for row in rows.to_pylist()]


def _refs(storage: Storage, images: ExemplarImages, block: str, image_ids: set[int]) -> list[ImageRef]:
    """References to images of a block, ascending."""
    first = int(block) * BLOCK
    return [ref for ref in read_refs(storage, images.digest, first, first + BLOCK) if ref.image_id in image_ids]


def _render(images: ExemplarImages, refs: Sequence[ImageRef], resources: Resources) -> dict[int, bytes]:
    """The images of these rows as PNG, by id.

    Raises:
        MilanError: One can no longer be read, or the generator has other weights than before.
    """
    spec = references.model(images.model)
    size, truncate = spec.batch(images.config.batch_size), images.config.truncate_bytes
    forward = None if spec.images is None else _generator(images, resources)
    rendered: dict[int, bytes] = {}
    for start in range(0, len(refs), size):
        probe, rows = references.probe(images.probe), refs[start : start + size]
        if isinstance(probe, LatentProbe):
            batch = read_inputs(probe, rows, spec)
        else:
            batch = read_views(probe, rows, spec.preprocess.view)
        batch.complete("was read before but not now ({reason}); run the job again.")
        if forward is not None:
            pixels = forward.images(batch.inputs, truncate)
        else:
            pixels = spec.preprocess.truncated(batch.views) if truncate else batch.views
        rendered.update(zip(batch.ids.tolist(), map(png, pixels), strict=True))
    return rendered


@lru_cache(maxsize=1)  # a worker process renders block after block
def _generator(images: ExemplarImages, resources: Resources) -> Forward:
    torch.set_num_threads(resources.threads)
    spec = references.model(images.model)
    model = spec.load()
    if view_key(spec, model, weights_digest(model), images.config) != images.key:
        raise MilanError(
            f"{spec.name} on {platform.node()} is not the generator whose exemplars these are; every node must see the "
            "same weights, and random ones need a seed."
        )
    config = images.config
    device = resolve_device(resources.device)
    return Forward(spec, model.to(device), (), spec.batch(config.batch_size), config.arithmetic)


def png(pixels: np.ndarray) -> bytes:
    """Encodes uint8 (H, W, 3) without loss."""
    buffer = io.BytesIO()
    # Level 1: half the time of the default for a tenth more bytes.
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
