"""Writes the report's images: one thumbnail per image and view, and one strip of masks per unit."""

from __future__ import annotations

import hashlib
import io
import math
import os
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from milan_ray.damaged import LeftOut
from milan_ray.errors import DamagedTable, MilanError
from milan_ray.exemplars.masks import unpack
from milan_ray.report.pages import write_script
from milan_ray.schema import MANIFEST, VIEWS
from milan_ray.storage import Storage
from milan_ray.storage.image_blocks import decode, find_images

THUMBNAIL = 224
"""Longest side of a thumbnail in pixels: twice the displayed size, for high-density displays."""

FOLDER = 1000
"""Number of consecutive image ids that share a folder."""

_SMALL = 128  # pixels
_BATCH = 256  # masks read between two rounds of rendering

_SHADE = bytes([191, 0])  # alpha of bit 0 and bit 1: black at opacity .75 leaves a quarter of an image's brightness


def image_folder(probe: str, view: str) -> str:
    """Returns the folder of a probe's thumbnails, relative to the report's folder."""
    digest = hashlib.sha256(f"{probe}\n{view}".encode()).hexdigest()
    return f"images/{digest[:12]}"


def image_source(probe: str, view: str, image_id: int) -> str:
    """Returns the path of an image's thumbnail, relative to the report's folder."""
    return f"{image_folder(probe, view)}/{image_id // FOLDER}/{image_id}.jpg"


def mask_strip(masks: Sequence[bytes], height: int, width: int) -> bytes:
    """Renders a unit's masks as an overlay for its images: black at opacity .75 outside the mask, transparent inside.

    On top of an image, the overlay gives the reference's masked image, `image * (mask == 0 ? .25 : 1)` (its
    `as_masked_images_tensor`), without a copy of the image per unit. Small masks are upscaled by repetition to
    thumbnail size, so that a browser's smooth scaling does not blur adjacent masks into each other.

    Args:
        masks: n masks of height·width bits each, row-major, packed big-endian.
        height: Pixels.
        width: Pixels.

    Returns:
        A PNG of one bit per pixel with the masks stacked vertically, n·f·height × f·width with an integer f ≥ 1.
    """
    bits = unpack(list(masks), (height, width)).view(np.uint8).reshape(-1, width)
    factor = math.ceil(THUMBNAIL / max(height, width))
    if factor > 1:  # skipped for 1, because copying takes most of the time
        bits = bits.repeat(factor, axis=0).repeat(factor, axis=1)
    strip = Image.frombytes("P", bits.shape[::-1], bits.tobytes())
    strip.putpalette(bytes(6))
    buffer = io.BytesIO()
    strip.save(buffer, "PNG", bits=1, transparency=_SHADE)
    return buffer.getvalue()


def write_masks(pieces: Iterable[pa.Table], counts: Mapping[int, int], shape: tuple[int, int], folder: Path) -> None:
    """Writes the strip of every unit, `UNIT.png`. The folder appears only when all strips are written.

    Holds in memory one piece at a time, and the masks of incomplete units.

    Args:
        pieces: Columns unit, rank and mask of a layer's exemplars, in any order.
        counts: Unit → number of exemplars.
        shape: Height and width of the masks.
        folder: Folder to write; must not exist.
    """
    partial = folder.with_name(f"{folder.name}.part")
    if partial.exists():  # left by an interrupted report
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    waiting: dict[int, dict[int, bytes]] = defaultdict(dict)

    def draw(unit: int, masks: dict[int, bytes]) -> None:
        (partial / f"{unit}.png").write_bytes(mask_strip([masks[rank] for rank in sorted(masks)], *shape))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for piece in pieces:
            for batch in piece.to_batches(max_chunksize=_BATCH):
                for row in batch.to_pylist():
                    waiting[row["unit"]][row["rank"]] = row["mask"]
                ready = [unit for unit in waiting if len(waiting[unit]) == counts[unit]]
                list(pool.map(draw, ready, [waiting.pop(unit) for unit in ready]))
    partial.rename(folder)


def write_names(storage: Storage, folder: Path, probe: str, view: str, image_ids: set[int], left_out: LeftOut) -> None:
    """Writes the path and class of some images, from the manifest: one script per :data:`FOLDER` image ids.

    If the manifest is damaged, the names before the damage are written.
    """
    if left_out.unless_damaged(lambda: storage.metadata(MANIFEST, probe=probe), None) is None:
        return  # imported exemplars have no manifest

    def shown() -> Iterator[tuple[int, str | None, str]]:
        try:
            for piece in storage.stream(MANIFEST, ["image_id", "class_label", "path"], probe=probe):
                for row in piece.to_pylist():
                    if row["image_id"] in image_ids:
                        yield row["image_id"], row["class_label"], row["path"]
        except DamagedTable as error:
            left_out.note(error)

    place = image_folder(probe, view)
    for number, rows in groupby(shown(), key=lambda row: row[0] // FOLDER):
        names = {image_id: [label, path] for image_id, label, path in rows}
        write_script(folder / place / str(number) / "names.js", "milan.names", f"{place}/{number}/", names)


def thumbnail(png: bytes) -> bytes:
    """Converts a view to a JPEG of at most :data:`THUMBNAIL` pixels a side."""
    image = Image.fromarray(decode(png))
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    # Small views keep full colour resolution; chroma subsampling saves a third of the bytes of large ones.
    image.save(buffer, "JPEG", quality=85, subsampling=0 if max(image.size) <= _SMALL else 2)
    return buffer.getvalue()


def write_images(storage: Storage, folder: Path, probe: str, view: str, image_ids: set[int], left_out: LeftOut) -> None:
    """Writes the thumbnails of some images of one probe and view, block by block; existing thumbnails are kept.

    Raises:
        MilanError: The views table lacks one of the images, and no block is damaged.
    """
    before = len(left_out.said)
    missing = {i for i in image_ids if not (folder / image_source(probe, view, i)).exists()}

    def write(image_id: int, png: bytes) -> None:
        path = folder / image_source(probe, view, image_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".tmp")
        partial.write_bytes(thumbnail(png))
        os.replace(partial, path)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for pngs in find_images(storage, probe, view, missing, left_out.note):
            list(pool.map(write, pngs, pngs.values()))
            missing -= pngs.keys()
    if missing and len(left_out.said) == before:
        raise MilanError(
            f"{storage.uri(VIEWS.name)} lacks {len(missing)} of the exemplars' images "
            f"(the first is image {min(missing)}); run `python -m jobs.exemplars` again."
        )
