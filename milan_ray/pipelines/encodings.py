"""Encodings (DESIGN §4): the encoder sees every image once, for all units, layers and models of a view.

exemplars ─► [scatter by image block] ─► [actor pool: encode a block's images, pool with all masks] ─► [gather]
"""

from __future__ import annotations

import hashlib
import io
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
from PIL import Image

from milan_ray.captioner.encoder import PyramidEncoder, pool_maps
from milan_ray.config import Resources, config_hash
from milan_ray.device import resolve_device
from milan_ray.errors import MilanError
from milan_ray.exemplars import masks
from milan_ray.models.weights import weights_digest
from milan_ray.pipelines.captioners import EncoderRequest
from milan_ray.pipelines.fanout import run_parallel
from milan_ray.pipelines.pool import Row, run_pool
from milan_ray.pipelines.records import record_run
from milan_ray.pipelines.views import block_of, read_block
from milan_ray.progress import Progress, say
from milan_ray.schema import ENCODINGS, EXEMPLARS
from milan_ray.storage import CONFIG_KEY, EXEMPLARS_KEY, Storage

KERNEL_VERSION = "encodings-1"

BATCH_SIZE = 32
"""Images per encoder pass: what fits the cache; larger ones are slower and heavier on a CPU."""

_FEATURES_SCHEMA = pa.schema([("unit", pa.int32()), ("rank", pa.int16()), ("feature", pa.list_(pa.float32()))])

FEATURES = "features"


@dataclass(frozen=True)
class Source:
    """One layer's exemplars on their way through the encoder.

    Attributes:
        number: Its folder in the work.
        model: Name of the model.
        layer: Module path.
        config: Configuration hash of its encodings.
        exemplars: File metadata of its exemplars.
    """

    number: int
    model: str
    layer: str
    config: str
    exemplars: Mapping[str, str]


def run_encodings(
    storage: Storage,
    models: Mapping[str, Sequence[str]],
    encoder: EncoderRequest,
    resources: Resources,
) -> None:
    """Encodes the exemplars of every layer whose encodings are missing or stale.

    Args:
        storage: The run directory, which holds exemplars and views.
        models: Model name → layers.
        encoder: Which encoder.
        resources: What of the cluster to use; Ray must be connected.

    Raises:
        MilanError: Exemplars or the encoder are missing.
    """
    every = _sources(storage, models, encoder)
    # Over all layers, so that a job killed while results become public finds its features again.
    work = config_hash({"encodings": [source.config for source in every]})
    sources = [
        source
        for source in every
        if not storage.is_current(
            ENCODINGS, source.config, encoder=encoder.name, model=source.model, layer=source.layer
        )
    ]
    if not sources:
        storage.remove_work(work)
        say(f"encodings ({encoder.name}): all up to date")
        return
    blocks: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    tasks = [_Scatter(storage, work, source) for source in sources]
    for index, touched in run_parallel(_scatter, tasks):
        meta = sources[index].exemplars
        for block in touched:
            blocks[meta["probe"], meta["view"], block].append(sources[index].number)
    stored = set(storage.work_names(work, FEATURES))
    every_row: list[Row] = []
    for (probe, view, block), numbers in sorted(blocks.items()):
        name = f"{config_hash({'view': view, 'probe': probe})}-{block}"
        every_row.append({"name": name, "probe": probe, "view": view, "block": block, "sources": sorted(numbers)})
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
    started, images = time.monotonic(), 0
    with Progress("encodings", len(rows), "blocks of images") as progress:
        for answer in run_pool(EncodingWorker, arguments, rows, resources):
            progress.advance()
            images += answer["images"]
    parts = {
        source.number: tuple(row["name"] for row in every_row if source.number in row["sources"]) for source in sources
    }
    gathers = [_Gather(storage, work, encoder.name, source, parts[source.number]) for source in sources]
    rows_of: dict[str, int] = defaultdict(int)
    for index, count in run_parallel(_gather, gathers):
        rows_of[sources[index].model] += count
    for model in {source.model for source in sources}:
        record_run(
            storage, "encodings", work, model, rows=rows_of[model], images=images, seconds=time.monotonic() - started
        )
    storage.remove_work(work)


def _sources(storage: Storage, models: Mapping[str, Sequence[str]], encoder: EncoderRequest) -> list[Source]:
    """All layers, with the configuration hash that their encodings should have."""
    net = encoder.load()
    identity = {
        "kernel": KERNEL_VERSION,
        "weights": weights_digest(net.backbone),
        "structure": hashlib.sha256(repr(net.backbone).encode()).hexdigest(),
        "layers": net.spec.layers,
        "size": net.spec.size,
        "mean": net.spec.mean,
        "std": net.spec.std,
    }
    found: list[Source] = []
    for model, layers in models.items():
        for layer in layers:
            meta = storage.metadata(EXEMPLARS, model=model, layer=layer)
            if meta is None:
                raise MilanError(f"no exemplars of {model} {layer} in {storage.root}; run jobs.exemplars first.")
            config = config_hash({**identity, "exemplars": meta[CONFIG_KEY]})
            found.append(Source(len(found), model, layer, config, meta))
    return found


@dataclass(frozen=True)
class _Scatter:
    storage: Storage
    work: str
    source: Source


def _scatter(task: _Scatter) -> list[str]:
    """Sorts a layer's exemplars into blocks of images; returns the blocks."""
    source = task.source
    columns = ["unit", "rank", "image_id", "mask"]
    table = task.storage.read(EXEMPLARS, columns, model=source.model, layer=source.layer).combine_chunks()
    block = np.array([block_of(image_id) for image_id in table["image_id"].to_pylist()])
    names = sorted(set(block.tolist()))
    for name in names:
        part = table.filter(pa.array(block == name))
        task.storage.put_work(task.work, f"masks/{name}/{source.number}", part)
    return names


class EncodingWorker:
    """Encodes the images of one block once and pools them with every mask that refers to them."""

    def __init__(
        self,
        storage: Storage,
        work: str,
        sources: dict[int, Source],
        encoder: EncoderRequest,
        threads: int,
        device: str,
    ) -> None:
        torch.set_num_threads(threads)
        self._storage, self._work, self._sources = storage, work, sources
        self._device = resolve_device(device)
        self._encoder = encoder.load().to(self._device)

    def __call__(self, row: Row) -> Row:
        """Runs one block."""
        exemplars = {n: self._storage.get_work(self._work, f"masks/{row['block']}/{n}") for n in row["sources"]}
        ids = sorted({i for table in exemplars.values() for i in table["image_id"].to_pylist()})
        views = read_block(self._storage, row["probe"], row["view"], row["block"], ids)["image"].to_pylist()
        parts: dict[int, list[pa.Table]] = defaultdict(list)
        for start in range(0, len(ids), BATCH_SIZE):
            batch = ids[start : start + BATCH_SIZE]
            maps = encode(self._encoder, views[start : start + BATCH_SIZE], BATCH_SIZE)
            for number, table in exemplars.items():
                places = pc.index_in(table["image_id"], pa.array(batch, pa.int64()))
                mine = table.append_column("place", places).filter(pc.is_valid(places))
                if len(mine):
                    parts[number].append(self._pool(mine, maps, self._sources[number].exemplars))
        for number, tables in parts.items():
            self._storage.put_work(self._work, f"{FEATURES}/{number}/{row['name']}", pa.concat_tables(tables))
        return {"images": len(ids)}

    def _pool(self, table: pa.Table, maps: list[torch.Tensor], meta: Mapping[str, str]) -> pa.Table:
        size = int(meta["mask_height"]), int(meta["mask_width"])
        regions = torch.from_numpy(masks.unpack(table["mask"].to_pylist(), size)).to(self._device)
        index = torch.from_numpy(np.array(table["place"], dtype=np.int64)).to(self._device)
        features = pool_maps(maps, regions, index).cpu().numpy()
        offsets = np.arange(len(features) + 1, dtype=np.int32) * features.shape[1]
        lists = pa.ListArray.from_arrays(pa.array(offsets), pa.array(features.ravel()))
        return pa.table([table["unit"], table["rank"], lists], schema=_FEATURES_SCHEMA)


def encode(encoder: PyramidEncoder, pngs: Sequence[bytes], batch_size: int) -> list[torch.Tensor]:
    """One encoder pass over up to a batch of views, padded to the full batch so that results do not depend on it.

    Args:
        encoder: The encoder.
        pngs: n ≤ batch_size encoded views of one size.
        batch_size: Images per pass.

    Returns:
        One (n, C, h, w) per pyramid level.
    """
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(png))) for png in pngs])
    padded = np.zeros((batch_size, *pixels.shape[1:]), np.uint8)
    padded[: len(pixels)] = pixels
    images = torch.from_numpy(padded).to(encoder.mean.device).permute(0, 3, 1, 2).float() * (1 / 255)
    side = encoder.spec.size
    if images.shape[-2:] != (side, side):
        images = F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False, antialias=True)
    return [level[: len(pixels)] for level in encoder.maps(images)]


@dataclass(frozen=True)
class _Gather:
    storage: Storage
    work: str
    encoder: str
    source: Source
    names: tuple[str, ...]


def _gather(task: _Gather) -> int:
    """Puts a layer's features together and makes them public; returns the number of rows."""
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
    task.storage.write(ENCODINGS, ENCODINGS.table(columns, metadata), source.config, **keys)
    return len(table)


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
