"""Masks of layers whose maps are too large to carry, from one more pass over the winning images alone."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from milan_ray.config import config_hash
from milan_ray.engine import references
from milan_ray.engine.actor_pool import Row, run_pool
from milan_ray.engine.model_cache import ModelCache
from milan_ray.exemplars.masks import packed_masks
from milan_ray.probe.base import ImageRef
from milan_ray.progress import Progress
from milan_ray.stages.exemplars.merge import WINNERS_SCHEMA, Merged, write_exemplars
from milan_ray.stages.exemplars.worker import WINNERS, ModelWork, ModelWorker, Run, failing
from milan_ray.storage.pieces import piece_name


def recompute(run: Run, unmasked: Sequence[Merged], manifest: pa.Table) -> dict[str, str]:
    """Computes missing masks and writes the exemplars that wait for them.

    One pool serves all models; a model's exemplars are written after its last block of images.

    Args:
        run: The run.
        unmasked: The models with layers that lack masks.
        manifest: The probe's manifest.

    Returns:
        Model → why it failed.

    Raises:
        WorkRemovedError: Another job has made the same tables meanwhile.
    """
    blocks = [mask_blocks(run, merged, manifest) for merged in unmasked]
    stored = [_stored(run, merged) for merged in unmasked]
    rows = [
        {**row, "model": index}
        for index, of_model in enumerate(blocks)
        for row in of_model
        if row["name"] not in stored[index]
    ]
    waiting = Counter(row["model"] for row in rows)
    failed: dict[str, str] = {}

    def finish(index: int) -> None:
        item = unmasked[index].item
        if item.model.name not in failed:
            with failing(failed, item.model.name):
                write_masked(run, unmasked[index], blocks[index], stored[index])
                run.storage.remove_work(item.work)

    for index in range(len(unmasked)):
        if not waiting[index]:  # all blocks are there, or no unit of these layers has a winner
            finish(index)
    if not rows:
        return failed
    layers = [[(merged.item.model.name, layer) for layer in merged.unmasked] for merged in unmasked]
    pieces = (piece for row in rows for piece in layers[row["model"]])
    arguments = mask_arguments(run, unmasked)
    with Progress("masks", sum(row["images"] for row in rows), "images", pieces) as progress:
        for answer in run_pool(MaskWorker, arguments, rows, run.resources):
            index = answer["model"]
            progress.advance(answer["images"], layers[index])
            unmasked[index].cost.add(answer["seconds"], len(unmasked[index].unmasked))
            if answer["error"]:
                failed.setdefault(unmasked[index].item.model.name, answer["error"])
            waiting[index] -= 1
            if not waiting[index]:
                finish(index)
    return failed


def mask_arguments(run: Run, unmasked: Sequence[Merged]) -> dict[str, Any]:
    """Arguments of a :class:`MaskWorker`."""
    return {**run.arguments([merged.item for merged in unmasked]), "layers": [merged.unmasked for merged in unmasked]}


def mask_blocks(run: Run, merged: Merged, manifest: pa.Table) -> list[Row]:
    """The winning images of a model, in blocks of about as many images as a shard.

    The blocks are those of all layers whose masks this work had to compute, also of layers that are done: so a job
    finds its pieces that was killed while results became public.
    """
    storage, work = run.storage, merged.item.work
    tables = [storage.get_work(work, name) for name in storage.work_names(work, WINNERS)]
    ids = np.unique(np.concatenate([np.zeros(0, np.int64), *(table["image_id"].to_numpy() for table in tables)]))
    batch = references.model(merged.item.model).batch(run.config.batch_size)
    size = batch * -(-run.config.shard(len(ids)) // batch)
    rows = []
    for start in range(0, len(ids), size):
        block = ids[start : start + size]
        images = manifest.take(pa.array(block))
        columns = {key: images[key].to_pylist() for key in ("image_id", "root", "path")}
        rows.append({"name": config_hash({"winners": block.tolist()}), "images": len(block), **columns})
    return rows


def _parts(merged: Merged) -> list[str]:
    """What the pieces of a model's blocks hold."""
    return [merged.item.part(layer) for layer in merged.unmasked]


def _stored(run: Run, merged: Merged) -> dict[str, str]:
    """The blocks of a model whose masks are computed: name → name of the piece."""
    return run.storage.pieces_with(_masks(merged.item), _parts(merged))


def _masks(item: ModelWork) -> str:
    """The work with a model's masks, apart from the pieces of its shards."""
    return f"{item.work}/masks"


def write_masked(run: Run, merged: Merged, blocks: Sequence[Row], stored: Mapping[str, str]) -> None:
    """Writes the exemplars of a model's layers, with the masks of all blocks.

    Args:
        run: The run.
        merged: The model.
        blocks: Its blocks.
        stored: The blocks that an earlier job computed: name → name of the piece.
    """
    item, parts = merged.item, _parts(merged)
    pieces = [stored.get(row["name"]) or piece_name(row["name"], parts) for row in blocks]
    for layer in merged.unmasked:
        empty = WINNERS_SCHEMA.append(pa.field("mask", pa.large_binary())).empty_table()
        masked = run.storage.get_parts(_masks(item), pieces, item.part(layer))
        rows = pa.concat_tables([empty, *masked]).sort_by([("unit", "ascending"), ("rank", "ascending")])
        write_exemplars(run, item, layer, rows, merged.cost)


class MaskWorker(ModelWorker):
    """Computes the maps of winning images again, and their masks."""

    def __init__(self, layers: list[tuple[str, ...]], **arguments: Any) -> None:
        super().__init__(**arguments)
        self._layers = layers
        self._winners = ModelCache(self._read_winners)

    def _read_winners(self, index: int) -> dict[str, pa.Table]:
        """The winners of a model's layers that wait for masks."""
        item = self._work[index]
        return {layer: self._storage.get_work(item.work, item.winners(layer)) for layer in self._layers[index]}

    def _run(self, row: Row) -> None:
        """Stores masks of the winners in one block of images, for every layer that waits for them."""
        item = self._work[row["model"]]
        spec, forward = self._forward(row["model"])
        size = self._config.mask_size or spec.preprocess.view.shape
        winners = self._winners(row["model"])
        masked: dict[str, list[pa.Table]] = defaultdict(list)
        refs = [ImageRef(*ref) for ref in zip(row["image_id"], row["root"], row["path"], strict=True)]
        for _, batch in self._batches(refs, spec):
            batch.complete("was read before but not now ({reason}); run the job again.")
            for rows, maps in forward.pieces(batch.inputs):
                ids = pa.array(batch.ids[rows])
                for layer in maps.keys() & winners.keys():
                    in_piece = winners[layer].filter(pc.is_in(winners[layer]["image_id"], ids))
                    masked[layer].append(_mask(in_piece, ids, maps[layer], size))
        parts = {item.part(layer): pa.concat_tables(masked[layer]) for layer in winners}
        self._storage.put_piece(_masks(item), row["name"], list(parts), parts.items())


def _mask(winners: pa.Table, ids: pa.Array, maps: torch.Tensor, size: tuple[int, int]) -> pa.Table:
    """Adds masks of size (H, W) to winners among the images of these ids, whose maps (B, U, h, w) are given."""
    image, unit, level = (
        torch.tensor(column.to_numpy())  # copies: Arrow's memory is read-only
        for column in (pc.index_in(winners["image_id"], ids), winners["unit"], winners["level"])
    )
    packed = packed_masks(lambda part: maps[image[part], unit[part]].float(), level, size)
    return winners.append_column("mask", pa.array(packed, pa.large_binary()))
