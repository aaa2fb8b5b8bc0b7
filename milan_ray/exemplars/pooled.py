"""Pooled activations: the maximum and the mean of every unit's activation map on every probe image.

Exemplars keep only the best images of each unit. Labelers and scores that compare units over a whole probe
(CLIP-Dissect, simulation scores) need all images, but as numbers instead of maps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import torch

from milan_ray.exemplars.sparse_maps import SparseMaps

POOLED_VERSION = "pooled-1"
"""Part of every fingerprint of pooled activations; increased when the arithmetic below changes its results."""

GROUP_VALUES = 2**20
"""Number of values per column that are written and read together: 4 MiB."""


def maxima(maps: torch.Tensor | SparseMaps) -> torch.Tensor:
    """The largest finite activation of every unit on every image.

    Args:
        maps: float32 (B, U, h, w).

    Returns:
        (B, U); −inf where no position is finite.
    """
    if isinstance(maps, SparseMaps):
        return maps.maxima()
    largest = maps.amax(dim=(2, 3))
    broken = ~torch.isfinite(largest)
    if broken.is_cuda or bool(broken.any()):  # on a GPU, the check would make the host wait
        clean = maps.masked_fill(~torch.isfinite(maps), -torch.inf).amax(dim=(2, 3))
        largest = torch.where(broken, clean, largest)
    return largest


def means(maps: torch.Tensor | SparseMaps) -> torch.Tensor:
    """The mean of the finite activations of every unit on every image.

    An image's means do not depend on the other images in its batch: each image is summed separately, in a fixed order.

    Args:
        maps: float32 (B, U, h, w).

    Returns:
        (B, U); NaN where no position is finite.
    """
    if isinstance(maps, SparseMaps):
        return maps.means()
    mean = maps.mean(dim=(2, 3))
    broken = ~torch.isfinite(mean)
    if broken.is_cuda or bool(broken.any()):
        finite = torch.isfinite(maps)
        total = maps.masked_fill(~finite, 0).sum(dim=(2, 3), dtype=torch.float64)
        mean = torch.where(broken, (total / finite.sum(dim=(2, 3))).to(maps.dtype), mean)
    return mean


def to_table(image_ids: np.ndarray, largest: Sequence[torch.Tensor], mean: Sequence[torch.Tensor]) -> pa.Table:
    """Converts pooled activations to a table, one row per image.

    Args:
        image_ids: int64 (n,).
        largest: Batches of :func:`maxima`, n images in all.
        mean: Batches of :func:`means`, n images in all.

    Returns:
        Columns image_id, max and mean: lists of U float32; NaN where no position was finite.
    """
    top = torch.cat(list(largest))
    top = torch.where(torch.isneginf(top), torch.nan, top)
    return pa.table(
        {"image_id": pa.array(image_ids, pa.int64()), "max": _lists(top), "mean": _lists(torch.cat(list(mean)))}
    )


def _lists(values: torch.Tensor) -> pa.ListArray:
    rows, units = values.shape
    offsets = pa.array(np.arange(rows + 1, dtype=np.int32) * units)
    return pa.ListArray.from_arrays(offsets, pa.array(values.to("cpu", torch.float32).numpy().ravel()))


def matrix(column: pa.ChunkedArray) -> np.ndarray:
    """Converts the column ``max`` or ``mean`` of a table of pooled activations to float32 (n, U)."""
    values = column.combine_chunks()
    return values.flatten().to_numpy(zero_copy_only=False).reshape(len(values), -1)


def in_groups(tables: Iterable[pa.Table], values: int = GROUP_VALUES) -> Iterator[pa.Table]:
    """Regroups rows into pieces of one size; holds little more than one piece in memory.

    The size of a piece depends only on the number of units.

    Args:
        tables: Pieces of any size, from :func:`to_table`.
        values: Values per column of each piece.
    """
    waiting: list[pa.Table] = []
    held = 0
    for table in tables:
        waiting.append(table)
        held += len(table)
        rows = max(1, values // max(1, len(table["max"][0]) if len(table) else 1))
        if held < rows:
            continue
        joined = pa.concat_tables(waiting)
        whole = held - held % rows
        for start in range(0, whole, rows):
            yield joined.slice(start, rows)
        waiting, held = [joined.slice(whole)], held - whole
    if held:
        yield pa.concat_tables(waiting)
