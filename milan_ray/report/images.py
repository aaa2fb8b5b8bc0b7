"""The report's pictures: one thumbnail per image and view, one strip of masks per unit."""

from __future__ import annotations

import hashlib
import io
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from PIL import Image

from milan_ray.errors import MilanError
from milan_ray.schema import VIEWS
from milan_ray.storage import Storage

THUMBNAIL = 224
"""Longest side of a thumbnail in pixels: twice the size it is shown at, for dense displays."""

_SHADE = bytes([191, 0])  # alpha of bit 0 and bit 1: black at .75 over an image leaves a quarter of its light


def image_source(probe: str, view: str, image_id: int) -> str:
    """Where the thumbnail of an image lies below the report's folder."""
    folder = hashlib.sha256(f"{probe}\n{view}".encode()).hexdigest()[:12]
    return f"images/{folder}/{image_id // 1000}/{image_id}.jpg"


def mask_strip(masks: Sequence[bytes], height: int, width: int) -> bytes:
    """A unit's masks as a veil to lay over its images: black at .75 outside the mask, transparent inside.

    Over an image it gives the reference's masked image, `image * (mask == 0 ? .25 : 1)` (REFERENCE §7,
    `as_masked_images_tensor`), without a copy of the image per unit. Small masks are repeated up to thumbnail size, so
    that a browser's smooth scaling does not blur one mask into the next.

    Args:
        masks: n masks of height·width bits each, row-major, packed big-endian.
        height: Pixels.
        width: Pixels.

    Returns:
        A PNG of one bit per pixel, the masks below each other, n·f·height × f·width with a whole f ≥ 1.
    """
    bits = np.stack([np.unpackbits(np.frombuffer(mask, np.uint8), count=height * width) for mask in masks])
    factor = math.ceil(THUMBNAIL / max(height, width))
    bits = bits.reshape(-1, width).repeat(factor, axis=0).repeat(factor, axis=1)
    strip = Image.frombytes("P", bits.shape[::-1], bits.tobytes())
    strip.putpalette(bytes(6))
    buffer = io.BytesIO()
    strip.save(buffer, "PNG", bits=1, transparency=_SHADE)
    return buffer.getvalue()


def thumbnail(png: bytes) -> bytes:
    """A view as a JPEG of at most :data:`THUMBNAIL` pixels a side."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85, subsampling=0)  # full colour resolution: views may be 64 pixels wide
    return buffer.getvalue()


def write_images(storage: Storage, folder: Path, probe: str, view: str, image_ids: set[int]) -> None:
    """Writes the thumbnails of some images of one probe and view, block by block; those already there stay.

    Raises:
        MilanError: The views table lacks one of them.
    """
    missing = {i for i in image_ids if not (folder / image_source(probe, view, i)).exists()}

    def write(image_id: int, png: bytes) -> None:
        path = folder / image_source(probe, view, image_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".tmp")
        partial.write_bytes(thumbnail(png))
        os.replace(partial, path)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for keys in storage.partitions(VIEWS, probe=probe, view=view) if missing else []:
            here = missing.intersection(storage.read(VIEWS, ["image_id"], **keys)["image_id"].to_pylist())
            if here:
                table = storage.read(VIEWS, ["image_id", "image"], **keys)
                table = table.filter(pc.field("image_id").isin(sorted(here)))
                list(pool.map(write, table["image_id"].to_pylist(), table["image"].to_pylist()))
                missing -= here
    if missing:
        raise MilanError(
            f"{storage.uri(VIEWS.name)} lacks {len(missing)} of the exemplars' images "
            f"(the first is image {min(missing)}); run `python -m jobs.exemplars` again."
        )
