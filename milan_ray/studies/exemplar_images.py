"""Images for figures: a unit's exemplars as the model saw them, and images of a probe."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl

from milan_ray.engine import references
from milan_ray.exemplars import masks
from milan_ray.exemplars.forward import Batch, read_inputs, read_views
from milan_ray.models.registry import ModelSpec
from milan_ray.probe.base import ImageRef
from milan_ray.schema import EXEMPLARS
from milan_ray.storage import Storage, image_blocks


def model_views(probe: references.ProbeRef, refs: Sequence[ImageRef], spec: ModelSpec) -> np.ndarray:
    """Images of a probe as a model takes them, uint8 (n, H, W, bands).

    Raises:
        MilanError: One cannot be read.
    """
    return _all(read_inputs(references.probe(probe), refs, spec))


def visible_views(probe: references.ProbeRef, refs: Sequence[ImageRef], spec: ModelSpec) -> np.ndarray:
    """Images of a probe as a model takes them, in RGB for people, uint8 (n, H, W, 3).

    Raises:
        MilanError: One cannot be read.
    """
    return _all(read_views(references.probe(probe), refs, spec.preprocess.view))  # type: ignore[arg-type]


def _all(batch: Batch) -> np.ndarray:
    return batch.complete("{reason}: every image is needed; remove it or mend it.").views


def unit_exemplars(storage: Storage, model: str, layer: str, unit: int) -> pl.DataFrame:
    """A unit's rows of schema EXEMPLARS, best first."""
    columns = ["unit", "rank", "image_id", "activation", "mask"]
    rows = pl.DataFrame(pl.from_arrow(storage.read(EXEMPLARS, columns, model=model, layer=layer)))
    return rows.filter(pl.col("unit") == unit).sort("rank")


def unit_masks(storage: Storage, model: str, layer: str, packed: Sequence[bytes]) -> np.ndarray:
    """Masks of a layer's exemplars, bool (n, H, W), in the size they are stored in."""
    meta = storage.metadata(EXEMPLARS, model=model, layer=layer) or {}
    return masks.unpack(list(packed), masks.mask_size(meta))


def exemplar_views(storage: Storage, model: str, layer: str, image_ids: Sequence[int]) -> np.ndarray:
    """Exemplars' images as the model saw them, uint8 (n, H, W, 3)."""
    meta = storage.metadata(EXEMPLARS, model=model, layer=layer) or {}
    pngs = image_blocks.read_pngs(storage, meta["probe"], meta["view"], image_ids)
    return np.stack([image_blocks.decode(pngs[image_id]) for image_id in image_ids])


def veiled(views: np.ndarray, areas: np.ndarray) -> np.ndarray:
    """Images darkened to a quarter outside of masks, as people are shown exemplars.

    Args:
        views: uint8 (n, H, W, 3).
        areas: bool (n, h, w), masks of any size.

    Returns:
        uint8 (n, H, W, 3).
    """
    rows = np.arange(views.shape[1]) * areas.shape[1] // views.shape[1]
    columns = np.arange(views.shape[2]) * areas.shape[2] // views.shape[2]
    inside = areas[:, rows[:, None], columns][..., None]
    return np.where(inside, views, views // 4)
