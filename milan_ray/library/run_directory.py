"""Look units up in a run directory or a published set: exemplars, masks, annotations and descriptions."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from milan_ray.annotations.groups import locate
from milan_ray.annotations.merge import nearest
from milan_ray.annotations.published import PublishedSet, Sample
from milan_ray.errors import DamagedTable, MilanError, unknown_name
from milan_ray.exemplars import masks
from milan_ray.exemplars.masks import mask_size
from milan_ray.labelers.milan import MILAN
from milan_ray.schema import ANNOTATIONS, DESCRIPTIONS, EXEMPLARS, Table
from milan_ray.storage import EXEMPLARS_KEY, Storage
from milan_ray.storage.image_blocks import decode, find_images


@dataclass(frozen=True, eq=False, kw_only=True)
class Unit(Sample):
    """A unit of a run directory: a sample with all that is known of it.

    Attributes:
        model: Name of the model.
        image_ids: Rows of the probe manifest, int64 (k,).
        activations: The unit's maxima over the exemplars, float32 (k,).
        descriptions: One row per labeler, columns as in the table of descriptions.
    """

    model: str
    image_ids: np.ndarray
    activations: np.ndarray
    descriptions: pl.DataFrame

    @property
    def description(self) -> str | None:
        """What MILAN says of it; None where it is not described."""
        return next(iter(self.descriptions.filter(labeler=MILAN)["description"]), None)


class RunExemplars:
    """The exemplars of one model in a run directory, unit by unit."""

    def __init__(self, storage: Storage, model: str | None = None) -> None:
        """Finds the model's layers; exemplars are read when asked for.

        Args:
            storage: The run directory.
            model: Name of the model; None where there is but one.

        Raises:
            MilanError: No such model, or several and none named.
        """
        partitions = storage.partitions(EXEMPLARS)
        models = sorted({keys["model"] for keys in partitions})
        if not models:
            raise MilanError(f"{storage.root} holds no exemplars: give a run directory that jobs.exemplars wrote.")
        if model is None and len(models) > 1:
            raise MilanError(f"{storage.root} has exemplars of {', '.join(models)}: say which with model=.")
        self.model = models[0] if model is None else model
        if self.model not in models:
            raise unknown_name("model", self.model, models, f"These have exemplars in {storage.root}.")
        self.layers = storage.layers_in_order(
            self.model, (keys["layer"] for keys in partitions if keys["model"] == self.model)
        )
        self._storage = storage

    def units(self) -> list[tuple[str, int]]:
        """(layer, unit) of every unit that has exemplars."""
        columns = (
            (layer, self._storage.read(EXEMPLARS, ["unit"], model=self.model, layer=layer)["unit"])
            for layer in self.layers
        )
        return [(layer, unit) for layer, column in columns for unit in sorted(set(column.to_pylist()))]

    @property
    def exemplars(self) -> pl.DataFrame:
        """One row per unit and exemplar of all layers: layer, unit, rank, image_id, activation."""
        columns = ["layer", "unit", "rank", "image_id", "activation"]
        tables = [self._storage.read(EXEMPLARS, columns, model=self.model, layer=layer) for layer in self.layers]
        return as_frame(pa.concat_tables(table.replace_schema_metadata() for table in tables))

    @property
    def descriptions(self) -> pl.DataFrame:
        """One row per unit and labeler, columns as in the table of descriptions; none where nothing is described."""
        tables = [DESCRIPTIONS.schema.empty_table()]
        tables += [self._current(DESCRIPTIONS, {"model": self.model, "layer": layer}) for layer in self.layers]
        return as_frame(pa.concat_tables(table.replace_schema_metadata() for table in tables))

    def lookup(self, layer: str | int, unit: int) -> Unit:
        """Reads a unit: exemplars, masks, descriptions, annotations.

        Raises:
            MilanError: There is no such layer or unit, or the run directory lacks an image.
        """
        layer = str(layer)
        if layer not in self.layers:
            raise unknown_name("layer", layer, self.layers, f"These have exemplars in {self._storage.root}.")
        keys = {"model": self.model, "layer": layer}
        table = self._storage.read(EXEMPLARS, **keys)
        rows = table.filter(pc.field("unit") == unit).sort_by("rank")
        if not len(rows):
            raise MilanError(f"{self.model} has no exemplars of unit {unit} in layer {layer!r}: dead, or no such unit.")
        meta = self._storage.metadata(EXEMPLARS, **keys) or {}
        ids = rows["image_id"].to_numpy()
        images = self._images(meta["probe"], meta["view"], ids)
        regions = masks.unpack(rows["mask"].to_pylist(), mask_size(meta)).astype(np.float32)
        notes = as_frame(self._of_unit(ANNOTATIONS, unit, keys))
        return Unit(
            layer,
            unit,
            images.astype(np.float32) * np.float32(1 / 255),
            nearest(regions, images.shape[-2:])[:, None],
            tuple(notes["text"].to_list()),
            model=self.model,
            image_ids=ids,
            activations=rows["activation"].to_numpy(),
            descriptions=as_frame(self._of_unit(DESCRIPTIONS, unit, keys)),
        )

    def _of_unit(self, table: Table, unit: int, keys: dict[str, str]) -> pa.Table:
        return self._current(table, keys).filter(pc.field("unit") == unit)

    def _current(self, table: Table, keys: dict[str, str]) -> pa.Table:
        """A layer's rows of a table, from all partitions that speak of the exemplars that are there now."""
        current = self._storage.config_of(EXEMPLARS, **keys)
        tables = [table.schema.empty_table()]
        for partition in self._storage.partitions(table, **keys):
            if (self._storage.metadata(table, **partition) or {}).get(EXEMPLARS_KEY, current) == current:
                tables.append(self._storage.read(table, **partition))
        return pa.concat_tables(table.replace_schema_metadata() for table in tables)

    def _images(self, probe: str, view: str, image_ids: np.ndarray) -> np.ndarray:
        """The images, uint8 (k, 3, H, W)."""
        wanted = set(image_ids.tolist())
        pngs: dict[int, bytes] = {}
        damaged: list[DamagedTable] = []  # blocks of other images, perhaps
        for of_block in find_images(self._storage, probe, view, wanted, damaged.append):
            pngs |= of_block
        if missing := wanted - pngs.keys():
            if damaged:
                raise damaged[-1]
            raise MilanError(f"{self._storage.root} lacks the view of image {min(missing)}: run jobs.exemplars again.")
        return np.stack([decode(pngs[image_id]) for image_id in image_ids.tolist()]).transpose(0, 3, 1, 2)


def open_exemplars(
    source: str | os.PathLike[str], model: str | None = None, *, download: bool = False
) -> RunExemplars | PublishedSet:
    """Opens exemplars to look units up in, by ``lookup(layer, unit)``.

    Args:
        source: A run directory; or a published set: its name (``dino_vits8/imagenet``, looked for in
            ``$MILAN_DATA_DIR``), folder or zip.
        model: Which model of the run directory, where it has several.
        download: Fetch a published set that is absent.

    Raises:
        MilanError: There is nothing of the sort.
    """
    text = os.fspath(source)
    if "://" in text or os.path.isdir(os.path.join(os.path.expanduser(text), EXEMPLARS.name)):
        return RunExemplars(Storage(text), model)
    if model is not None:
        raise MilanError(f"{text} is no run directory with exemplars: model= has no meaning there.")
    locations = locate(text, download=download)
    if len(locations) > 1:
        raise MilanError(
            f"{text} is a group of sets: open one of {', '.join(location.name for location in locations)}."
        )
    return PublishedSet(locations[0].root, locations[0].name, annotation_count=locations[0].annotation_count)


def as_frame(table: pa.Table) -> pl.DataFrame:
    """An Arrow table as a polars frame."""
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)  # a series comes of an array only
    return frame
