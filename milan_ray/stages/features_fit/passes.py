"""Passes over a layer's outputs: workers that add them up, and mergeable sums that they store."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from milan_ray.engine import references
from milan_ray.engine.actor_pool import Row, run_pool
from milan_ray.errors import MilanError
from milan_ray.exemplars.forward import Batch, Forward
from milan_ray.models.features.moments import Moments
from milan_ray.models.hooks import unwrap
from milan_ray.models.registry import ModelSpec
from milan_ray.probe.base import ImageRef
from milan_ray.progress import Progress, say
from milan_ray.scoring.simulation import held_out
from milan_ray.stages.exemplars import ModelWork, ModelWorker, Run, shard_name
from milan_ray.stages.images import read_refs

MOST_PIECES = 64
"""Pieces of a pass at most: one with the moments of 2,048 units takes 32 MB."""

Arrays = Mapping[str, np.ndarray]
"""A state: name → array."""

_ARRAYS_SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("dtype", pa.string()),
        ("shape", pa.list_(pa.int64())),
        ("data", pa.large_binary()),
    ]
)


def to_table(arrays: Arrays) -> pa.Table:
    """Arrays as a work table."""
    rows = [
        {"name": name, "dtype": array.dtype.str, "shape": array.shape, "data": np.ascontiguousarray(array).tobytes()}
        for name, array in arrays.items()
    ]
    return pa.Table.from_pylist(rows, schema=_ARRAYS_SCHEMA)


def of_table(table: pa.Table) -> dict[str, np.ndarray]:
    """The arrays of a work table."""
    return {row["name"]: np.frombuffer(row["data"], row["dtype"]).reshape(row["shape"]) for row in table.to_pylist()}


def under(prefix: str, arrays: Arrays) -> dict[str, np.ndarray]:
    """Arrays with a prefix before their names."""
    return {f"{prefix}/{name}": array for name, array in arrays.items()}


def below(prefix: str, arrays: Arrays) -> dict[str, np.ndarray]:
    """The arrays whose names have a prefix, without it."""
    start = f"{prefix}/"
    return {name.removeprefix(start): array for name, array in arrays.items() if name.startswith(start)}


def rows_of(maps: torch.Tensor) -> torch.Tensor:
    """Maps (n, C, h, w) as rows (n·h·w, C): images, then positions row by row."""
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])


def fitted_to(refs: Sequence[ImageRef], share: float, held: bool = False) -> list[ImageRef]:
    """The images that features are fitted to, or those held out."""
    chosen = held_out(np.array([ref.image_id for ref in refs], np.int64), share) == held
    return [ref for ref, one in zip(refs, chosen, strict=True) if one]


class PassWorker(ModelWorker):
    """Runs the network over a shard of the probe and stores what its outputs add up to.

    Args:
        folder: Folder of the pass's pieces in the work.
        share: Share of the images that nothing is fitted to.
        **arguments: Arguments of a :class:`ModelWorker`, for one model with one layer.
    """

    def __init__(self, folder: str, share: float, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._folder, self._share = folder, share
        self._item = self._work[0]
        (self._layer,) = self._item.layers
        self._units = self._item.described.layouts[self._layer].units

    def _load(self, index: int) -> tuple[ModelSpec, Forward]:
        spec = references.model(self._item.model)
        self._network = unwrap(references.network(spec, self._item.described.weights).to(self._device))
        size, layouts = self._pass_size(spec), self._item.described.layouts
        return spec, Forward(spec, self._network, [self._layer], size, self._config.arithmetic, layouts)

    def _run(self, row: Row) -> None:
        refs = read_refs(self._storage, self._item.probe, row["start"], row["start"] + row["images"])
        self._storage.put_work(self._item.work, f"{self._folder}/{row['name']}", to_table(self._add_up(refs)))

    @abstractmethod
    def _add_up(self, refs: list[ImageRef]) -> Arrays:
        """Runs a shard's images; returns a state."""

    def _maps(self, refs: list[ImageRef]) -> Iterator[tuple[ModelSpec, Batch, torch.Tensor]]:
        """The network, batches of images, and their maps (n, C, h, w)."""
        spec, forward = self._forward(0)
        for _, batch in self._batches(refs, spec):
            if len(batch.ids):
                yield spec, batch, forward.maps(batch.inputs)[self._layer]


class MomentsWorker(PassWorker):
    """Adds up the moments of the outputs that features are fitted to, and counts images that cannot be read."""

    def _add_up(self, refs: list[ImageRef]) -> Arrays:
        moments, read = Moments(self._units, self._device), 0
        due = fitted_to(refs, self._share)
        with torch.inference_mode():
            for _, batch, maps in self._maps(due):
                moments.add(rows_of(maps))
                read += len(batch.ids)
        return {**moments.state(), "images": np.array([read, len(due)], np.int64)}


def run_pass(
    run: Run, item: ModelWork, worker: type[PassWorker], folder: str, title: str, **arguments: object
) -> Iterator[dict[str, np.ndarray]]:
    """Runs a pass over the probe, as far as its pieces are not stored yet.

    Args:
        run: The run.
        item: The network and its layer.
        worker: What runs a shard.
        folder: Folder of the pieces in the work.
        title: What the pass is called in messages.
        **arguments: Further arguments of the worker.

    Yields:
        The state of each shard, in order. How shards are cut depends on the number of images alone.

    Raises:
        MilanError: The network failed.
    """
    images = item.plan.images
    size = max(run.config.shard(images), 16 * -(-images // (16 * MOST_PIECES)))
    starts = range(0, images, size)
    names = [shard_name(number) for number in range(len(starts))]
    stored = set(run.storage.work_names(item.work, folder))
    rows: list[Row] = [
        {"model": 0, "name": name, "start": start, "images": min(size, images - start)}
        for name, start in zip(names, starts, strict=True)
        if f"{folder}/{name}" not in stored
    ]
    if rows:
        if len(rows) < len(names):
            say(f"{title}: {len(names) - len(rows)} of {len(names)} shards are done already")
        arguments = {**run.arguments([item]), **arguments, "folder": folder}
        with Progress(title, sum(row["images"] for row in rows), "images") as progress:
            for answer in run_pool(worker, arguments, rows, run.resources):
                if answer["error"]:
                    raise MilanError(answer["error"])
                progress.advance(answer["images"])
    for name in names:
        yield of_table(run.storage.get_work(item.work, f"{folder}/{name}"))


def layer_moments(run: Run, item: ModelWork, share: float) -> Moments:
    """The moments of a layer's outputs on the images that features are fitted to.

    Raises:
        MilanError: The network failed, puts out what is not finite, or too many images cannot be read.
    """
    (layer,) = item.layers
    moments = Moments(item.described.layouts[layer].units)
    read = due = 0
    for piece in run_pass(run, item, MomentsWorker, "moments", f"moments of {layer}", share=share):
        moments.merge(Moments.of_state(piece))
        read, due = read + int(piece["images"][0]), due + int(piece["images"][1])
    if due - read > run.config.max_bad * due:
        raise MilanError(
            f"{due - read} of {due} images cannot be read, more than --max-bad {run.config.max_bad:g} allows: mend "
            "them, or allow more."
        )
    if not moments.positions:
        raise MilanError("there are no images to fit features to: give more images, or a smaller --held-out.")
    finite = bool(moments.mean.isfinite().all() and moments.scatter.isfinite().all() and moments.least.isfinite())
    if not finite:
        raise MilanError(
            f"layer {layer!r} of {item.model.name} puts out NaN or infinite values, to which no features can be "
            "fitted: choose an earlier layer, or mend its weights."
        )
    return moments
