"""Blocks of views: the PNG images that a model saw, 256 manifest rows to a partition."""

from __future__ import annotations

import io
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from milan_ray.errors import DamagedTable, MilanError
from milan_ray.schema import VIEWS
from milan_ray.storage import Storage

BLOCK = 256
"""Images of the manifest that share one partition."""

_PAUSES = (0.2, 1.0, 5.0)
"""Seconds to wait for images that another job, extending the same block, is about to put back."""


def block_of(image_id: int) -> str:
    """The partition that holds an image."""
    return f"{image_id // BLOCK:06d}"


def write_block(storage: Storage, config: str, image_ids: list[int], pngs: list[bytes], **keys: str) -> None:
    """Writes a block of views.

    Args:
        storage: The run directory.
        config: Configuration hash of the view.
        image_ids: Manifest rows, ascending.
        pngs: Their images, as PNG.
        **keys: Values of the partition keys.
    """
    columns: dict[str, object] = {name: [value] * len(pngs) for name, value in keys.items()}
    storage.write(VIEWS, VIEWS.table(columns | {"image_id": image_ids, "image": pngs}), config, **keys)


def decode(png: bytes) -> np.ndarray:
    """An exemplar's image, uint8 (H, W, 3), from its PNG."""
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def read_blocks(storage: Storage, probe: str, view: str, image_ids: Iterable[int]) -> Iterator[dict[int, bytes]]:
    """Reads images block by block, each block once.

    Yields:
        Of every block, image id → PNG.

    Raises:
        MilanError: A block lacks one of them.
    """
    blocks: dict[str, list[int]] = defaultdict(list)
    for image_id in dict.fromkeys(image_ids):
        blocks[block_of(image_id)].append(image_id)
    for block, ids in blocks.items():
        yield dict(zip(ids, _read_block(storage, ids, probe=probe, view=view, block=block), strict=True))


def _read_block(storage: Storage, image_ids: list[int], **keys: str) -> list[bytes]:
    for pause in (*_PAUSES, None):
        table = storage.read(VIEWS, ["image_id", "image"], **keys)
        places = pc.index_in(pa.array(image_ids, pa.int64()), table["image_id"].combine_chunks())
        if not places.null_count:
            images: list[bytes] = table["image"].take(places).to_pylist()
            return images
        if pause is not None:
            time.sleep(pause)
    raise MilanError(
        f"views block {keys['block']} of {keys['view']} lacks images of the exemplars; run jobs.exemplars again."
    )


def read_pngs(storage: Storage, probe: str, view: str, image_ids: Iterable[int]) -> dict[int, bytes]:
    """Reads images; see :func:`read_blocks`."""
    return {image_id: png for pngs in read_blocks(storage, probe, view, image_ids) for image_id, png in pngs.items()}


def find_images(
    storage: Storage, probe: str, view: str, image_ids: set[int], damaged: Callable[[DamagedTable], object]
) -> Iterator[dict[int, bytes]]:
    """Looks for images in all blocks of a view and passes over blocks that are damaged.

    Args:
        storage: The run directory.
        probe: Digest of the probe's manifest.
        view: Key of the view.
        image_ids: The images to look for.
        damaged: Told of every damaged block.

    Yields:
        Of every block that holds some of them, image id → PNG.
    """
    for keys in storage.partitions(VIEWS, probe=probe, view=view) if image_ids else []:
        try:
            held = storage.read(VIEWS, ["image_id"], **keys)["image_id"].to_pylist()
            if not held:
                place = storage.uri(storage.path(VIEWS, **keys))
                raise DamagedTable(f"{place} is damaged (it holds no image); delete it and run jobs.exemplars again.")
            if not (wanted := image_ids.intersection(held)):
                continue
            table = storage.read(VIEWS, ["image_id", "image"], **keys)
        except DamagedTable as error:
            damaged(error)
            continue
        table = table.filter(pc.field("image_id").isin(sorted(wanted)))
        yield dict(zip(table["image_id"].to_pylist(), table["image"].to_pylist(), strict=True))
