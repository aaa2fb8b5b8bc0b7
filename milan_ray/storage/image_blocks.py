"""Blocks of views: the PNG images that a model saw, 256 manifest rows to a partition."""

from __future__ import annotations

import time

import pyarrow as pa
import pyarrow.compute as pc

from milan_ray.errors import MilanError
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


def read_block(storage: Storage, digest: str, view_key: str, block: str, image_ids: list[int]) -> pa.Table:
    """Reads images of one block.

    Args:
        storage: The run directory.
        digest: The manifest's digest.
        view_key: The view.
        block: The block.
        image_ids: Manifest rows.

    Returns:
        Columns image_id and image (PNG), in the order asked for.

    Raises:
        MilanError: An image is missing.
    """
    for pause in (*_PAUSES, None):
        stored = storage.read(VIEWS, ["image_id", "image"], probe=digest, view=view_key, block=block)
        places = pc.index_in(pa.array(image_ids, pa.int64()), stored["image_id"].combine_chunks())
        if not places.null_count:
            return stored.take(places)
        if pause is not None:
            time.sleep(pause)
    raise MilanError(f"views block {block} of {view_key} lacks images of the exemplars; run jobs.exemplars again.")
