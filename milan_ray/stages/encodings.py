"""Encodings: the encoder sees every image once, for all units, layers and models of a view.

exemplars ─► [scatter by chunk of images] ─► [actor pool: encode a chunk's images, pool with all masks] ─► [gather]
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from milan_ray.captioner.encoder import Encoder, MaskedExemplars, encode_exemplars
from milan_ray.config import Fingerprint, config_hash
from milan_ray.device import to_device
from milan_ray.engine.actor_pool import Row
from milan_ray.engine.scattered import Scattered
from milan_ray.engine.stage import (
    Job,
    Known,
    Layers,
    Output,
    Shard,
    ShardedStage,
    Shards,
    ShardWorker,
    pairs,
    piece_schema,
)
from milan_ray.engine.tasks import FEW_ROWS, run_parallel
from milan_ray.exemplars import masks
from milan_ray.exemplars.masks import mask_size
from milan_ray.labelers.clip import Clip
from milan_ray.schema import ENCODINGS, EXEMPLARS, Table
from milan_ray.stages.captioners import EncoderRef
from milan_ray.stages.embeddings import padded
from milan_ray.storage import EXEMPLARS_KEY, Storage
from milan_ray.storage.image_blocks import decode, read_pngs

KERNEL_VERSION = "encodings-3"

BATCH_SIZE = 16
"""Images per encoder pass: on a CPU, larger batches take more memory and are no faster, smaller ones are slower."""

MOST_ROWS = 4096
"""Exemplars per chunk, about, beyond 256 images: 64 MB of features of ResNet-101's pyramid."""

AnyEncoderRef = EncoderRef | Clip
"""A reference to an encoder, from which workers load it."""

Masked = Callable[[Storage, Output, Sequence[str]], pa.Table]
"""From an output of encodings to columns of what it encodes: of unit, rank, image_id and mask."""

_FEATURES_SCHEMA = piece_schema(ENCODINGS)


class EncodingWorker(ShardWorker):
    """Encodes the images of one chunk once and pools them with every mask that refers to them."""

    def __init__(self, mask_sizes: dict[int, tuple[int, int]], encoder: AnyEncoderRef, **context: Any) -> None:
        super().__init__(**context)
        self._mask_sizes = mask_sizes
        self._encoder = encoder.load().to(self._device)
        self._scattered = Scattered(self._storage, self._work)

    def __call__(self, row: Row) -> Row:
        """Runs one chunk."""
        by_size: dict[tuple[int, int], list[pa.Table]] = defaultdict(list)
        for number, table in self._scattered.get(row["outputs"], row["name"]):
            source = pa.array(np.full(len(table), number, np.int32))
            by_size[self._mask_sizes[number]].append(table.append_column("source", source))
        tables = {size: pa.concat_tables(tables).sort_by("image_id") for size, tables in by_size.items()}
        image_ids = [table["image_id"].to_numpy() for table in tables.values()]
        ids = np.unique(np.concatenate(image_ids))
        pngs = list(read_pngs(self._storage, row["probe"], row["view"], ids.tolist()).values())
        groups = [
            MaskedExemplars(np.searchsorted(ids, images), partial(_unpacked, table["mask"].combine_chunks(), size))
            for images, (size, table) in zip(image_ids, tables.items(), strict=True)
        ]

        def maps(start: int, stop: int) -> list[torch.Tensor]:
            return encode(self._encoder, pngs[start:stop], BATCH_SIZE)

        encoded = encode_exemplars(self._encoder, groups, maps, len(ids), BATCH_SIZE)

        def parts() -> Iterator[tuple[int, pa.Table]]:
            for table, features in zip(tables.values(), encoded, strict=True):
                sources = table["source"].to_numpy()
                for number in np.unique(sources).tolist():
                    rows = np.flatnonzero(sources == number)
                    yield number, _features(table.take(rows), features[rows])

        self._store(row, parts())
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

    Attributes:
        few: Exemplars of a job up to which the driver scatters and merges them.
    """

    few: ClassVar[int] = FEW_ROWS
    worker = EncodingWorker
    table: ClassVar[Table] = ENCODINGS
    counted = "chunks of images"
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

    def shards(self, job: Job) -> Shards:
        """Chunks of images; the exemplars of each are stored with it, so that no worker reads a layer as a whole."""
        counts = [job.storage.count(EXEMPLARS, **output.of_layer) for output in job.every]
        few = sum(counts) <= self.few
        views = [_view(job.storage, output) for output in job.every]
        used: dict[tuple[str, str], set[int]] = defaultdict(set)
        for index, ids in run_parallel(partial(_image_ids, job.storage, self.masked), job.every, in_driver=few):
            used[views[index]].update(ids)
        shown: Counter[tuple[str, str]] = Counter()
        for view, count in zip(views, counts, strict=True):
            shown[view] += count
        starts = {view: chunk_starts(sorted(ids), shown[view]) for view, ids in used.items()}
        rows: dict[str, dict[str, str]] = {}
        outputs: dict[str, list[int]] = defaultdict(list)
        tasks = [(output, views[output.number], starts[views[output.number]]) for output in job.due]
        for index, names in run_parallel(partial(_scatter, job.storage, job.work, self.masked), tasks, in_driver=few):
            output, (probe, key), _ = tasks[index]
            for name in names:
                rows[name] = {"probe": probe, "view": key}
                outputs[name].append(output.number)
        return Shards([Shard(name, tuple(sorted(outputs[name])), rows[name]) for name in sorted(rows)], few)

    def arguments(self, job: Job) -> dict[str, Any]:
        """The encoder, and the size of each output's masks."""
        sizes = {output.number: mask_size(_metadata(job.storage, output)) for output in job.due}
        return {"mask_sizes": sizes, "encoder": self._encoder}

    def merge(self, storage: Storage, output: Output, pieces: Iterable[pa.Table]) -> pa.Table:
        """A layer's features, by unit and rank."""
        table = pa.concat_tables([_FEATURES_SCHEMA.empty_table(), *pieces])
        table = table.sort_by([("unit", "ascending"), ("rank", "ascending")]).combine_chunks()
        size = len(table["feature"][0]) if len(table) else 0
        exemplars = storage.config_of(EXEMPLARS, **output.of_layer)
        return self.table.table(output.columns(table), {"feature_size": str(size), EXEMPLARS_KEY: exemplars})

    @property
    def masked(self) -> Masked:
        """What is encoded; small, because it travels to workers."""
        return _exemplars


def _metadata(storage: Storage, output: Output) -> dict[str, str]:
    """Metadata of the exemplars that an output encodes."""
    return storage.metadata(EXEMPLARS, **output.of_layer) or {}


def _view(storage: Storage, output: Output) -> tuple[str, str]:
    """(probe, view) of the exemplars that an output encodes."""
    metadata = _metadata(storage, output)
    return metadata["probe"], metadata["view"]


def _exemplars(storage: Storage, output: Output, columns: Sequence[str]) -> pa.Table:
    """Columns of the exemplars that an output encodes."""
    return only_units(storage.read(EXEMPLARS, ["unit", *columns], **output.of_layer), output.fingerprint.units)


def _image_ids(storage: Storage, masked: Masked, output: Output) -> list[int]:
    """The images that an output encodes, ascending."""
    return np.unique(masked(storage, output, ["image_id"])["image_id"].to_numpy()).tolist()


def chunk_starts(ids: Sequence[int], exemplars: int) -> tuple[int, ...]:
    """Cuts a view's images into chunks, the units of work, by the first of each.

    A few images make chunks small enough to keep several actors busy; many make chunks so large that hardly a block of
    views is read twice and layers have more than a few rows in each. Which images share a chunk never changes a result.

    Args:
        ids: Image ids, ascending.
        exemplars: Exemplars that show them, for a bound on a chunk's features; at least as many.
    """
    most = min(64, max(16, MOST_ROWS * len(ids) // (BATCH_SIZE * max(1, exemplars))))
    batches = min(max(len(ids) // (64 * BATCH_SIZE), 2), most)
    return tuple(ids[:: batches * BATCH_SIZE])


def _scatter(
    storage: Storage, work: str, masked: Masked, task: tuple[Output, tuple[str, str], Sequence[int]]
) -> list[str]:
    """Sorts an output's exemplars of a (probe, view) into chunks that start at these images; returns their names."""
    output, (probe, view), starts = task
    table = masked(storage, output, ["rank", "image_id", "mask"]).sort_by("image_id").combine_chunks()
    cuts = np.searchsorted(table["image_id"].to_numpy(), [*starts, np.iinfo(np.int64).max])
    of_view = config_hash({"view": view, "probe": probe})
    parts = [
        (f"{of_view}-{start:09d}", table.slice(begin, end - begin))
        for start, (begin, end) in zip(starts, itertools.pairwise(cuts.tolist()), strict=True)
        if begin < end
    ]
    Scattered(storage, work).put(output.number, parts)
    return [name for name, _ in parts]


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
    views = to_device(padded(pixels, batch_size), encoder.mean.device)
    images = views.permute(0, 3, 1, 2).float() * (1 / 255)
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
