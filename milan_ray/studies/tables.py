"""Tables of the run directory as the studies read and write them: as data frames, and texts by unit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import polars as pl
import pyarrow as pa

from milan_ray.config import Fingerprint
from milan_ray.engine import references
from milan_ray.engine.stage import Known
from milan_ray.errors import MilanError
from milan_ray.models.registry import ModelSpec
from milan_ray.schema import ANNOTATIONS, DESCRIPTIONS, Table
from milan_ray.scoring.supported import only_supported, verdicts_config
from milan_ray.scoring.text import normalize
from milan_ray.storage import Storage

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Unit = tuple[str, str, int]
"""(model, layer, unit)."""


def read_frame(storage: Storage, table: Table, columns: Sequence[str] | None = None, **keys: str) -> pl.DataFrame:
    """Reads a partition, or some of its columns."""
    return frame_of(storage.read(table, columns, **keys))


def frame_of(rows: pa.Table) -> pl.DataFrame:
    """The same rows as a data frame."""
    return pl.DataFrame(pl.from_arrow(rows))


def table_of(table: Table, frame: pl.DataFrame, metadata: dict[str, str] | None = None, /, **keys: str) -> pa.Table:
    """Rows of a table from the frame's columns of the same names and from columns of one value."""
    frame = frame.with_columns(pl.lit(value).alias(key) for key, value in keys.items())
    return table.table({column.name: frame[column.name].to_list() for column in table.columns}, metadata)


def write_frame(storage: Storage, table: Table, frame: pl.DataFrame, config: str | Fingerprint, **keys: str) -> None:
    """Writes a partition from the frame's columns of the same names."""
    storage.write(table, table_of(table, frame, **keys), config, **keys)


def described_model(storage: Storage, ref: references.ModelRef, labeler: str) -> tuple[ModelSpec, tuple[str, ...]]:
    """A model, and its requested layers, which must all be described.

    Raises:
        MilanError: A layer has no descriptions.
    """
    spec = references.model(ref)
    layers = ref.layers or spec.layers
    described = {keys["layer"] for keys in storage.partitions(DESCRIPTIONS, labeler=labeler, model=spec.name)}
    if absent := [layer for layer in layers if layer not in described]:
        raise MilanError(
            f"{storage.root} holds no descriptions of {spec.name} {', '.join(absent)} by {labeler}: run "
            f"`python -m jobs.describe --model {spec.name} …` first, or choose --layers."
        )
    return spec, tuple(layers)


def descriptions_of(known: Known, model: str, layers: Sequence[str], labeler: str) -> dict[str, str]:
    """Layer → configuration hash of its descriptions."""
    return {layer: known.config(DESCRIPTIONS, labeler=labeler, model=model, layer=layer) for layer in layers}


def read_descriptions(
    storage: Storage, model: str, layers: Sequence[str], labeler: str, supported_by: str | None = None
) -> pl.DataFrame:
    """Columns layer, unit, description of some layers, in their order and by number of the unit.

    Args:
        storage: The run directory.
        model: The model.
        layers: Its layers.
        labeler: The labeler.
        supported_by: Only descriptions that this judge supports; None for all.

    Raises:
        MilanError: There are no verdicts by the judge, or none that supports a description.
    """
    columns = ["layer", "unit", "description"]
    units = pl.concat(
        read_frame(storage, DESCRIPTIONS, columns, labeler=labeler, model=model, layer=layer).sort("unit")
        for layer in layers
    )
    return units if supported_by is None else only_supported(storage, units, supported_by, labeler, model)


def supported_inputs(
    storage: Storage, supported_by: str | None, labeler: str, models: Mapping[str, Sequence[str]]
) -> dict[str, object]:
    """The verdicts' part of a study's fingerprint; empty without a judge, as in earlier versions.

    Args:
        storage: The run directory.
        supported_by: The judge.
        labeler: The labeler.
        models: Model → layers.

    Raises:
        MilanError: There are no verdicts by the judge.
    """
    if supported_by is None:
        return {}
    verdicts = {
        model: verdicts_config(storage, supported_by, labeler, model, layers) for model, layers in models.items()
    }
    return {"supported": {"judge": supported_by, "verdicts": verdicts}}


def settings(config: DataclassInstance) -> dict[str, object]:
    """Settings of a study for its fingerprint, without the judge of verdicts (:func:`supported_inputs` has it)."""
    return {name: value for name, value in asdict(config).items() if name != "supported_by"}


def read_annotations(
    storage: Storage, source: str, layers: Iterable[tuple[str, str]], by_annotator: bool = False
) -> dict[Unit, list[str]]:
    """Unit → its annotations, except those without words.

    Args:
        storage: The run directory.
        source: Source of the annotations.
        layers: (model, layer) pairs that have annotations from it.
        by_annotator: Sort by unit and annotator, instead of keeping the order of the table.
    """
    texts: dict[Unit, list[str]] = {}
    for model, layer in layers:
        rows = storage.read(ANNOTATIONS, ["unit", "annotator", "text"], source=source, model=model, layer=layer)
        if by_annotator:
            rows = rows.sort_by([("unit", "ascending"), ("annotator", "ascending")])
        for unit, text in zip(rows["unit"].to_pylist(), rows["text"].to_pylist(), strict=True):
            if normalize(text):
                texts.setdefault((model, layer, unit), []).append(text)
    return texts


def by_layer(units: Iterable[tuple[str, int]]) -> dict[str, list[int]]:
    """Layer → its units, of (layer, unit) pairs, in order of occurrence."""
    layers: dict[str, list[int]] = {}
    for layer, unit in units:
        layers.setdefault(layer, []).append(unit)
    return layers


def of_all_classes(ablations: pl.DataFrame) -> pl.DataFrame:
    """The rows of schema ABLATIONS that count the images of all classes together."""
    return ablations.filter(pl.col("class") == "")
