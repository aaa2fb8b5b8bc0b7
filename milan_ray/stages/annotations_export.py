"""Export of MILANNOTATIONS: exemplars + views + annotations ─► a published set."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from milan_ray.annotations import layout
from milan_ray.annotations.merge import nearest
from milan_ray.errors import MilanError, unknown_name
from milan_ray.exemplars import masks
from milan_ray.exemplars.masks import mask_size
from milan_ray.probe.manifest import rows_of
from milan_ray.progress import Progress, say
from milan_ray.schema import ANNOTATIONS, EXEMPLARS, MANIFEST
from milan_ray.storage import EXEMPLARS_KEY, Storage, image_blocks

ROOT = "milannotations:"
"""Prefix of the root of an imported set's images in the manifest; their paths are ids where ``ids.csv`` has them."""

PUBLISHED = "published"
"""Metadata key of imported exemplars: the set that they come from."""

UNITS_FILE = "units_file"
"""Metadata key of imported exemplars: whether the set had ``units.npy``."""

CSV_ROWS = "csv_rows"
"""Metadata key of imported annotations: their rows in ``annotations.csv``, which may interleave layers."""


def run_export(
    storage: Storage,
    model: str,
    folder: Path,
    *,
    source: str | None = None,
    layers: Sequence[str] | None = None,
) -> list[str]:
    """Writes a model's exemplars and annotations as a published set; a folder that exists is complete.

    What was imported comes out with identical arrays (images as bytes, if they were floats). Units with fewer than k
    exemplars (dead ones) have no place in the layout and are left out, as ``units.npy`` then says.

    Args:
        storage: The run directory.
        model: Name of the model.
        folder: Folder to be made.
        source: Source of the annotations; None takes the only one, if there is one.
        layers: Which layers; None takes all.

    Returns:
        The layers written.

    Raises:
        MilanError: There are no such exemplars, several sources, annotations of other exemplars, or the folder is there
            already or cannot be written.
    """
    chosen = exemplar_layers(storage, model, layers)
    bad = [layer for layer in chosen if layer in ("", ".", "..") or "/" in layer or layer.startswith(".")]
    if bad:
        raise MilanError(f"layer {bad[0]!r} of {model} cannot be the name of a folder: leave it out.")
    annotations = _annotations(storage, model, source, chosen)
    with layout.whole_folder(folder) as part:
        written = {}
        for layer in chosen:
            (part / layer).mkdir()
            written[layer] = _export_layer(storage, model, layer, part / layer)
        if annotations:
            rows = [(layer, unit, text) for layer, unit, text in annotations if unit in written[layer]]
            layout.write_annotations(part / layout.ANNOTATIONS, rows)
    return chosen


def exemplar_layers(storage: Storage, model: str, layers: Sequence[str] | None = None) -> list[str]:
    """The given layers of a model with exemplars, or all of them.

    Raises:
        MilanError: There are no exemplars of the model, or of such a layer.
    """
    present = [keys["layer"] for keys in storage.partitions(EXEMPLARS, model=model)]
    if not present:
        known = {keys["model"] for keys in storage.partitions(EXEMPLARS)}
        raise unknown_name("model with exemplars", model, known, f"Looked in {storage.root}.")
    for layer in layers or ():
        if layer not in present:
            raise unknown_name("layer with exemplars", layer, present)
    return storage.layers_in_order(model, present) if layers is None else list(layers)


def _annotations(storage: Storage, model: str, source: str | None, layers: Sequence[str]) -> list[tuple[str, int, str]]:
    """Annotations as (layer, unit, text), in the order of the imported file, or else layer by layer."""
    partitions = [keys for keys in storage.partitions(ANNOTATIONS, model=model) if keys["layer"] in layers]
    sources = sorted({keys["source"] for keys in partitions})
    if source is None and len(sources) > 1:
        raise MilanError(f"{model} has annotations from {', '.join(sources)}: choose one of these sources.")
    if source is not None and source not in sources:
        raise unknown_name("source of annotations", source, sources)
    rows: list[tuple[int, tuple[str, int, str]]] = []
    for keys in partitions:
        if keys["source"] != (source or sources[0]):
            continue
        meta = storage.metadata(ANNOTATIONS, **keys) or {}
        if meta.get(EXEMPLARS_KEY) not in (None, storage.config_of(EXEMPLARS, model=model, layer=keys["layer"])):
            raise MilanError(
                f"the annotations {keys['source']!r} of {model} {keys['layer']} speak of other exemplars than those "
                f"now in {storage.root}: annotate or import again."
            )
        table = storage.read(ANNOTATIONS, ["unit", "text"], **keys)
        numbers = (
            [int(number) for number in meta[CSV_ROWS].split(",")] if CSV_ROWS in meta else [len(rows)] * len(table)
        )
        texts = zip(table["unit"].to_pylist(), table["text"].to_pylist(), strict=True)
        rows += [(n, (keys["layer"], unit, text)) for n, (unit, text) in zip(numbers, texts, strict=True)]
    return [row for _, row in sorted(rows, key=lambda item: item[0])]


def _export_layer(storage: Storage, model: str, layer: str, folder: Path) -> set[int]:
    """Writes a layer's files; returns the units in it."""
    columns = ["unit", "rank", "image_id", "activation", "mask"]
    table = storage.read(EXEMPLARS, columns, model=model, layer=layer).combine_chunks()
    meta = storage.metadata(EXEMPLARS, model=model, layer=layer) or {}
    size = mask_size(meta)
    unit, rank, image_id = (table[name].to_numpy() for name in ("unit", "rank", "image_id"))
    present, first, counts = np.unique(unit, return_index=True, return_counts=True)
    k = int(counts.max(initial=0))
    whole = np.argsort(first[counts == k])
    units = present[counts == k][whole].astype(np.int64)  # in the order of the table: that of the set it came from
    if not len(units):
        raise MilanError(f"{model} {layer} has no exemplars to export: leave the layer out.")
    if len(units) < len(present):
        say(f"{model} {layer}: left out {len(present) - len(units)} units with fewer than {k} exemplars")
    position = np.full(int(present.max()) + 1, -1)
    position[units] = np.arange(len(units))
    place = position[unit]
    shape = len(units), k
    images, regions = (
        np.lib.format.open_memmap(folder / name, mode="w+", dtype=np.uint8, shape=(*shape, channels, *size))
        for name, channels in ((layout.IMAGES, 3), (layout.MASKS, 1))
    )
    rows = np.flatnonzero(place >= 0).tolist()
    for row in rows:
        regions[place[row], rank[row], 0] = masks.unpack([table["mask"][row].as_py()], size)[0]
    uses: dict[int, list[int]] = defaultdict(list)
    for row in rows:
        uses[int(image_id[row])].append(row)

    def resized(png: bytes) -> np.ndarray:
        return nearest(image_blocks.decode(png).transpose(2, 0, 1), size)

    with ThreadPoolExecutor(os.cpu_count()) as pool, Progress(f"export {layer}", len(rows), "exemplars") as progress:
        for pngs in image_blocks.read_blocks(storage, meta["probe"], meta["view"], sorted(uses)):
            for image, pixels in zip(pngs, pool.map(resized, pngs.values()), strict=True):
                for row in uses[image]:
                    images[place[row], rank[row]] = pixels
                progress.advance(len(uses[image]))
    images.flush()
    regions.flush()
    values = np.full(shape, np.nan)
    values[place[rows], rank[rows]] = table["activation"].to_numpy()[rows]
    if not np.isnan(values).all():
        np.savetxt(folder / layout.ACTIVATIONS, values, fmt="%.5e", delimiter=",")
    sources = _source_ids(storage, meta["probe"], image_id[rows])
    if sources is not None:
        ids = np.zeros(shape, np.int64)
        ids[place[rows], rank[rows]] = sources
        np.savetxt(folder / layout.IDS, ids, fmt="%i", delimiter=",")
    if meta.get(UNITS_FILE) == "True" or not np.array_equal(units, np.arange(len(units))):
        np.save(folder / layout.UNITS, units)
    return set(units.tolist())


def _source_ids(storage: Storage, probe: str, image_ids: np.ndarray) -> np.ndarray | None:
    """The ids in ``ids.csv`` of some manifest rows; None where the imported set had no ``ids.csv``."""
    images = rows_of(storage.read(MANIFEST, ["root", "path"], probe=probe), image_ids)
    if not images["root"][0].as_py().startswith(ROOT):
        return image_ids
    paths = images["path"].to_pylist()
    return np.array([int(path) for path in paths]) if all(map(str.isdecimal, paths)) else None
