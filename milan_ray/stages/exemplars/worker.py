"""Workers of the exemplars stage: each keeps some models loaded and runs them over shards of the probe."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch

from milan_ray.config import ExemplarConfig, Fingerprint, Resources
from milan_ray.device import resolve_device
from milan_ray.engine import references
from milan_ray.engine.actor_pool import Read, Row
from milan_ray.engine.cluster import decoders
from milan_ray.engine.model_cache import GroupCache, ModelCache
from milan_ray.errors import MilanError
from milan_ray.exemplars.forward import (
    MOST_SHARED,
    Batch,
    Forward,
    SharedInputs,
    pass_size,
    read_ahead,
    read_inputs,
)
from milan_ray.exemplars.pooled import maxima, means
from milan_ray.exemplars.pooled import to_table as pooled_table
from milan_ray.exemplars.read_shard import ReadShard
from milan_ray.exemplars.shard import Committed, LayerStates, StateConfig, layer_in_errors, to_table
from milan_ray.models.registry import ModelSpec
from milan_ray.probe.base import ImageRef, LatentProbe
from milan_ray.stages.arithmetic import refused_by
from milan_ray.stages.exemplars.describe_model import DescribedModel
from milan_ray.stages.images import read_refs
from milan_ray.storage import Storage, WorkRemovedError

T = TypeVar("T")

IMAGES = "images"
"""Part of a shard's piece: the images that it read."""

SECONDS = "seconds"
"""Metadata key of this part: seconds of the shard."""

NOTES = "notes"
"""Metadata key of this part: number of images decoded with a warning, and the first of them, as JSON."""

IMAGES_SCHEMA = pa.schema(
    [("image_id", pa.int64()), ("path", pa.string()), ("sha256", pa.string()), ("reason", pa.string())]
)


WINNERS = "winners"
"""Folder of the work with winners whose masks are still to be computed: one table per layer."""


@dataclass(frozen=True)
class Run:
    """One run of the stage.

    Attributes:
        storage: The run directory.
        probe: The probe images.
        config: How exemplars are made.
        resources: What of the cluster to use.
    """

    storage: Storage
    probe: references.ProbeRef
    config: ExemplarConfig
    resources: Resources

    def arguments(self, work: Sequence[ModelWork]) -> dict[str, Any]:
        """Arguments of a :class:`ModelWorker`."""
        return {
            "storage": self.storage,
            "work": list(work),
            "probe": self.probe,
            "config": self.config,
            "threads": self.resources.threads,
            "device": self.resources.device,
        }


@dataclass(frozen=True)
class ModelWork:
    """One model's work: the inputs of an actor besides its shard.

    Attributes:
        model: Which model, and how to get it.
        described: What its exemplars depend on; every worker's copy must have the same weights.
        every: All layers asked for; a layer's place here names its parts of a shard's piece.
        layers: Those whose exemplars are still to do.
        probe: Digest of the probe manifest.
        work: Configuration hash of this work; pieces lie below it.
        plan: The states' plan.
        pooled: Layer whose pooled activations are still to do → what decides them.
    """

    model: references.ModelRef
    described: DescribedModel
    every: tuple[str, ...]
    layers: tuple[str, ...]
    probe: str
    work: str
    plan: StateConfig
    pooled: Mapping[str, Fingerprint] = field(default_factory=dict)

    @property
    def read(self) -> tuple[str, ...]:
        """The layers whose outputs a forward pass takes."""
        return tuple(layer for layer in self.every if layer in self.layers or layer in self.pooled)

    @property
    def parts(self) -> list[str]:
        """What a finished shard's piece of :class:`ExemplarWorker` holds."""
        return [*map(self.part, self.layers), *map(self.pooled_part, self.pooled), IMAGES]

    def shards(self, config: ExemplarConfig) -> int:
        """The number of shards of the probe."""
        return -(-self.plan.images // config.shard(self.plan.images))

    @property
    def nbytes(self) -> int:
        """Bytes that a worker needs to keep the model, and at most what it has seen of its activations."""
        layouts = [self.described.layouts[layer] for layer in self.layers]
        return self.described.nbytes + sum(self.plan.committed_bytes(each.units, each.grid) for each in layouts)

    def part(self, layer: str) -> str:
        """Name of a layer's part of a piece: the same whichever layers are still to do."""
        return f"L{self.every.index(layer)}"

    def winners(self, layer: str) -> str:
        """Name of the work table with the winners of a layer whose masks are still to be computed."""
        return f"{WINNERS}/{self.part(layer)}"

    def pooled_part(self, layer: str) -> str:
        """Name of the part with a layer's pooled activations."""
        return f"pooled/{self.part(layer)}"


@contextmanager
def failing(failed: dict[str, str], model: str) -> Iterator[None]:
    """Records an error as the reason why a model fails, so that the others go on."""
    try:
        yield
    except WorkRemovedError:
        raise
    except MilanError as error:
        failed[model] = str(error)


def shard_name(shard: int) -> str:
    """Name of a shard in the work."""
    return f"{shard:06d}"


class ModelWorker(ABC):
    """An actor that keeps one model loaded.

    Its rows say which ``model`` they are for, by its place in ``work``, and how many ``images`` they take.
    """

    runs = "the model"
    """What may fail on a batch, for error messages."""

    def __init__(
        self,
        storage: Storage,
        work: list[ModelWork],
        probe: references.ProbeRef,
        config: ExemplarConfig,
        threads: int,
        device: str,
    ) -> None:
        torch.set_num_threads(threads)
        self._threads = threads
        self._storage, self._work, self._config = storage, work, config
        self._probe = references.probe(probe)
        self._device = resolve_device(device)
        self._decoders = decoders(threads, self._device)
        self._forward: Callable[[int], tuple[ModelSpec, Forward]] = ModelCache(self._load)
        self._failed: dict[int, str] = {}

    def __call__(self, row: Row) -> Row:
        """Runs one row; an error of the model or its layers fails the model, not the job."""
        index = row["model"]
        if index not in self._failed:
            try:
                self._run(row)
            except WorkRemovedError:
                raise
            except MilanError as error:
                self._failed[index] = str(error)
            except Exception as error:  # a user's model may raise anything, and must not end the others' job
                reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
                message = f"{self.runs} failed on a batch: {reason}"
                self._failed[index] = message + refused_by(self._config.arithmetic)
        return {"model": index, "images": row["images"], "error": self._failed.get(index)}

    @abstractmethod
    def _run(self, row: Row) -> None:
        """Runs a row and stores its result."""

    def _load(self, index: int) -> tuple[ModelSpec, Forward]:
        item = self._work[index]
        spec = references.model(item.model)
        model = references.network(spec, item.described.weights).to(self._device)
        layouts = {layer: item.described.layouts[layer] for layer in item.read}
        return spec, Forward(spec, model, item.read, self._pass_size(spec), self._config.arithmetic, layouts)

    def _pass_size(self, spec: ModelSpec) -> int:
        return pass_size(spec.batch(self._config.batch_size), self._device)

    def _batches(self, refs: list[ImageRef], spec: ModelSpec) -> Iterator[tuple[Sequence[ImageRef], Batch]]:
        """Reads as many rows at a time as a forward pass takes."""
        return read_ahead(self._probe, refs, spec, self._pass_size(spec), self._decoders)


class ShardsWorker(ModelWorker):
    """Runs some models over a shard of the probe, one after the other, whose images are read once for all of them.

    Its rows say which ``models`` they are for, and to which ``group`` of models these belong; a group's models stay
    loaded from row to row.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._caches: list[GroupCache[Any]] = []
        self._forward = self._kept(self._load)

    def _kept(self, build: Callable[[int], T]) -> GroupCache[T]:
        """Keeps what ``build`` makes for each model of the rows' group."""
        cache = GroupCache(build)
        self._caches.append(cache)
        return cache

    def __call__(self, row: Row, read: Read | None = None) -> Row:
        """Runs the row's models; returns the error and the seconds of each.

        Args:
            row: The shard.
            read: Its images where :class:`ShardReader` has read them.
        """
        for cache in self._caches:
            cache.turn_to(row["group"])
        probe = self._work[row["models"][0]].probe  # one run has one probe
        refs = read_refs(self._storage, probe, row["start"], row["start"] + row["images"])
        elsewhere = None if read is None else partial(ReadShard(read.array, read.facts).batches, refs)
        self._inputs = SharedInputs(self._probe, refs, self._decoders, len(row["models"]), elsewhere)
        answers = []
        for index in row["models"]:
            started = time.monotonic()
            answer = super().__call__({**row, "model": index})
            answers.append({**answer, "seconds": time.monotonic() - started})
        return {"images": row["images"], "models": answers}

    def _shard(self, spec: ModelSpec) -> Iterator[tuple[Sequence[ImageRef], Batch]]:
        """The shard's rows, as many at a time as a forward pass of this model takes."""
        return self._inputs.batches(spec, self._pass_size(spec))


class ShardReader:
    """Reads the images of a shard for a :class:`ShardsWorker` on another node; takes the same arguments."""

    def __init__(self, storage: Storage, work: list[ModelWork], probe: references.ProbeRef, **_: Any) -> None:
        self._storage, self._work, self._probe = storage, work, references.probe(probe)

    def __call__(self, row: Row) -> Read | None:
        """Reads the images; None where the worker has to: latents, shards too large to keep, and what raises here.

        An error is thus raised where it fails the model that it names.
        """
        item = self._work[row["models"][0]]
        spec = references.model(item.model)
        if isinstance(self._probe, LatentProbe) or row["images"] * prod(spec.view_shape) > MOST_SHARED:
            return None
        refs = read_refs(self._storage, item.probe, row["start"], row["start"] + row["images"])
        try:
            found = ReadShard.of(refs, read_inputs(self._probe, refs, spec))
        except Exception:  # anything that a probe's plug-in may raise: the worker reads again, and says what it is
            return None
        return Read(found.facts, found.views)


class ExemplarWorker(ShardsWorker):
    """Turns a shard of the probe into every layer's contribution to a model's exemplars."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._committed: GroupCache[dict[str, Committed]] = self._kept(lambda _: {})

    def _run(self, row: Row) -> None:
        started = time.monotonic()
        index, item, shard = row["model"], self._work[row["model"]], shard_name(row["shard"])
        spec, forward = self._forward(index)
        committed = self._committed(index)
        layouts = item.described.layouts
        states = LayerStates(item.plan, self._threads, [layer for layer in item.layers if layouts[layer].rectified])
        pooled: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
        images: list[dict[str, object]] = []
        notes: list[tuple[str, str]] = []
        for _, batch in self._shard(spec):
            notes += [(ref.location, note) for ref, note in batch.notes]
            images += [{"image_id": ref.image_id, "path": ref.location, "reason": why} for ref, why in batch.unreadable]
            images += [{"image_id": int(i), "sha256": sha} for i, sha in zip(batch.ids, batch.sha256, strict=True)]
            if len(batch.ids) == 0:
                continue
            for rows, maps in forward.sparse_pieces(batch.inputs):
                for layer in maps.keys() & item.pooled.keys():
                    pooled[layer].append((maxima(maps[layer]), means(maps[layer])))
                due = {layer: found for layer, found in maps.items() if layer in item.layers}
                states.update(due, batch.ids[rows], committed)

        def parts() -> Iterator[tuple[str, pa.Table]]:
            for layer, state in states.states.items():
                yield item.part(layer), to_table(state, committed[layer].delta(state))
            readable = np.array([image["image_id"] for image in images if "reason" not in image], np.int64)
            for layer, batches in pooled.items():
                largest, mean = zip(*batches, strict=True)
                yield item.pooled_part(layer), pooled_table(readable, largest, mean)
            metadata = {SECONDS: str(time.monotonic() - started), NOTES: json.dumps([len(notes), notes[:1]])}
            yield IMAGES, pa.Table.from_pylist(images, schema=IMAGES_SCHEMA.with_metadata(metadata))

        self._storage.put_piece(item.work, shard, item.parts, parts())
        # Only now, with the shard durable, may it raise the lower bounds for the next.
        for layer, state in states.states.items():
            with layer_in_errors(layer):
                committed[layer].commit(row["shard"], state)
