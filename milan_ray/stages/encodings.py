"""Encodings: the encoder sees every image once, for all units, layers and models of a view.

exemplars ─► [scatter by chunk of images] ─► [actor pool: encode a chunk's images, pool with all masks] ─► [gather]
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from milan_ray.captioner.encoder import Encoder, MaskedExemplars, encode_exemplars
from milan_ray.config import Fingerprint, Resources, config_hash
from milan_ray.device import resolve_device
from milan_ray.engine.actor_pool import Row
from milan_ray.engine.stage import Job, Known, Layers, Output, Shard, ShardedStage, pairs, run_stage
from milan_ray.engine.tasks import FEW_ROWS, run_parallel
from milan_ray.exemplars import masks
from milan_ray.exemplars.masks import mask_size
from milan_ray.labelers.clip import Clip
from milan_ray.schema import ENCODINGS, EXEMPLARS
from milan_ray.stages.captioners import EncoderRef
from milan_ray.storage import EXEMPLARS_KEY, Storage
from milan_ray.storage.image_blocks import decode, read_pngs

KERNEL_VERSION = "encodings-3"

BATCH_SIZE = 16
"""Images per encoder pass: on a CPU larger ones are no faster and heavier, smaller ones slower."""

AnyEncoderRef = EncoderRef | Clip
"""An encoder as it travels to workers."""

_FEATURES_SCHEMA = pa.schema([("unit", pa.int32()), ("rank", pa.int16()), ("feature", pa.list_(pa.float32()))])


class EncodingWorker:
    """Encodes the images of one chunk once and pools them with every mask that refers to them."""

    def __init__(
        self,
        storage: Storage,
        work: str,
        outputs: dict[int, Output],
        mask_sizes: dict[int, tuple[int, int]],
        encoder: AnyEncoderRef,
        threads: int,
        device: str,
    ) -> None:
        torch.set_num_threads(threads)
        self._storage, self._work, self._outputs, self._mask_sizes = storage, work, outputs, mask_sizes
        self._device = resolve_device(device)
        self._encoder = encoder.load().to(self._device)

    def __call__(self, row: Row) -> Row:
        """Runs one chunk."""
        by_size: dict[tuple[int, int], list[pa.Table]] = defaultdict(list)
        for number in row["outputs"]:
            table = self._storage.get_work(self._work, f"masks/{row['name']}/{number}")
            source = pa.array(np.full(len(table), number, np.int32))
            by_size[self._mask_sizes[number]].append(table.append_column("source", source))
        tables = {size: pa.concat_tables(tables).sort_by("image_id") for size, tables in by_size.items()}
        shown = [table["image_id"].to_numpy() for table in tables.values()]
        ids = np.unique(np.concatenate(shown))
        pngs = list(read_pngs(self._storage, row["probe"], row["view"], ids.tolist()).values())
        groups = [
            MaskedExemplars(np.searchsorted(ids, images), partial(_unpacked, table["mask"].combine_chunks(), size))
            for images, (size, table) in zip(shown, tables.items(), strict=True)
        ]

        def maps(start: int, stop: int) -> list[torch.Tensor]:
            return encode(self._encoder, pngs[start:stop], BATCH_SIZE)

        encoded = encode_exemplars(self._encoder, groups, maps, len(ids), BATCH_SIZE)
        for table, features in zip(tables.values(), encoded, strict=True):
            sources = table["source"].to_numpy()
            for number in np.unique(sources).tolist():
                mine = np.flatnonzero(sources == number)
                piece = _features(table.take(mine), features[mine])
                self._storage.put_work(self._work, self._outputs[number].piece(row["name"]), piece)
        return {"images": len(ids)}


def _unpacked(packed: pa.Array, size: tuple[int, int], places: np.ndarray) -> torch.Tensor:
    """The masks (m, H, W) at some places of a column."""
    return torch.from_numpy(masks.unpack(packed.take(pa.array(places)).to_pylist(), size))


def _features(exemplars: pa.Table, features: np.ndarray) -> pa.Table:
    """Exemplars' features (M, F) as a table of unit, rank and feature."""
    offsets = np.arange(len(features) + 1, dtype=np.int32) * features.shape[1]
    lists = pa.ListArray.from_arrays(pa.array(offsets), pa.array(features.ravel()))
    return pa.table([exemplars["unit"], exemplars["rank"], lists], schema=_FEATURES_SCHEMA)


class Encodings(ShardedStage):
    """Features of every exemplar of some layers: the encoder sees every image once.

    Args:
        models: Model name → layers.
        encoder: Which encoder.
        units: The units of every layer to encode; empty for all.
    """

    worker = EncodingWorker
    table, counted = ENCODINGS, "chunks of images"
    name = label = "encodings"

    def __init__(self, models: Layers, encoder: AnyEncoderRef, units: tuple[int, ...] = ()) -> None:
        self._models, self._encoder, self._units = models, encoder, units
        self.title = f"encodings ({encoder.name})"

    def outputs(self, known: Known) -> Iterator[Output]:
        """Encodings of every layer, by what its exemplars are."""
        identity = {"kernel": KERNEL_VERSION, **self._encoder.load().identity()}
        for model, layer in pairs(self._models):
            exemplars = known.config(EXEMPLARS, model=model, layer=layer)
            known.check_units(self._units, model, layer)
            keys = {"encoder": self._encoder.name, "model": model, "layer": layer}
            yield Output(keys, Fingerprint.of({**identity, "exemplars": exemplars}, self._units))

    def shards(self, job: Job) -> list[Shard]:
        """Chunks of images; the exemplars of each lie beside it, so that no worker reads a layer as a whole."""
        used: dict[tuple[str, str], set[int]] = defaultdict(set)
        every = [_Scatter.of(job, output) for output in job.every]
        for index, ids in run_parallel(_image_ids, every, in_driver=self.merges_in_driver(job)):
            used[every[index].view].update(ids)
        starts = {view: chunk_starts(sorted(ids)) for view, ids in used.items()}
        due = [task for task in every if task.output in job.due]
        scatters = [replace(task, starts=starts[task.view]) for task in due]
        rows: dict[str, dict[str, Any]] = {}
        outputs: dict[str, list[int]] = defaultdict(list)
        for index, names in run_parallel(_scatter, scatters, in_driver=self.merges_in_driver(job)):
            probe, view = scatters[index].view
            for name in names:
                rows[name] = {"probe": probe, "view": view}
                outputs[name].append(scatters[index].output.number)
        return [Shard(name, tuple(sorted(outputs[name])), rows[name]) for name in sorted(rows)]

    def arguments(self, job: Job) -> dict[str, Any]:
        """The encoder, and how large each output's masks are."""
        return {
            "outputs": {output.number: output for output in job.due},
            "mask_sizes": {output.number: _Scatter.of(job, output).mask_size for output in job.due},
            "encoder": self._encoder,
        }

    def merge(self, storage: Storage, output: Output, pieces: Iterable[pa.Table]) -> pa.Table:
        """A layer's features, by unit and rank."""
        table = pa.concat_tables([_FEATURES_SCHEMA.empty_table(), *pieces])
        table = table.sort_by([("unit", "ascending"), ("rank", "ascending")]).combine_chunks()
        size = len(table["feature"][0]) if len(table) else 0
        exemplars = storage.config_of(EXEMPLARS, model=output.model, layer=output.layer)
        return ENCODINGS.table(output.columns(table), {"feature_size": str(size), EXEMPLARS_KEY: exemplars})

    def merges_in_driver(self, job: Job, shards: Sequence[Shard] = ()) -> bool:
        """Whether all layers together have few exemplars."""
        keys = ({"model": output.model, "layer": output.layer} for output in job.every)
        return sum(job.storage.count(EXEMPLARS, **of) for of in keys) <= FEW_ROWS


def run_encodings(
    storage: Storage,
    models: Layers,
    encoder: AnyEncoderRef,
    resources: Resources,
    units: tuple[int, ...] = (),
) -> None:
    """Encodes the exemplars of every layer whose encodings are missing or stale; arguments as of :class:`Encodings`.

    Raises:
        MilanError: Exemplars or the encoder are missing, or a layer has no such unit.
    """
    run_stage(Encodings(models, encoder, units), storage, resources)


@dataclass(frozen=True)
class _Scatter:
    """One layer's exemplars, to be sorted into chunks of images."""

    storage: Storage
    work: str
    output: Output
    view: tuple[str, str]
    mask_size: tuple[int, int]
    starts: tuple[int, ...] = ()

    @classmethod
    def of(cls, job: Job, output: Output) -> _Scatter:
        """The task of an output."""
        told = job.storage.metadata(EXEMPLARS, model=output.model, layer=output.layer) or {}
        return cls(job.storage, job.work, output, (told["probe"], told["view"]), mask_size(told))

    def read(self, columns: list[str]) -> pa.Table:
        """Some columns of the units that are wanted."""
        table = self.storage.read(EXEMPLARS, ["unit", *columns], model=self.output.model, layer=self.output.layer)
        return only_units(table, self.output.fingerprint.units)


def _image_ids(task: _Scatter) -> list[int]:
    """The images that a layer's exemplars show, ascending."""
    return np.unique(task.read(["image_id"])["image_id"].to_numpy()).tolist()


def chunk_starts(ids: Sequence[int]) -> tuple[int, ...]:
    """Cuts a view's images into chunks, the units of work, by the first of each.

    A few images make chunks small enough to keep several actors busy; many make chunks so large that hardly a block of
    views is read twice and files stay few. Which images share a chunk never changes a result.

    Args:
        ids: Image ids, ascending.
    """
    batches = min(max(len(ids) // (64 * BATCH_SIZE), 2), 16)
    return tuple(ids[:: batches * BATCH_SIZE])


def _scatter(task: _Scatter) -> list[str]:
    """Sorts a layer's exemplars into chunks of images; returns the chunks' names."""
    probe, view = task.view
    table = task.read(["rank", "image_id", "mask"]).sort_by("image_id").combine_chunks()
    cuts = np.searchsorted(table["image_id"].to_numpy(), [*task.starts, np.iinfo(np.int64).max])
    names = []
    for start, (begin, end) in zip(task.starts, itertools.pairwise(cuts.tolist()), strict=True):
        if begin < end:
            names.append(f"{config_hash({'view': view, 'probe': probe})}-{start:09d}")
            part = table.slice(begin, end - begin)
            task.storage.put_work(task.work, f"masks/{names[-1]}/{task.output.number}", part)
    return names


def encode(encoder: Encoder, pngs: Sequence[bytes], batch_size: int) -> list[torch.Tensor]:
    """One encoder pass over up to a batch of views, padded to the full batch so that results do not depend on it.

    Args:
        encoder: The encoder.
        pngs: n ≤ batch_size encoded views of one size.
        batch_size: Images per pass.

    Returns:
        The encoder's maps of n images; of a pyramid, one (n, C, h, w) per level.
    """
    pixels = np.stack([decode(png) for png in pngs])
    padded = np.zeros((batch_size, *pixels.shape[1:]), np.uint8)
    padded[: len(pixels)] = pixels
    images = torch.from_numpy(padded).to(encoder.mean.device).permute(0, 3, 1, 2).float() * (1 / 255)
    return [level[: len(pixels)] for level in encoder.maps(encoder.fit(images))]


def only_units(table: pa.Table, units: tuple[int, ...]) -> pa.Table:
    """The rows of some units; all of them where none are named."""
    return table.filter(pc.is_in(table["unit"], pa.array(units, table["unit"].type))) if units else table


def unit_features(table: pa.Table) -> dict[int, np.ndarray]:
    """Features by unit, from a layer's encodings: unit → float32 (k, F), by rank."""
    table = table.combine_chunks()
    units = table["unit"].to_numpy()
    column = table["feature"].combine_chunks()
    flat = column.flatten().to_numpy()
    if len(units) == 0:
        return {}
    matrix = flat.reshape(len(units), -1)
    starts = np.flatnonzero(np.diff(units, prepend=units[0] - 1))
    return {int(units[a]): matrix[a:b] for a, b in zip(starts, [*starts[1:], len(units)], strict=True)}
