"""Encodings: the encoder sees every image once, for all units, layers and models of a view.

exemplars ─► [scatter by chunk of images] ─► [actor pool: encode a chunk's images, pool with all masks] ─► [gather]
"""

from __future__ import annotations

import io
import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL import Image

from milan_ray.config import Recipe, Resources, config_hash
from milan_ray.device import resolve_device
from milan_ray.engine.actor_pool import Row, run_pool
from milan_ray.engine.references import check_units
from milan_ray.engine.run_log import Cost, record_run
from milan_ray.engine.tasks import FEW_ROWS, beside_others, removed_if_damaged, run_parallel
from milan_ray.errors import MilanError
from milan_ray.exemplars import masks
from milan_ray.progress import Progress, say
from milan_ray.schema import ENCODINGS, EXEMPLARS, LEVELS
from milan_ray.stages.images import block_of, read_block
from milan_ray.storage import CONFIG_KEY, EXEMPLARS_KEY, Storage

KERNEL_VERSION = "encodings-3"

BATCH_SIZE = 16
"""Images per encoder pass: on a CPU larger ones are no faster and heavier, smaller ones slower."""

MASKS = 256
"""Masks pooled at once: what bounds memory where an image is an exemplar of thousands of units."""

_FEATURES_SCHEMA = pa.schema([("unit", pa.int32()), ("rank", pa.int16()), ("feature", pa.list_(pa.float32()))])

FEATURES = "features"


class Encoder(Protocol):
    """What turns images and masks into features: a captioner's encoder, or a model of images and texts."""

    mean: torch.Tensor

    def identity(self) -> dict[str, object]:
        """All that decides features besides images and masks."""

    def to(self, device: torch.device) -> Any:
        """The encoder, moved."""

    def fit(self, images: torch.Tensor) -> torch.Tensor:
        """Images (N, 3, H, W) in [0, 1] at the encoder's own size."""

    def maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        """What is the same for all masks, from one pass over N images: tensors of N rows."""

    def pool(self, maps: Sequence[torch.Tensor], masks: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Features (M, F) of masks (M, H, W), ``index`` (M,) telling whose image each belongs to."""


class Request(Protocol):
    """An encoder as it travels to workers."""

    @property
    def name(self) -> str:
        """Its name in the table of encodings."""

    def load(self) -> Encoder:
        """Builds it."""


@dataclass(frozen=True)
class Source:
    """One layer's exemplars on their way through the encoder.

    Attributes:
        number: Its folder in the work.
        model: Name of the model.
        layer: Module path.
        recipe: What decides its encodings.
        exemplars: File metadata of its exemplars.
    """

    number: int
    model: str
    layer: str
    recipe: Recipe
    exemplars: Mapping[str, str]

    @property
    def name(self) -> tuple[str, str]:
        """(model, layer)."""
        return self.model, self.layer

    @property
    def view(self) -> tuple[str, str]:
        """(probe, view): what its images are."""
        return self.exemplars["probe"], self.exemplars["view"]

    @property
    def mask_size(self) -> tuple[int, int]:
        """(height, width) of its masks, pixels."""
        return int(self.exemplars["mask_height"]), int(self.exemplars["mask_width"])


@beside_others
def run_encodings(
    storage: Storage,
    models: Mapping[str, Sequence[str]],
    encoder: Request,
    resources: Resources,
    units: tuple[int, ...] = (),
) -> None:
    """Encodes the exemplars of every layer whose encodings are missing or stale.

    Args:
        storage: The run directory, which holds exemplars and views.
        models: Model name → layers.
        encoder: Which encoder.
        resources: What of the cluster to use; Ray must be connected.
        units: The units of every layer to encode; empty for all.

    Raises:
        MilanError: Exemplars or the encoder are missing, or a layer has no such unit.
    """
    every = _sources(storage, models, encoder, units)
    # Over all layers, so that a job killed while results become public finds its features again.
    work = config_hash({"encodings": [source.recipe.hash for source in every]})
    sources = [
        source
        for source in every
        if storage.why(ENCODINGS, source.recipe, encoder=encoder.name, model=source.model, layer=source.layer)
    ]
    if not sources:
        storage.remove_work(work)
        say(f"encodings ({encoder.name}): all up to date")
        return
    with removed_if_damaged(storage, work):
        used: dict[tuple[str, str], set[int]] = defaultdict(set)
        here = sum(storage.count(EXEMPLARS, model=source.model, layer=source.layer) for source in every) <= FEW_ROWS
        for index, ids in run_parallel(_image_ids, [_Scatter(storage, work, source) for source in every], here=here):
            used[every[index].view].update(ids)
        starts = {view: chunk_starts(sorted(ids)) for view, ids in used.items()}
        row_of: dict[str, Row] = {}
        scatters = [_Scatter(storage, work, source, starts[source.view]) for source in sources]
        for index, names in run_parallel(_scatter, scatters, here=here):
            probe, view = sources[index].view
            for name in names:
                row = row_of.setdefault(name, {"name": name, "probe": probe, "view": view, "sources": []})
                row["sources"].append(sources[index].number)
        stored = set(storage.work_names(work, FEATURES))
        every_row = [{**row_of[name], "sources": sorted(row_of[name]["sources"])} for name in sorted(row_of)]
        rows = [row for row in every_row if any(f"{FEATURES}/{n}/{row['name']}" not in stored for n in row["sources"])]
        say(f"encodings ({encoder.name}): {len(sources)} layers of {len({s.model for s in sources})} models")
        arguments = {
            "storage": storage,
            "work": work,
            "sources": {source.number: source for source in sources},
            "encoder": encoder,
            "threads": resources.threads,
            "device": resources.device,
        }
        costs = {source.number: Cost() for source in sources}
        pieces = (every[number].name for row in rows for number in row["sources"])
        with Progress("encodings", len(rows), "chunks of images", pieces) as progress:
            for answer in run_pool(EncodingWorker, arguments, rows, resources):
                progress.advance(1, (every[number].name for number in answer["sources"]))
                for number in answer["sources"]:
                    costs[number].add(answer["seconds"], len(answer["sources"]), answer["images"])
        parts = {
            source.number: tuple(row["name"] for row in every_row if source.number in row["sources"])
            for source in sources
        }
        gathers = [
            _Gather(storage, work, encoder.name, source, parts[source.number], costs[source.number])
            for source in sources
        ]
        for _ in run_parallel(_gather, gathers, here=here):
            pass
    storage.remove_work(work)


def encoder_identity(encoder: Request) -> dict[str, object]:
    """All that decides encodings besides the exemplars."""
    return {"kernel": KERNEL_VERSION, **encoder.load().identity()}


def encodings_recipe(encoder: Mapping[str, object], exemplars: str, units: tuple[int, ...]) -> Recipe:
    """What decides a layer's encodings.

    Args:
        encoder: As :func:`encoder_identity` gives it.
        exemplars: Configuration hash of the layer's exemplars.
        units: The units selected; empty for all.
    """
    return Recipe.of({**encoder, "exemplars": exemplars}, units)


def _sources(
    storage: Storage, models: Mapping[str, Sequence[str]], encoder: Request, units: tuple[int, ...]
) -> list[Source]:
    """All layers, with the recipe that their encodings should have."""
    identity = encoder_identity(encoder)
    found: list[Source] = []
    for model, layers in models.items():
        for layer in layers:
            meta = storage.metadata(EXEMPLARS, model=model, layer=layer)
            if meta is None:
                raise MilanError(f"no exemplars of {model} {layer} in {storage.root}; run jobs.exemplars first.")
            count = storage.count(LEVELS, model=model, layer=layer)
            check_units(units, count, model, layer)
            recipe = encodings_recipe(identity, meta[CONFIG_KEY], units)
            found.append(Source(len(found), model, layer, recipe, meta))
    return found


@dataclass(frozen=True)
class _Scatter:
    storage: Storage
    work: str
    source: Source
    starts: tuple[int, ...] = ()

    def read(self, columns: list[str]) -> pa.Table:
        source = self.source
        table = self.storage.read(EXEMPLARS, ["unit", *columns], model=source.model, layer=source.layer)
        return only_units(table, source.recipe.units)


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
    probe, view = task.source.view
    table = task.read(["rank", "image_id", "mask"]).sort_by("image_id").combine_chunks()
    cuts = np.searchsorted(table["image_id"].to_numpy(), [*task.starts, np.iinfo(np.int64).max])
    names = []
    for start, (begin, end) in zip(task.starts, itertools.pairwise(cuts.tolist()), strict=True):
        if begin < end:
            names.append(f"{config_hash({'view': view, 'probe': probe})}-{start:09d}")
            part = table.slice(begin, end - begin)
            task.storage.put_work(task.work, f"masks/{names[-1]}/{task.source.number}", part)
    return names


class EncodingWorker:
    """Encodes the images of one chunk once and pools them with every mask that refers to them."""

    def __init__(
        self,
        storage: Storage,
        work: str,
        sources: dict[int, Source],
        encoder: Request,
        threads: int,
        device: str,
    ) -> None:
        torch.set_num_threads(threads)
        self._storage, self._work, self._sources = storage, work, sources
        self._device = resolve_device(device)
        self._encoder = encoder.load().to(self._device)

    def __call__(self, row: Row) -> Row:
        """Runs one chunk."""
        by_size: dict[tuple[int, int], list[pa.Table]] = defaultdict(list)
        for number in row["sources"]:
            table = self._storage.get_work(self._work, f"masks/{row['name']}/{number}")
            source = pa.array(np.full(len(table), number, np.int32))
            by_size[self._sources[number].mask_size].append(table.append_column("source", source))
        exemplars = {size: pa.concat_tables(tables).sort_by("image_id") for size, tables in by_size.items()}
        ids = np.unique(np.concatenate([table["image_id"].to_numpy() for table in exemplars.values()])).tolist()
        views = self._views(row, ids)
        pooled: list[pa.Table] = []
        for start in range(0, len(ids), BATCH_SIZE):
            batch = np.array(ids[start : start + BATCH_SIZE])
            maps = encode(self._encoder, views[start : start + BATCH_SIZE], BATCH_SIZE)
            for size, table in exemplars.items():
                begin, end = np.searchsorted(table["image_id"].to_numpy(), [batch[0], batch[-1] + 1]).tolist()
                for first in range(begin, end, MASKS):
                    pooled.append(self._pool(table.slice(first, min(MASKS, end - first)), batch, maps, size))
        features = pa.concat_tables(pooled)
        for number in row["sources"]:
            part = features.filter(pc.equal(features["source"], number)).drop_columns("source")
            self._storage.put_work(self._work, f"{FEATURES}/{number}/{row['name']}", part)
        return {"sources": row["sources"], "images": len(ids)}

    def _views(self, row: Row, ids: list[int]) -> list[bytes]:
        """The images' PNGs, in the order of the ids; every block is read once."""
        pngs: list[bytes] = []
        for block, members in itertools.groupby(ids, block_of):
            pngs += read_block(self._storage, row["probe"], row["view"], block, list(members))["image"].to_pylist()
        return pngs

    def _pool(
        self, table: pa.Table, batch: np.ndarray, maps: list[torch.Tensor], mask_size: tuple[int, int]
    ) -> pa.Table:
        regions = torch.from_numpy(masks.unpack(table["mask"].to_pylist(), mask_size)).to(self._device)
        index = torch.from_numpy(np.searchsorted(batch, table["image_id"].to_numpy())).to(self._device)
        features = self._encoder.pool(maps, regions, index).cpu().numpy()
        offsets = np.arange(len(features) + 1, dtype=np.int32) * features.shape[1]
        lists = pa.ListArray.from_arrays(pa.array(offsets), pa.array(features.ravel()))
        return pa.table([table["unit"], table["rank"], lists], schema=_FEATURES_SCHEMA).append_column(
            "source", table["source"]
        )


def encode(encoder: Encoder, pngs: Sequence[bytes], batch_size: int) -> list[torch.Tensor]:
    """One encoder pass over up to a batch of views, padded to the full batch so that results do not depend on it.

    Args:
        encoder: The encoder.
        pngs: n ≤ batch_size encoded views of one size.
        batch_size: Images per pass.

    Returns:
        The encoder's maps of n images; of a pyramid, one (n, C, h, w) per level.
    """
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(png))) for png in pngs])
    padded = np.zeros((batch_size, *pixels.shape[1:]), np.uint8)
    padded[: len(pixels)] = pixels
    images = torch.from_numpy(padded).to(encoder.mean.device).permute(0, 3, 1, 2).float() * (1 / 255)
    return [level[: len(pixels)] for level in encoder.maps(encoder.fit(images))]


@dataclass(frozen=True)
class _Gather:
    storage: Storage
    work: str
    encoder: str
    source: Source
    names: tuple[str, ...]
    cost: Cost


def _gather(task: _Gather) -> None:
    """Puts a layer's features together and makes them public."""
    source = task.source
    names = [f"{FEATURES}/{source.number}/{name}" for name in task.names]
    empty = _FEATURES_SCHEMA.empty_table()
    table = pa.concat_tables([empty, *(task.storage.get_work(task.work, name) for name in names)])
    table = table.sort_by([("unit", "ascending"), ("rank", "ascending")]).combine_chunks()
    keys = {"encoder": task.encoder, "model": source.model, "layer": source.layer}
    columns: dict[str, object] = {name: [value] * len(table) for name, value in keys.items()}
    size = len(table["feature"][0]) if len(table) else 0
    columns |= {name: table[name] for name in ("unit", "rank", "feature")}
    metadata = {"feature_size": str(size), EXEMPLARS_KEY: source.exemplars[CONFIG_KEY]}
    run, model, layer = source.recipe.hash, source.model, source.layer
    record_run(task.storage, "encodings", run, model, layer=layer, rows=len(table), cost=task.cost)
    task.storage.write(ENCODINGS, ENCODINGS.table(columns, metadata), source.recipe, **keys)


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
