"""Import of MILANNOTATIONS into the run directory.

published set ─► [hash images] ─► manifest ─► views ─► exemplars ─► annotations

Published sets are files of this machine, so this is work for its threads, not for the cluster's actors: hashing, PNG
and packing leave Python's lock.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import torch

from milan_ray.annotations import layout
from milan_ray.annotations.layout import Annotation, LayerFiles
from milan_ray.annotations.published import PublishedSet, kept_annotations
from milan_ray.config import config_hash
from milan_ray.engine.run_log import Cost, record_run
from milan_ray.errors import MilanError, unknown_name
from milan_ray.exemplars import masks
from milan_ray.models.view import View
from milan_ray.names import checked_name
from milan_ray.probe.manifest import Entry, build
from milan_ray.probe.manifest import digest as manifest_digest
from milan_ray.progress import Progress, say
from milan_ray.schema import ANNOTATIONS, EXEMPLARS, LEVELS, MANIFEST, VIEWS, Table
from milan_ray.stages.annotations_export import CSV_ROWS, PUBLISHED, ROOT, UNITS_FILE, exemplar_layers
from milan_ray.stages.images import png
from milan_ray.storage import EXEMPLARS_KEY, Storage
from milan_ray.storage.image_blocks import block_of, write_block
from milan_ray.textfiles import clean

KERNEL_VERSION = "published-1"

SOURCE = "milannotations"
"""Source of imported annotations."""


def run_import(storage: Storage, published: PublishedSet, *, model: str | None = None, source: str = SOURCE) -> str:
    """Imports a published set into the run directory, unless it was imported from the same files before.

    Exemplars, views, manifest and annotations are then as if made here, so encodings, descriptions, training and the
    report run on them. Levels are not known, so there are none. An image's identity is its id in ``ids.csv``, where
    there is one, and its pixels.

    In memory are at most one layer's packed masks (U·k·H·W/8 bytes, a few times over) and a block of images.

    Args:
        storage: The run directory.
        published: The set; the units that its annotations keep are those that get annotations here.
        model: Name of the model; None takes the set's.
        source: Source of the annotations.

    Returns:
        The name of the model.

    Raises:
        MilanError: The set has no images yet, masks are not 0 and 1, or exemplars of this model were made here.
    """
    if model is not None:
        checked_name("a model", model, slashes=True)
    checked_name("a source of annotations", source, slashes=True)
    model = model or published.name
    config = config_hash({"kernel": KERNEL_VERSION, "model": model, "set": published.name, "files": _files(published)})
    for layer in published.layers:
        meta = storage.metadata(EXEMPLARS, model=model, layer=layer)
        if meta is not None and PUBLISHED not in meta:
            raise MilanError(
                f"{storage.root} holds exemplars of {model} {layer} that were made here: import under another "
                "name or into another storage."
            )
    missing = [x for x in published.layers if not storage.is_current(EXEMPLARS, config, model=model, layer=x)]
    if missing:
        storage.check_writable()
        _import_exemplars(storage, published, missing, model, config)
    else:
        say(f"exemplars of {model}: all {len(published.layers)} layers are up to date")
    storage.remove_work(config)
    units = {layer: files.units.tolist() for layer, files in published.files.items()}
    _write_annotations(storage, published.kept, units, model, source)
    return model


def import_csv(
    storage: Storage,
    path: Path,
    model: str,
    *,
    source: str,
    annotation_count: int | None = None,
    layers: Sequence[str] | None = None,
) -> int:
    """Imports the annotations of an ``annotations.csv`` for exemplars that are stored already.

    Args:
        storage: The run directory, which holds the model's exemplars.
        path: A CSV with columns layer, unit, summary; several rows of a unit are several annotators.
        model: Name of the model.
        source: Source of the annotations.
        annotation_count: Keep only units with at least this many, and of these the first so many; None keeps all.
        layers: Use only rows of these layers, and do not check others; None uses all rows.

    Returns:
        The number of annotations.

    Raises:
        MilanError: The CSV is damaged, there are no exemplars of the model, or a row is empty or speaks of a unit
            without exemplars. The message names the row.
    """
    checked_name("a source of annotations", source, slashes=True)
    rows = layout.read_annotations(path, strict=True)
    if layers is not None:
        rows = [row for row in rows if row.layer in layers]
    if not rows:
        raise MilanError(
            f"{path} has no annotations{'' if layers is None else ' of these layers'}: add a row for each."
        )
    units = _check_rows(storage, path, rows, model, exemplar_layers(storage, model, layers))
    kept = kept_annotations(rows, annotation_count)
    if not kept:
        raise MilanError(f"{path} has no unit with {annotation_count} annotations: give a smaller --annotation-count.")
    _write_annotations(storage, kept, units, model, source)
    return sum(map(len, kept.values()))


def _check_rows(
    storage: Storage, path: Path, rows: Sequence[Annotation], model: str, layers: Sequence[str]
) -> dict[str, set[int]]:
    """Checks that every row of a CSV says something of a unit with exemplars; returns these units by layer."""
    units: dict[str, set[int]] = {}
    for row in rows:
        where, begin = f"layer {row.layer!r} of {model}", f"{path}, line {row.line}: "
        if row.layer not in layers:
            hint = f"Dissect it first (jobs.exemplars), or choose among {', '.join(layers)} with --layers."
            raise MilanError(f"{begin}{unknown_name('layer with exemplars', row.layer, layers, hint)}")
        if row.layer not in units:
            units[row.layer] = _units(storage, EXEMPLARS, model, row.layer)
        if row.unit not in units[row.layer]:
            every = units[row.layer] | _units(storage, LEVELS, model, row.layer)
            if row.unit > max(every, default=-1):
                last = f"the last one is {max(every, default=-1)}, and the first is 0"
                raise MilanError(f"{begin}{where} has no unit {row.unit}, {last}; correct the number.")
            raise MilanError(f"{begin}unit {row.unit} of {where} has no exemplars; remove its rows.")
        if not clean(row.text):
            what = f"says nothing of unit {row.unit} of {where}"
            raise MilanError(f"{begin}{what}; write a summary, or remove the row.")
    return units


def _units(storage: Storage, table: Table, model: str, layer: str) -> set[int]:
    """The units of a layer in a table; none where there is no such table."""
    keys = {"model": model, "layer": layer}
    if storage.metadata(table, **keys) is None:
        return set()
    return set(storage.read(table, ["unit"], **keys)["unit"].to_pylist())


def _files(published: PublishedSet) -> list[tuple[str, str, int, int]]:
    """(layer, file, size, modification time) of the files that decide exemplars: hashing them would take minutes."""
    names = (layout.IMAGES, layout.MASKS, layout.UNITS, layout.IDS, layout.ACTIVATIONS)
    files = [(layer, of_layer.folder / name) for layer, of_layer in published.files.items() for name in names]
    return [(layer, file.name, file.stat().st_size, file.stat().st_mtime_ns) for layer, file in files if file.exists()]


def _import_exemplars(
    storage: Storage, published: PublishedSet, missing: Sequence[str], model: str, config: str
) -> None:
    started = time.monotonic()
    say(f"import of {published.name}: {len(published.layers)} layers as {model}")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        scanned = _scan(storage, published, config, pool)
        # One image is one id and one content; where it was seen first is where its pixels are read from.
        images = scanned.unique(["source_id", "sha256"], keep="first", maintain_order=True)
        images = images.sort("source_id", "sha256").with_row_index("image_id")
        root = f"{ROOT}{published.name}"
        manifest = build(
            [
                Entry(root, f"sha256/{sha}" if source is None else str(source), etag=sha, sha256=sha)
                for source, sha in images.select("source_id", "sha256").iter_rows()
            ]
        )
        probe = manifest_digest(manifest)
        if not storage.is_current(MANIFEST, probe, probe=probe):
            storage.write(MANIFEST, manifest, probe, probe=probe)
        _write_views(storage, published, images, probe, pool)
    ids = scanned.join(images.select("image_id", "source_id", "sha256"), ["source_id", "sha256"], nulls_equal=True)
    for layer in missing:
        of_layer = ids.filter(pl.col("layer") == layer).sort("position", "rank")
        if layer == missing[-1]:
            seconds = time.monotonic() - started
            record_run(storage, "import", config, model, rows=len(ids), cost=Cost(seconds, seconds, len(images)))
        _write_exemplars(storage, published, layer, of_layer, model, probe, config)


def _scan(storage: Storage, published: PublishedSet, config: str, pool: ThreadPoolExecutor) -> pl.DataFrame:
    """A row per exemplar: layer, position, rank, source_id (null without ids.csv), sha256 of its RGB bytes."""
    parts = []
    done = set(storage.work_names(config))
    for number, (layer, files) in enumerate(published.files.items()):
        name = f"images/{number}"
        if name not in done:
            with Progress(f"images of {layer}", len(files.units), "units") as progress:
                digests = []
                for of_unit in pool.map(partial(_digests, files), range(len(files.units))):
                    digests += of_unit
                    progress.advance()
            count, k = files.masks.shape[:2]
            sources = [None] * (count * k) if files.image_ids is None else files.image_ids.ravel()
            columns = {
                "layer": [layer] * (count * k),
                "position": np.repeat(np.arange(count), k),
                "rank": np.tile(np.arange(k), count),
                "source_id": pa.array(sources, pa.int64()),
                "sha256": digests,
            }
            storage.put_work(config, name, pa.table(columns))
        parts.append(pl.DataFrame(storage.get_work(config, name)))
    return pl.concat(parts)


def _digests(files: LayerFiles, position: int) -> list[str]:
    return [hashlib.sha256(image.tobytes()).hexdigest() for image in files.unit_bytes(position)]


def _view(files: LayerFiles) -> str:
    return View(resize=None, crop=None, size=files.size).key


def _write_views(
    storage: Storage, published: PublishedSet, images: pl.DataFrame, probe: str, pool: ThreadPoolExecutor
) -> None:
    """Stores every image once, block by block; a block that exists is complete."""
    blocks: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in images.iter_rows(named=True):
        blocks[_view(published.files[row["layer"]]), block_of(row["image_id"])].append(row)

    def encode(row: dict[str, Any]) -> bytes:
        pixels = published.files[row["layer"]].unit_bytes(row["position"])[row["rank"]]
        return png(np.ascontiguousarray(pixels.transpose(1, 2, 0)))

    with Progress("views", len(images), "images") as progress:
        for (view, block), rows in blocks.items():
            keys = {"probe": probe, "view": view, "block": block}
            config = config_hash({"views": probe, "view": view})
            if not storage.is_current(VIEWS, config, **keys):
                write_block(storage, config, [row["image_id"] for row in rows], list(pool.map(encode, rows)), **keys)
            progress.advance(len(rows))


def _write_exemplars(
    storage: Storage, published: PublishedSet, layer: str, rows: pl.DataFrame, model: str, probe: str, config: str
) -> None:
    files = published.files[layer]
    count, k = files.masks.shape[:2]
    packed: list[bytes] = []
    for position in range(count):
        packed += masks.pack(torch.from_numpy(files.unit_masks(position)))
    activations = np.full((count, k), np.nan, np.float32) if files.activations is None else files.activations
    columns = {
        "unit": np.repeat(files.units, k),
        "rank": rows["rank"].to_numpy(),
        "image_id": rows["image_id"].to_numpy(),
        "activation": activations.ravel(),
        "mask": packed,
    }
    height, width = files.size
    metadata = {
        "mask_height": str(height),
        "mask_width": str(width),
        "probe": probe,
        "view": _view(files),
        "k": str(k),
        PUBLISHED: published.name,
        UNITS_FILE: str(files.has_units),
    }
    keys = {"model": model, "layer": layer}
    storage.write(EXEMPLARS, EXEMPLARS.table(columns, metadata, **keys), config, **keys)


def _write_annotations(
    storage: Storage,
    kept: Mapping[tuple[str, int], Sequence[Annotation]],
    units: Mapping[str, Collection[int]],
    model: str,
    source: str,
) -> None:
    """Writes the annotations of the units that have exemplars, in the order of the file, layer by layer."""
    if not kept:
        return
    present = {(layer, unit) for layer, numbers in units.items() for unit in numbers}
    missing = [key for key in kept if key not in present]
    if missing:
        say(f"annotations of {model}: left out {len(missing)} units without exemplars, the first {missing[0]}")
    by_layer: dict[str, list[tuple[Annotation, int]]] = defaultdict(list)
    for layer, unit in kept.keys() & present:
        by_layer[layer] += [(item, place) for place, item in enumerate(kept[layer, unit])]
    for layer, items in by_layer.items():
        items.sort(key=lambda item: item[0].row)
        exemplars = storage.config_of(EXEMPLARS, model=model, layer=layer)
        texts = [(item.row, item.unit, place, item.text) for item, place in items]
        config = config_hash({"exemplars": exemplars, "annotations": texts})
        keys = {"source": source, "model": model, "layer": layer}
        if storage.is_current(ANNOTATIONS, config, **keys):
            continue
        columns = {
            "unit": [unit for _, unit, _, _ in texts],
            # Published sets do not say who wrote what: a unit's first, second, … annotator.
            "annotator": [f"{place:03d}" for _, _, place, _ in texts],
            "text": [text for *_, text in texts],
        }
        metadata = {EXEMPLARS_KEY: exemplars, CSV_ROWS: ",".join(str(row) for row, *_ in texts)}
        storage.write(ANNOTATIONS, ANNOTATIONS.table(columns, metadata, **keys), config, **keys)
    say(f"annotations of {model}: {sum(map(len, by_layer.values()))} of {len(kept) - len(missing)} units")
