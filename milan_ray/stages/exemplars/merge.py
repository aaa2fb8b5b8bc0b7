"""Folds the shards of a model into the tables of its layers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from milan_ray.engine import references
from milan_ray.engine.run_log import Cost, record_run
from milan_ray.engine.tasks import FEW_IMAGES, run_parallel
from milan_ray.errors import MilanError
from milan_ray.exemplars import masks
from milan_ray.exemplars.behaviour import COMPUTES
from milan_ray.exemplars.levels import in_words
from milan_ray.exemplars.pooled import in_groups
from milan_ray.exemplars.shard import fold, layer_in_errors
from milan_ray.exemplars.ties import ties_of_tables
from milan_ray.probe.files import tell_doubts
from milan_ray.progress import say
from milan_ray.schema import EXEMPLARS, LEVELS, MANIFEST, POOLED, SKIPPED
from milan_ray.stages import arithmetic
from milan_ray.stages.exemplars.describe_model import why_exemplars
from milan_ray.stages.exemplars.worker import IMAGES, IMAGES_SCHEMA, NOTES, SECONDS, ModelWork, Run
from milan_ray.storage import ORDER_KEY, Storage, WorkRemovedError

WINNERS_SCHEMA = pa.schema(
    {"unit": pa.int64(), "rank": pa.int64(), "image_id": pa.int64(), "activation": pa.float32(), "level": pa.float32()}
)


FEW_PARTS = 4
"""Parts of a layer that are read at once from an object store: those of first shards carry maps, up to the budget."""


@dataclass(frozen=True)
class Merged:
    """A model whose shards are folded.

    Attributes:
        item: Its work.
        cost: What one of its tables took; masks that are computed again are added.
        unmasked: The layers whose masks are still to be computed; their winners are in the work.
    """

    item: ModelWork
    cost: Cost
    unmasked: tuple[str, ...]


def merge(run: Run, item: ModelWork, expected: int) -> Merged:
    """Folds the shards of every layer and writes its tables, except exemplars whose masks are not computed yet.

    Args:
        run: The run.
        item: The model's work.
        expected: Images of the probe.

    Raises:
        MilanError: A layer or too many images cannot be used.
        WorkRemovedError: Another job has made the same tables meanwhile.
    """
    images, seconds, pieces = finish_images(run, item, expected)
    cost = Cost(images=images)
    cost.add(seconds, len(item.layers) + len(item.pooled))  # one pass for all
    merged = run_parallel(partial(merge_layer, run, item, pieces, cost), item.layers, in_driver=expected <= FEW_IMAGES)
    masked = {item.layers[index]: done for index, done in merged}
    list(run_parallel(partial(merge_pooled, run, item, pieces, cost), item.pooled, in_driver=images <= FEW_IMAGES))
    return Merged(item, cost, tuple(layer for layer in item.layers if not masked[layer]))


def finish_images(run: Run, item: ModelWork, expected: int) -> tuple[int, float, tuple[str, ...]]:
    """Writes which images were skipped, and the digests of those that were read.

    Returns:
        Usable images, seconds of all shards, and the names of the pieces with a usable image.

    Raises:
        MilanError: Too many images were unreadable.
        WorkRemovedError: Another job has made the same tables meanwhile.
    """
    storage, model = run.storage, item.model.name
    names = [piece for _, piece in sorted(storage.pieces_with(item.work, item.parts).items())]
    shards = list(storage.get_parts(item.work, names, IMAGES))
    images = pa.concat_tables([IMAGES_SCHEMA.empty_table(), *shards]).sort_by("image_id")
    if len(images) != expected:
        due = [why_exemplars(storage, item.described.fingerprints[layer], model, layer) for layer in item.layers]
        due += [storage.why(POOLED, pooled, model=model, layer=layer) for layer, pooled in item.pooled.items()]
        if not any(due):
            raise WorkRemovedError(f"the exemplars of {model} are there already; run the job again.")
        raise MilanError(
            f"{expected - len(images)} of {expected} images were not reported back; run the job again, and see that "
            f"every node of the cluster reads and writes {storage.root}."
        )
    bad = images.filter(pc.is_valid(images["reason"]))
    columns = {name: bad[name] for name in ("image_id", "path", "reason")}
    storage.write(SKIPPED, SKIPPED.table(columns, model=model), item.work, model=model)
    if len(bad):
        first = f"{bad['path'][0].as_py()} ({bad['reason'][0].as_py()})"
        say(f"exemplars of {model}: skipped {len(bad)} of {expected} images, the first {first}; see the table skipped")
    metadata = [shard.schema.metadata or {} for shard in shards]
    doubts = [json.loads(entries.get(NOTES.encode(), b"[0, []]")) for entries in metadata]
    tell_doubts([(where, why) for _, some in doubts for where, why in some], sum(count for count, _ in doubts))
    if len(bad) > run.config.max_bad * expected or len(bad) == expected:
        raise MilanError(
            f"{len(bad)} of {expected} probe images are unreadable, the first {first}; "
            "repair them, or raise --max-bad if that is expected."
        )
    _record_digests(storage, item.probe, images)
    seconds = sum(float(entries[SECONDS.encode()]) for entries in metadata)
    usable = [shard["reason"].null_count > 0 for shard in shards]  # a usable image has no reason
    readable = tuple(name for name, some in zip(names, usable, strict=True) if some)
    return expected - len(bad), seconds, readable


def _record_digests(storage: Storage, digest: str, images: pa.Table) -> None:
    """Adds to the manifest the digests of bytes that were read for the first time."""
    manifest = storage.read(MANIFEST, probe=digest)
    if manifest["sha256"].null_count == images["sha256"].null_count:
        return
    place = manifest.schema.get_field_index("sha256")
    digests = pc.take(images["sha256"], pc.index_in(manifest["image_id"], images["image_id"].combine_chunks()))
    manifest = manifest.set_column(place, manifest.schema.field(place), digests.cast(pa.string()))
    storage.write(MANIFEST, manifest, digest, probe=digest)


def merge_layer(run: Run, item: ModelWork, pieces: Sequence[str], cost: Cost, layer: str) -> bool:
    """Folds one layer.

    Args:
        run: The run.
        item: The model's work.
        pieces: Names of the pieces with a usable image.
        cost: What each table of the model took.
        layer: Module path.

    Returns:
        Whether its exemplars are written; else their maps must be computed again, and its winners are in the work.
    """
    storage, model = run.storage, item.model.name
    # By name, not what is there: another job may be removing the same work, and some of it is not all of it.
    with layer_in_errors(layer):
        state = fold(storage.get_parts(item.work, pieces, item.part(layer), FEW_PARTS), item.plan)
    levels = state.level.result()
    counts = {"positions": state.level.counted.numpy(), "nonfinite": state.level.nonfinite.numpy()}
    columns = {"unit": np.arange(len(levels)), "level": levels.numpy(), **counts, "exact": [state.exact] * len(levels)}
    table = LEVELS.table(columns, model=model, layer=layer)
    unit, rank = torch.nonzero(state.topk.ids >= 0, as_tuple=True)
    ids, activations = state.topk.ids[unit, rank], state.topk.values[unit, rank]
    arrays = [column.numpy() for column in (unit, rank, ids, activations, levels[unit])]
    winners = pa.table(arrays, schema=WINNERS_SCHEMA)
    if state.topk.carries_maps:
        size = mask_size(run, item)
        packed = masks.packed_masks(lambda part: state.topk.maps_of(unit[part], rank[part]), levels[unit], size)
        write_exemplars(run, item, layer, winners.append_column("mask", pa.array(packed, pa.large_binary())), cost)
    else:
        storage.put_work(item.work, item.winners(layer), winners)
    storage.write(LEVELS, table, item.described.fingerprints[layer], model=model, layer=layer)
    return state.topk.carries_maps


def mask_size(run: Run, item: ModelWork) -> tuple[int, int]:
    """(height, width) of a model's masks, pixels."""
    return run.config.mask_size or references.model(item.model).preprocess.view.shape


def write_exemplars(run: Run, item: ModelWork, layer: str, rows: pa.Table, cost: Cost) -> None:
    """Writes a layer's exemplars: unit, rank, image_id, activation and mask of every winner."""
    name, config, described = item.model.name, run.config, item.described
    height, width = mask_size(run, item)
    metadata = {
        "mask_height": str(height),
        "mask_width": str(width),
        "probe": item.probe,
        "view": described.view,
        "k": str(config.k),
        "quantile": str(config.quantile),
        **arithmetic.metadata(config.arithmetic),
        "layout": described.layouts[layer].to_json(),
        ORDER_KEY: str(described.order[layer]),
        **({COMPUTES: described.computes[layer]} if layer in described.computes else {}),
    }
    columns = {column: rows[column] for column in ("unit", "rank", "image_id", "activation", "mask")}
    table, fingerprint = EXEMPLARS.table(columns, metadata, model=name, layer=layer), described.fingerprints[layer]
    record_run(run.storage, "exemplars", fingerprint.hash, name, layer=layer, rows=len(table), cost=cost)
    run.storage.write(EXEMPLARS, table, fingerprint, model=name, layer=layer)


def merge_pooled(run: Run, item: ModelWork, pieces: Sequence[str], cost: Cost, layer: str) -> None:
    """Concatenates the pooled activations of one layer's shards in the manifest's order, one shard at a time.

    Arguments as of :func:`merge_layer`.

    Raises:
        MilanError: They are not those of the images that were read.
    """
    storage, fingerprint, model = run.storage, item.pooled[layer], item.model.name
    part = item.pooled_part(layer)
    units = len(storage.get_part(item.work, pieces[0], part)["max"][0])
    metadata = {"units": str(units), "probe": item.probe, **arithmetic.metadata(run.config.arithmetic)}

    def groups() -> Iterator[pa.Table]:
        rows = 0
        for group in in_groups(storage.get_parts(item.work, pieces, part, FEW_PARTS)):
            rows += len(group)
            yield POOLED.table({name: group[name] for name in group.column_names}, model=model, layer=layer)
        if rows != cost.images:
            raise MilanError(
                f"{rows} of {cost.images} images have pooled activations of layer {layer!r}; run the job again."
            )
        record_run(storage, "pooled", fingerprint.hash, model, layer=layer, rows=rows, cost=cost)

    storage.write_stream(POOLED, groups(), fingerprint, metadata, model=model, layer=layer)


def warn_of_nonfinite(storage: Storage, work: Sequence[ModelWork]) -> None:
    """Warns of layers whose new tables leave out values that are not finite."""
    for item in work:
        for layer in item.layers:
            counts = storage.read(LEVELS, ["nonfinite"], model=item.model.name, layer=layer)["nonfinite"]
            if words := in_words(torch.tensor(counts.to_pylist())):
                say(f"layer {layer!r} of {item.model.name} {words}", level="warning")


def warn_of_ties(storage: Storage, model: str, layers: Sequence[str]) -> None:
    """Warns of layers with units whose exemplars or masks mean nothing.

    It reads the tables, whichever job has made them, so that every job that uses them warns.

    Raises:
        DamagedTable: A table cannot be read.
    """
    for layer in layers:
        keys = {"model": model, "layer": layer}
        levels = storage.read(LEVELS, ["unit", "level", "positions"], **keys)
        exemplars = storage.read(EXEMPLARS, ["unit", "rank", "activation"], **keys)
        ties = ties_of_tables(exemplars, levels, storage.metadata(EXEMPLARS, **keys) or {})
        if words := ties.in_words():
            say(f"layer {layer!r} of {model} {words}", level="warning")
