"""Masks of layers whose maps are too large to carry, from one more pass over the winning images alone."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import torch

from milan_ray.config import config_hash
from milan_ray.engine import references
from milan_ray.engine.actor_pool import Row, run_pool
from milan_ray.exemplars.masks import packed_masks
from milan_ray.probe.base import ImageRef
from milan_ray.progress import Progress
from milan_ray.stages.exemplars.merge import WINNERS_SCHEMA, Merged, write_exemplars
from milan_ray.stages.exemplars.worker import ModelWorker, Run, failing


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
    rows = [row for index, merged in enumerate(unmasked) for row in _blocks(run, index, merged, manifest)]
    waiting = Counter(row["model"] for row in rows)
    failed: dict[str, str] = {}

    def finish(index: int) -> None:
        item = unmasked[index].item
        if item.model.name not in failed:
            with failing(failed, item.model.name):
                _write_masked(run, unmasked[index], [row["name"] for row in rows if row["model"] == index])
                run.storage.remove_work(item.work)

    for index in range(len(unmasked)):
        if not waiting[index]:  # no unit of these layers has a winner
            finish(index)
    if not rows:
        return failed
    layers = [[(merged.item.model.name, layer) for layer in merged.winners] for merged in unmasked]
    pieces = (piece for row in rows for piece in layers[row["model"]])
    arguments = run.arguments([merged.item for merged in unmasked])
    with Progress("masks", sum(row["images"] for row in rows), "images", pieces) as progress:
        for answer in run_pool(MaskWorker, arguments, rows, run.resources):
            index = answer["model"]
            progress.advance(answer["images"], layers[index])
            unmasked[index].cost.add(answer["seconds"], len(unmasked[index].winners))
            if answer["error"]:
                failed.setdefault(unmasked[index].item.model.name, answer["error"])
            waiting[index] -= 1
            if not waiting[index]:
                finish(index)
    return failed


def _blocks(run: Run, index: int, merged: Merged, manifest: pa.Table) -> Iterator[Row]:
    """The winning images of a model, as many a row as a forward pass takes."""
    size = references.model(merged.item.model).batch(run.config.batch_size)
    ids = sorted(set().union(*merged.winners.values()))
    for start in range(0, len(ids), size):
        block = ids[start : start + size]
        row = {"model": index, "name": config_hash({"winners": block}), "layers": list(merged.winners)}
        images = manifest.take(block)
        yield {**row, "images": len(block), **{key: images[key].to_pylist() for key in ("image_id", "root", "path")}}


def _write_masked(run: Run, merged: Merged, names: Sequence[str]) -> None:
    """Writes the exemplars of a model's layers, with the masks of all blocks."""
    item = merged.item
    for layer in merged.winners:
        blocks = (run.storage.get_work(item.work, f"masks/{item.part(layer)}/{name}") for name in names)
        empty = WINNERS_SCHEMA.append(pa.field("mask", pa.large_binary())).empty_table()
        rows = pa.concat_tables([empty, *blocks]).sort_by([("unit", "ascending"), ("rank", "ascending")])
        write_exemplars(run, item, layer, rows, merged.cost)


class MaskWorker(ModelWorker):
    """Computes the maps of winning images again, and their masks."""

    def _run(self, row: Row) -> None:
        """Stores masks of the winners in one block of images, for every layer that waits for them."""
        item = self._work[row["model"]]
        spec, forward = self._forward(row["model"])
        size = self._config.mask_size or spec.preprocess.view.shape
        winners = {layer: self._storage.get_work(item.work, f"winners/{item.part(layer)}") for layer in row["layers"]}
        masked: dict[str, list[pa.Table]] = defaultdict(list)
        refs = [ImageRef(*ref) for ref in zip(row["image_id"], row["root"], row["path"], strict=True)]
        for _, batch in self._batches(refs, spec):
            batch.complete("was read before but not now ({reason}); run the job again.")
            for rows, maps in forward.pieces(batch.inputs):
                ids = pa.array(batch.ids[rows])
                for layer in maps.keys() & winners.keys():
                    in_piece = winners[layer].filter(pc.is_in(winners[layer]["image_id"], ids))
                    masked[layer].append(_mask(in_piece, ids, maps[layer], size))
        for layer, tables in masked.items():
            name = f"masks/{item.part(layer)}/{row['name']}"
            self._storage.put_work(item.work, name, pa.concat_tables(tables))


def _mask(winners: pa.Table, ids: pa.Array, maps: torch.Tensor, size: tuple[int, int]) -> pa.Table:
    """Adds masks of size (H, W) to winners among the images of these ids, whose maps (B, U, h, w) are given."""
    image, unit, level = (
        torch.tensor(column.to_numpy())  # copies: Arrow's memory is read-only
        for column in (pc.index_in(winners["image_id"], ids), winners["unit"], winners["level"])
    )
    packed = packed_masks(lambda part: maps[image[part], unit[part]].float(), level, size)
    return winners.append_column("mask", pa.array(packed, pa.large_binary()))
