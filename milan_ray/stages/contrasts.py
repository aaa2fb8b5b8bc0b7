"""Contrasts (docs/contrast.md): the probe images most like a unit's exemplars that do not excite it, and random ones.

pooled, exemplars, image_embeddings ─► [actor pool: a block of units] ─► contrasts
contrasts ─► [views] ─► [actor pool: encode, as encodings] ─► contrast_encodings
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa

from milan_ray.config import ContrastConfig, ExemplarConfig, Fingerprint
from milan_ray.engine import references
from milan_ray.engine.actor_pool import Row
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
from milan_ray.engine.tasks import FEW_IMAGES
from milan_ray.errors import MilanError
from milan_ray.exemplars.contrasts import CONTRASTS_VERSION, RANDOM, SIMILAR, choose, not_exciting, quantiles
from milan_ray.exemplars.masks import mask_size
from milan_ray.exemplars.pooled import matrix
from milan_ray.schema import CONTRAST_ENCODINGS, CONTRASTS, EXEMPLARS, IMAGE_EMBEDDINGS, POOLED, Table
from milan_ray.stages.embeddings import ImageEmbeddings, embedded_ids, embeddings_of, padded, products
from milan_ray.stages.encodings import KERNEL_VERSION as ENCODINGS_VERSION
from milan_ray.stages.encodings import AnyEncoderRef, Encodings, Masked, only_units
from milan_ray.stages.images import ExemplarImages, ensure_views
from milan_ray.storage import CONTRASTS_KEY, EXEMPLARS_KEY, Storage

UNITS_PER_SHARD = 64
"""Units per shard, which bounds memory: images × units × 4 bytes, and the probe's embeddings."""

EXEMPLARS_PADDED = 16
"""Exemplars of a unit are padded to a multiple of this number, so that products have few shapes."""

POOLING = "max"
"""Column of table ``pooled`` that says what does not excite a unit: the statistic that exemplars are chosen by."""

Masks = Literal["exemplar", "whole"]
"""Which part of a contrast the captioner reads: the mask of the exemplar that it is paired with, or all of it."""

_ROWS_SCHEMA = piece_schema(CONTRASTS)


@dataclass(frozen=True)
class ContrastSource:
    """What contrasts are chosen from, and how a captioner reads them.

    Attributes:
        images: The probe as the model of images and texts sees it, which says what images are alike.
        models: Model → reference, of the models that were dissected on the probe.
        dissection: How their exemplars were made.
        config: Which contrasts.
        masks: Which part of a contrast a captioner reads.
    """

    images: ImageEmbeddings
    models: Mapping[str, references.ModelRef]
    dissection: ExemplarConfig
    config: ContrastConfig = field(default_factory=ContrastConfig)
    masks: Masks = "exemplar"

    def keys(self, model: str, layer: str) -> dict[str, str]:
        """The partition of a layer's contrasts."""
        return {"encoder": self.images.ref.name, "model": model, "layer": layer}


class ContrastWorker(ShardWorker):
    """Chooses the contrasts of a block of units."""

    def __init__(self, images: dict[str, str], config: ContrastConfig, **context: Any) -> None:
        super().__init__(**context)
        self._images, self._config = images, config
        self._known = embedded_ids(self._storage, **images)
        self._embedded = embeddings_of(self._storage, **images, image_ids=self._known)

    def __call__(self, row: Row) -> Row:
        """Runs one block."""
        (number,) = row["outputs"]
        keys, units = self._outputs[number].of_layer, row["units"]
        ids, activations = self._activations(keys, units)
        images = self._embedded[np.searchsorted(self._known, ids)]
        table = only_units(self._storage.read(EXEMPLARS, ["unit", "rank", "image_id"], **keys), tuple(units))
        of = table["unit"].to_numpy()
        tables = [_ROWS_SCHEMA.empty_table()]
        for column, unit in enumerate(units):
            own = table.filter(pa.array(of == unit)).sort_by("rank")
            tables.append(self._contrasts(unit, own, ids, images, activations[:, column]))
        self._store(row, [(number, pa.concat_tables(tables))])
        return {"images": len(ids)}

    def _activations(self, keys: Mapping[str, str], units: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of the embedded images (N,), ascending, and activations of some units (N, B), a row group at a time."""
        ids, values = [np.zeros(0, np.int64)], [np.zeros((0, len(units)), np.float32)]
        for part in self._storage.stream(POOLED, ["image_id", POOLING], **keys):
            part_ids = part["image_id"].to_numpy()
            there = np.isin(part_ids, self._known)
            ids.append(part_ids[there])
            values.append(matrix(part[POOLING])[there][:, units])
        return np.concatenate(ids), np.concatenate(values)

    def _contrasts(
        self, unit: int, exemplars: pa.Table, ids: np.ndarray, images: np.ndarray, activations: np.ndarray
    ) -> pa.Table:
        """A unit's contrasts, from its exemplars by rank and all images with their embeddings and activations."""
        shown = exemplars["image_id"].to_numpy()
        ranks = exemplars["rank"].to_numpy()[np.isin(shown, ids)]
        rows = np.searchsorted(ids, shown[np.isin(shown, ids)])
        similarity = np.zeros((len(ids), len(rows)), np.float32)
        if len(rows):  # by unit and padded, so that a product does not depend on the units that share a shard
            vectors = padded(images[rows], EXEMPLARS_PADDED * -(-len(rows) // EXEMPLARS_PADDED))
            similarity = products(images, vectors, len(rows)).numpy()
        eligible = not_exciting(activations, np.isin(ids, shown), self._config.quantile)
        chosen = choose(ids, similarity, eligible, unit, self._config)
        kinds = np.where(chosen.similar, SIMILAR, RANDOM)
        columns = {
            "unit": np.full(len(chosen.rows), unit, np.int32),
            "rank": np.arange(len(chosen.rows), dtype=np.int16),
            "image_id": ids[chosen.rows],
            "kind": pa.array(kinds.tolist(), pa.string()),
            "exemplar": ranks[chosen.exemplars].astype(np.int16),
            "similarity": similarity[chosen.rows, chosen.exemplars],
            "activation": activations[chosen.rows],
            "quantile": quantiles(activations, chosen.rows),
        }
        return pa.table(columns, schema=_ROWS_SCHEMA)


class Contrasts(ShardedStage):
    """The contrasts of every unit of some layers.

    Args:
        models: Model name → layers.
        source: What they are chosen from, and how many.
        units: The units of every layer; empty for all.
    """

    worker = ContrastWorker
    table, name, label, counted, uses_gpus = CONTRASTS, "contrasts", "contrasts", "units", False

    def __init__(self, models: Layers, source: ContrastSource, units: tuple[int, ...] = ()) -> None:
        self._models, self._source, self._units = models, source, units
        self.title = f"contrasts by {source.images.ref.name}"

    def outputs(self, known: Known) -> Iterator[Output]:
        """Contrasts of every layer, by its exemplars, their pooled activations and the probe's embeddings.

        Raises:
            MilanError: A layer has no pooled activations of the probe.
        """
        identity = {"kernel": CONTRASTS_VERSION, "config": self._source.config}
        images = known.config(IMAGE_EMBEDDINGS, **self._source.images.keys)
        for model, layer in pairs(self._models):
            if not known.pending(POOLED):
                self._check(known.storage, model, layer)
            exemplars, pooled = (known.config(table, model=model, layer=layer) for table in (EXEMPLARS, POOLED))
            above = {"exemplars": exemplars, "pooled": pooled, "image_embeddings": images}
            yield Output(self._source.keys(model, layer), Fingerprint.of(identity | above, self._units))

    def _check(self, storage: Storage, model: str, layer: str) -> None:
        meta = storage.metadata(POOLED, model=model, layer=layer)
        if meta is None or meta["probe"] != self._source.images.digest:
            raise MilanError(
                f"{model} {layer} has no pooled activations of this probe, which say what does not excite a unit; make "
                "them with jobs.exemplars --pooled, on the probe that the exemplars are of."
            )
        references.check_units(self._units, int(meta["units"]), model, layer)

    def shards(self, job: Job) -> Shards:
        """Blocks of units; no unit's contrasts depend on another's."""
        shards, few = [], True
        for output in job.due:
            units = list(self._units) or list(
                range(int((job.storage.metadata(POOLED, **output.of_layer) or {})["units"]))
            )
            few &= job.storage.count(POOLED, **output.of_layer) <= FEW_IMAGES
            for start in range(0, len(units), UNITS_PER_SHARD):
                block = units[start : start + UNITS_PER_SHARD]
                shards.append(Shard(f"{output.number:04d}-{start:07d}", (output.number,), {"units": block}, len(block)))
        return Shards(shards, merged_in_driver=True, run_in_driver=few)

    def arguments(self, job: Job) -> dict[str, Any]:
        """The probe's embeddings, and how to choose."""
        return {"images": self._source.images.keys, "config": self._source.config}

    def merge(self, storage: Storage, output: Output, pieces: Iterable[pa.Table]) -> pa.Table:
        """A layer's contrasts, by unit and rank."""
        table = pa.concat_tables([_ROWS_SCHEMA.empty_table(), *pieces])
        table = table.sort_by([("unit", "ascending"), ("rank", "ascending")])
        exemplars = storage.metadata(EXEMPLARS, **output.of_layer) or {}
        metadata = {
            "quantile": str(self._source.config.quantile),
            "probe": exemplars["probe"],
            "view": exemplars["view"],
            EXEMPLARS_KEY: storage.config_of(EXEMPLARS, **output.of_layer),
        }
        return CONTRASTS.table(output.columns(table), metadata)


class ContrastEncodings(Encodings):
    """Features of every contrast of some layers, by a captioner's encoder.

    Args:
        models: Model name → layers.
        encoder: Which encoder.
        source: What the contrasts were chosen from.
        units: The units of every layer; empty for all.
    """

    table: ClassVar[Table] = CONTRAST_ENCODINGS
    name = label = "contrast_encodings"

    def __init__(
        self, models: Layers, encoder: AnyEncoderRef, source: ContrastSource, units: tuple[int, ...] = ()
    ) -> None:
        super().__init__(models, encoder, units)
        self._source = source
        self.title = f"encodings of contrasts ({encoder.name})"

    def outputs(self, known: Known) -> Iterator[Output]:
        """Encodings of every layer, by what its contrasts are."""
        identity = {"kernel": ENCODINGS_VERSION, **self._encoder.load().identity(), "masks": self._source.masks}
        for model, layer in pairs(self._models):
            contrasts = known.all_units(CONTRASTS, **self._source.keys(model, layer))
            keys = {"encoder": self._encoder.name, "model": model, "layer": layer}
            yield Output(keys, Fingerprint.of({**identity, "contrasts": contrasts}, self._units))

    def shards(self, job: Job) -> Shards:
        """Chunks of images, whose views are stored first: so far only exemplars have some."""
        wanted: dict[str, tuple[ExemplarImages, set[int]]] = {}
        for output in job.due:
            keys = self._source.keys(output.model, output.layer)
            meta = job.storage.metadata(CONTRASTS, **keys) or {}
            model = self._source.models[output.model]
            probe, digest = self._source.images.probe, meta["probe"]
            images = ExemplarImages(probe, digest, meta["view"], model, self._source.dissection)
            ids = job.storage.read(CONTRASTS, ["image_id"], **keys)["image_id"].to_pylist()
            wanted.setdefault(meta["view"], (images, set()))[1].update(ids)
        for images, ids in wanted.values():
            ensure_views(job.storage, images, sorted(ids), job.resources)
        return super().shards(job)

    @property
    def masked(self) -> Masked:
        """The contrasts, with masks."""
        return MaskedContrasts(self._source.images.ref.name, self._source.masks)


@dataclass(frozen=True)
class MaskedContrasts:
    """Reads the contrasts that an output encodes, with masks.

    Attributes:
        encoder: The model of images and texts that says what images are alike.
        masks: Which part of a contrast counts.
    """

    encoder: str
    masks: Masks

    def __call__(self, storage: Storage, output: Output, columns: Sequence[str]) -> pa.Table:
        """Columns of the contrasts of an output's units."""
        keys = {"encoder": self.encoder, **output.of_layer}
        table = storage.read(CONTRASTS, ["unit", "rank", "image_id", "exemplar"], **keys)
        table = only_units(table, output.fingerprint.units)
        if "mask" in columns:
            table = table.append_column("mask", self._masks(storage, output, table))
        return table.select(["unit", *columns])

    def _masks(self, storage: Storage, output: Output, contrasts: pa.Table) -> pa.Array:
        """The mask of each contrast, packed: of the exemplar that it is paired with, or of all positions."""
        if self.masks == "whole":
            height, width = mask_size(storage.metadata(EXEMPLARS, **output.of_layer) or {})
            full = np.packbits(np.ones(height * width, bool)).tobytes()
            return pa.array([full] * len(contrasts), pa.large_binary())
        exemplars = storage.read(EXEMPLARS, ["unit", "rank", "mask"], **output.of_layer)
        place = {pair: row for row, pair in enumerate(_units_and(exemplars, "rank"))}
        rows = [place[pair] for pair in _units_and(contrasts, "exemplar")]
        return exemplars["mask"].combine_chunks().take(pa.array(rows, pa.int64()))


def _units_and(table: pa.Table, column: str) -> Iterator[tuple[int, int]]:
    """Yields (unit, value of a column) of every row."""
    return zip(table["unit"].to_pylist(), table[column].to_pylist(), strict=True)


def contrasts_metadata(storage: Storage, keys: dict[str, str]) -> dict[str, str]:
    """Metadata of descriptions that were made with contrasts: where these are, and their configuration hash."""
    return {"contrasts": keys["encoder"], CONTRASTS_KEY: storage.all_units_of(CONTRASTS, **keys)}
