"""Exemplars of whole models over a sharded probe: one pass, all layers, any number of actors, one answer.

manifest ─► shards ─► [actor pool: forward, top-k, levels] ─► partials ─► [merge per layer] ─► exemplars, levels
                                                                 ├─► images read: skipped, sha256
                                                                 └─► [strung together] ─► pooled, when asked for
winners ─► [recompute masks of layers too large to carry maps] ─► exemplars
winners ─► [views, once per image and geometry]
"""

from __future__ import annotations

import hashlib
import json
import time
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import nn

from milan_ray.config import ExemplarConfig, Fingerprint, Resources, config_hash
from milan_ray.device import resolve_device
from milan_ray.engine import references
from milan_ray.engine.actor_pool import Row, run_pool
from milan_ray.engine.model_cache import ModelCache
from milan_ray.engine.run_log import Cost, record_run
from milan_ray.engine.tasks import FEW_IMAGES, retry_if_overtaken, run_parallel
from milan_ray.errors import DamagedTable, MilanError
from milan_ray.exemplars import masks
from milan_ray.exemplars.behaviour import COMPUTES, behaviours, same
from milan_ray.exemplars.forward import Batch, Forward, check_probe, pass_size, read_ahead
from milan_ray.exemplars.levels import in_words
from milan_ray.exemplars.pooled import POOLED_VERSION, in_groups, maxima, means
from milan_ray.exemplars.pooled import to_table as pooled_table
from milan_ray.exemplars.shard import KERNEL_VERSION, Committed, LayerStates, Plan, fold, naming, to_table
from milan_ray.models.establish import established
from milan_ray.models.hooks import find_layers, unwrap
from milan_ray.models.inputs import check_network
from milan_ray.models.layouts import Layout
from milan_ray.models.order import places
from milan_ray.models.registry import ModelSpec, blaming, source_of
from milan_ray.models.weights import weights_digest
from milan_ray.probe.base import ImageRef, LatentProbe, Probe
from milan_ray.probe.files import tell_doubts
from milan_ray.probe.manifest import digest as probe_digest
from milan_ray.probe.manifest import image_refs
from milan_ray.progress import Progress, say
from milan_ray.schema import EXEMPLARS, LEVELS, MANIFEST, POOLED, SKIPPED
from milan_ray.stages import arithmetic
from milan_ray.stages.arithmetic import refused_by
from milan_ray.stages.images import ExemplarImages, ensure_views, view_key
from milan_ray.storage import ORDER_KEY, Storage, WorkRemovedError, parts_of

IMAGES = "images"
"""Work folder of the tables that say which images a shard read; written last, so it also says that it is finished."""

SECONDS = "seconds"
"""Metadata key of these tables: what the shard took."""

NOTES = "notes"
"""Metadata key of these tables: how many images were decoded with a doubt, and the first with it, as JSON."""

_AFTER_ACTIVATIONS = ("kernel", "k", "quantile", "mask_size", "samples")
"""Ingredients of exemplars that no activation depends on."""

_IMAGES_SCHEMA = pa.schema(
    [("image_id", pa.int64()), ("path", pa.string()), ("sha256", pa.string()), ("reason", pa.string())]
)


_WINNERS_SCHEMA = pa.schema(
    [
        ("unit", pa.int64()),
        ("rank", pa.int64()),
        ("image_id", pa.int64()),
        ("activation", pa.float32()),
        ("level", pa.float32()),
    ]
)


@dataclass(frozen=True)
class ModelWork:
    """One model's work: what an actor must know besides its shard.

    Attributes:
        model: Which model, and how to get it.
        weights: Digest of its weights, which every worker's copy must have.
        every: All layers asked for; a layer's place here names its partials.
        layers: Those still to do.
        probe: Digest of the probe manifest.
        work: Configuration hash of this work; partials lie below it.
        plan: The states' plan.
        fingerprints: Layer → what decides its public tables.
        pooled: Layer whose pooled activations are still to do → what decides them.
        view: Key of the view that shows its exemplars.
        layouts: Layer → how its output is read; empty where workers find that out themselves.
        order: Layer → its place among the model's modules.
        computes: Layer → what it puts out for fixed inputs (:mod:`milan_ray.exemplars.behaviour`).
    """

    model: references.ModelRef
    weights: str
    every: tuple[str, ...]
    layers: tuple[str, ...]
    probe: str
    work: str
    plan: Plan
    fingerprints: dict[str, Fingerprint]
    pooled: dict[str, Fingerprint]
    view: str
    layouts: dict[str, Layout] = field(default_factory=dict)
    order: dict[str, int] = field(default_factory=dict)
    computes: dict[str, str] = field(default_factory=dict)

    @property
    def read(self) -> tuple[str, ...]:
        """The layers to look at in a forward pass."""
        return tuple(layer for layer in self.every if layer in self.layers or layer in self.pooled)

    def folder(self, layer: str) -> str:
        """Work folder of a layer's partials: the same whichever layers are still to do."""
        return f"L{self.every.index(layer)}"


@dataclass(frozen=True)
class DissectedModels:
    """What :func:`run_exemplars` leaves behind.

    Attributes:
        probe: Digest of the probe manifest.
        models: Model name → the layers whose exemplars are now there.
        failed: Model name → why it could not be dissected.
    """

    probe: str
    models: dict[str, tuple[str, ...]]
    failed: dict[str, str]


@dataclass(frozen=True)
class DescribedModel:
    """A model as its exemplars depend on it.

    Attributes:
        weights: Digest of its weights.
        view: Key of the view that shows its exemplars.
        fingerprints: Layer → what decides its exemplars.
        layouts: Layer → how its output is read.
        order: Layer → its place among the model's modules.
        computes: Layer → what it puts out for fixed inputs (:mod:`milan_ray.exemplars.behaviour`).
    """

    weights: str
    view: str
    fingerprints: dict[str, Fingerprint]
    layouts: dict[str, Layout]
    order: dict[str, int]
    computes: dict[str, str]


def exemplar_fingerprints(
    spec: ModelSpec,
    model: nn.Module,
    weights: str,
    view: str,
    probe: str,
    config: ExemplarConfig,
    layouts: Mapping[str, Layout],
) -> dict[str, Fingerprint]:
    """Layer → what decides its exemplars, and nothing else.

    A layout is part of it where it is another than was taken for granted before layouts were established: tables that
    were made then and are right stay current.
    """
    identity = {
        "kernel": KERNEL_VERSION,
        "weights": weights,
        "structure": hashlib.sha256(repr(model).encode()).hexdigest(),
        "view": view,
        "inputs": source_of(spec.inputs) if spec.images is not None else _inputs_digest(spec),
        "hidden": source_of(spec.hidden),
        "prefix_tokens": spec.prefix_tokens,
        "channels_last": spec.channels_last,
        "activations": spec.activations,
        "probe": probe,
        **config.identity(),
        "batch_size": spec.batch(config.batch_size),
    }
    if spec.bands not in (None, 3):  # three are what a model without bands= gets
        identity["bands"] = spec.bands
    fingerprints = {}
    for layer in spec.layers:
        layout = layouts[layer]
        usual = layout.is_conventional(spec.prefix_tokens, spec.is_channels_last(layer))
        fingerprints[layer] = Fingerprint.of(
            {**identity, "layer": layer} | ({} if usual else {"layout": layout.identity()})
        )
    return fingerprints


def pooled_fingerprint(exemplars: Fingerprint) -> Fingerprint:
    """What decides a layer's pooled activations: all that decides its exemplars, but what is done with activations."""
    parts = {name: digest for name, digest in exemplars.inputs.items() if name not in _AFTER_ACTIVATIONS}
    parts["pooling"] = config_hash({"pooling": POOLED_VERSION})[:8]
    return Fingerprint(config_hash(parts), parts, config_hash(parts))


def _inputs_digest(spec: ModelSpec) -> str:
    """What becomes of one fixed view on its way into the model: tells input functions apart by what they do."""
    height, width, bands = spec.view_shape
    view = (torch.arange(height * width * bands, dtype=torch.int64) * 7919 % 256).to(torch.uint8)
    prepared = spec.prepare(view.view(1, height, width, bands))
    if isinstance(prepared, Mapping):
        prepared = [prepared[name] for name in sorted(prepared)]
    tensors = [prepared] if isinstance(prepared, torch.Tensor) else prepared
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(repr((tuple(tensor.shape), str(tensor.dtype))).encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


@retry_if_overtaken
def run_exemplars(
    storage: Storage,
    models: Sequence[references.ModelRef],
    probe: references.ProbeRef,
    config: ExemplarConfig,
    resources: Resources,
) -> DissectedModels:
    """Makes the exemplars of every unit of every requested layer, doing only what is missing.

    Args:
        storage: The run directory.
        models: What to dissect.
        probe: The probe images.
        config: How.
        resources: What of the cluster to use; Ray must be connected.

    Returns:
        What is now there, and which models failed.

    Raises:
        MilanError: The probe cannot be listed, or every model failed.
    """
    storage.check_writable()
    models = list(dict.fromkeys(models))
    manifest, digest = store_manifest(storage, probe)
    source = references.probe(probe)
    failed: dict[str, str] = {}
    done: dict[str, tuple[str, ...]] = {}
    work: list[ModelWork] = []
    for ref in models:
        try:
            spec = references.model(ref)
            check_probe(spec, source)
            planned = _plan(storage, ref, spec, source, digest, len(manifest), config)
        except MilanError as error:
            failed[ref.name] = str(error)
            continue
        done[ref.name] = spec.layers
        if planned is None:
            say(f"exemplars of {ref.name}: all {len(spec.layers)} layers are up to date")
        else:
            work.append(planned)
    failed |= _run_shards(storage, work, manifest, probe, config, resources)
    unmasked: list[_Merged] = []
    for item in work:
        if item.model.name in failed:
            continue
        try:
            merged = _merge(storage, item, config, len(manifest))
        except WorkRemovedError:
            raise
        except MilanError as error:
            failed[item.model.name] = str(error)
            continue
        if merged.winners:
            unmasked.append(merged)
        else:
            storage.remove_work(item.work)
    _say_nonfinite(storage, [item for item in work if item.model.name not in failed])
    for merged, reason in _recompute(storage, unmasked, probe, config, resources, manifest):
        if reason is None:
            storage.remove_work(merged.item.work)
        else:
            failed[merged.item.model.name] = reason
    needed: dict[references.ModelRef, _Needed] = {}
    for ref in models:
        if ref.name not in failed and ref.name in done:
            try:
                needed[ref] = _needed(storage, ref.name, done[ref.name])
            except DamagedTable as error:  # of values behind a sound footer: it looked up to date
                failed[ref.name] = str(error)
    done = {name: layers for name, layers in done.items() if name not in failed}
    for name, reason in failed.items():
        say(f"FAILED {name}: {reason}")
    if not done:
        raise MilanError(next(iter(failed.values())) if len(failed) == 1 else "every model failed; see above.")
    _ensure_views(storage, needed, probe, config, resources)
    return DissectedModels(digest, done, failed)


def _say_nonfinite(storage: Storage, work: Sequence[ModelWork]) -> None:
    """Says which layers' new tables left values out that are no numbers."""
    for item in work:
        for layer in item.layers:
            counts = storage.read(LEVELS, ["nonfinite"], model=item.model.name, layer=layer)["nonfinite"]
            if words := in_words(torch.tensor(counts.to_pylist())):
                say(f"layer {layer!r} of {item.model.name} {words}", level="warning")


def store_manifest(storage: Storage, ref: references.ProbeRef) -> tuple[pa.Table, str]:
    """Lists the probe and stores its manifest, keeping digests of bytes already read."""
    manifest = references.probe(ref).manifest()
    digest = probe_digest(manifest)
    if not storage.is_current(MANIFEST, digest, probe=digest):
        storage.write(MANIFEST, manifest, digest, probe=digest)
    return manifest, digest


def _plan(
    storage: Storage,
    ref: references.ModelRef,
    spec: ModelSpec,
    source: Probe,
    probe: str,
    images: int,
    config: ExemplarConfig,
) -> ModelWork | None:
    """The layers of a model that are missing or stale; None when there are none."""
    described = describe_model(spec, source, probe, config)
    fingerprints = settled_fingerprints(storage, described, spec.name)
    missing = tuple(
        layer for layer, fingerprint in fingerprints.items() if why_exemplars(storage, fingerprint, spec.name, layer)
    )
    pooled = (
        {layer: pooled_fingerprint(fingerprint) for layer, fingerprint in fingerprints.items()} if config.pooled else {}
    )
    pooled = {
        key: fingerprint for key, fingerprint in pooled.items() if why_pooled(storage, fingerprint, spec.name, key)
    }
    # Over all layers, so that a job killed while results become public finds its partials again.
    work = config_hash(
        {
            "model": spec.name,
            "exemplars": {layer: fingerprint.hash for layer, fingerprint in fingerprints.items()},
            "map_budget": config.map_budget,
            "shard_size": config.shard(images),
        }
    )
    if not missing and not pooled:
        storage.remove_work(work)
        return None
    if not missing:
        say(f"exemplars of {spec.name}: up to date; one more pass over the probe for their pooled activations")
    for layer in missing:
        if remark := described.layouts[layer].remark:
            say(f"layer {layer!r} of {spec.name} {remark}", level="warning")
    plan = Plan(images, config.k, config.quantile, config.samples, config.map_budget)
    return ModelWork(
        ref,
        described.weights,
        spec.layers,
        missing,
        probe,
        work,
        plan,
        fingerprints,
        pooled,
        described.view,
        described.layouts,
        described.order,
        described.computes,
    )


def describe_model(spec: ModelSpec, source: Probe, probe: str, config: ExemplarConfig) -> DescribedModel:
    """Builds a model and finds out how its layers are read.

    Args:
        spec: The model.
        source: The probe; a generator is tried on its first inputs.
        probe: Digest of its manifest.
        config: How exemplars are made.

    Raises:
        MilanError: It cannot be built, has no such layer, or a layer cannot be read.
    """
    model = references.network(spec)
    latents = None
    if isinstance(source, LatentProbe):
        latents = source.latents(image_refs(source.manifest().slice(0, 3)))
    with blaming(f"model {spec.name} cannot be looked at"):
        find_layers(model, spec.layers)
        check_network(spec.name, unwrap(model))
        weights = weights_digest(model)
        view = view_key(spec, model, weights, config)
        layouts = established(spec, model, spec.layers, latents)
        fingerprints = exemplar_fingerprints(spec, model, weights, view, probe, config, layouts)
        computes = behaviours(spec, model, layouts, latents)
    return DescribedModel(weights, view, fingerprints, layouts, places(unwrap(model), spec.layers), computes)


def settled_fingerprints(storage: Storage, described: DescribedModel, model: str) -> dict[str, Fingerprint]:
    """Layer → what decides its exemplars, where a network that was written anew computes something else.

    Neither weights nor modules say what a ``forward`` does between them. Tables therefore carry what their layers put
    out for fixed inputs. Where a layer now puts out something else, that becomes one of its ingredients, so that the
    table and all that was made of it are stale; it stays one for as long as the layer does the same.
    """
    fingerprints = {}
    for layer, fingerprint in described.fingerprints.items():
        fingerprints[layer] = fingerprint
        try:
            found = storage.metadata(EXEMPLARS, model=model, layer=layer) or {}
        except DamagedTable:  # counts as missing, which why() says
            continue
        before, now = found.get(COMPUTES), described.computes.get(layer)
        if before is None or now is None:  # made by an earlier version
            continue
        old = parts_of(found)
        part = old.pop(COMPUTES, None)
        if old != fingerprint.inputs:  # stale anyway, for a reason that has a name
            continue
        if not same(before, now):
            part = config_hash({COMPUTES: now})[:8]
            say(f"layer {layer!r} of {model} computes something else than when its exemplars were made: made anew")
        if part is not None:
            parts = {**fingerprint.inputs, COMPUTES: part}
            fingerprints[layer] = Fingerprint(config_hash(parts), parts, config_hash(parts))
    return fingerprints


def why_exemplars(storage: Storage, fingerprint: Fingerprint, model: str, layer: str) -> str | None:
    """Why a layer's exemplars have to be made; None when they and their levels are current."""
    keys = {"model": model, "layer": layer}
    return storage.why(EXEMPLARS, fingerprint, **keys) or storage.why(LEVELS, fingerprint, **keys)


def why_pooled(storage: Storage, fingerprint: Fingerprint, model: str, layer: str) -> str | None:
    """Why a layer's pooled activations have to be made; None when they are current."""
    return storage.why(POOLED, fingerprint, model=model, layer=layer)


def _run_shards(
    storage: Storage,
    work: Sequence[ModelWork],
    manifest: pa.Table,
    probe: references.ProbeRef,
    config: ExemplarConfig,
    resources: Resources,
) -> dict[str, str]:
    """Runs every shard that is not stored yet; returns the models that failed, with the reason."""
    size = config.shard(len(manifest))
    starts = range(0, len(manifest), size)
    rows: list[Row] = []
    for index, item in enumerate(work):
        stored = set(storage.work_names(item.work))
        folders = [IMAGES, *map(item.folder, item.layers), *(f"pooled/{item.folder(layer)}" for layer in item.pooled)]
        fresh = [n for n in range(len(starts)) if any(f"{f}/{_shard_name(n)}" not in stored for f in folders)]
        if len(fresh) < len(starts):
            say(f"exemplars of {item.model.name}: {len(starts) - len(fresh)} of {len(starts)} shards are done already")
        # What travels through Ray says where a shard lies in the manifest, not what is in it.
        rows += [
            {"model": index, "shard": n, "start": start, "images": min(size, len(manifest) - start)}
            for n, start in ((n, starts[n]) for n in fresh)
        ]
    if not rows:
        return {}
    failed: dict[str, str] = {}
    names = ", ".join(item.model.name for item in work)
    say(f"exemplars: {names} over {len(manifest)} images, {len(rows)} shards")
    arguments = _worker_arguments(storage, work, probe, config, resources)
    images = sum(row["images"] for row in rows)
    layers = [[(item.model.name, layer) for layer in item.read] for item in work]
    pieces = (piece for row in rows for piece in layers[row["model"]])
    with Progress("exemplars", images, "images", pieces) as progress:
        for answer in run_pool(ExemplarWorker, arguments, rows, resources):
            progress.advance(answer["images"], layers[answer["model"]])
            if answer["error"]:
                failed.setdefault(work[answer["model"]].model.name, answer["error"])
    return failed


def _worker_arguments(
    storage: Storage,
    work: Sequence[ModelWork],
    probe: references.ProbeRef,
    config: ExemplarConfig,
    resources: Resources,
) -> dict[str, Any]:
    return {
        "storage": storage,
        "work": list(work),
        "probe": probe,
        "config": config,
        "threads": resources.threads,
        "device": resources.device,
    }


def _shard_name(shard: int) -> str:
    return f"{shard:06d}"


def _refs_row(rows: pa.Table) -> Row:
    return {name: rows[name].to_pylist() for name in ("image_id", "root", "path")}


def _refs(row: Row) -> list[ImageRef]:
    return [ImageRef(*ref) for ref in zip(row["image_id"], row["root"], row["path"], strict=True)]


class ModelWorker(ABC):
    """An actor that keeps one model loaded.

    Its rows say which ``model`` they are for, by its place in ``work``, and how many ``images`` they take.
    """

    runs = "the model"
    """What may fail on a batch, for messages."""

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
        self._forward = ModelCache(self._load)
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
                told = f"{self.runs} failed on a batch: {reason}"
                self._failed[index] = told + refused_by(self._config.arithmetic)
        return {"model": index, "images": row["images"], "error": self._failed.get(index)}

    @abstractmethod
    def _run(self, row: Row) -> None:
        """Does what a row asks for, and stores it."""

    def _load(self, index: int) -> tuple[ModelSpec, Forward]:
        item = self._work[index]
        spec = references.model(item.model)
        model = references.network(spec, item.weights)
        layers = item.read
        layouts = {layer: item.layouts[layer] for layer in layers} if item.layouts else None
        size, how = self._pass_size(spec), self._config.arithmetic
        return spec, Forward(spec, model.to(self._device), layers, size, how, layouts)

    def _pass_size(self, spec: ModelSpec) -> int:
        return pass_size(spec.batch(self._config.batch_size), self._device)

    def _batches(self, refs: list[ImageRef], spec: ModelSpec) -> Iterator[tuple[Sequence[ImageRef], Batch]]:
        """Reads as many rows at a time as a forward pass takes."""
        return read_ahead(self._probe, refs, spec, self._pass_size(spec), self._threads)


class ExemplarWorker(ModelWorker):
    """Turns a shard of the probe into every layer's contribution to a model's exemplars."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._known: dict[int, dict[str, Committed]] = {}

    def _run(self, row: Row) -> None:
        started = time.monotonic()
        index, item = row["model"], self._work[row["model"]]
        spec, forward = self._forward(index)
        # The bars of the models before: their rows are over.
        known = self._known.get(index, {})
        self._known = {index: known}
        columns = ["image_id", "root", "path"]
        start = row["start"]
        part = self._storage.read_rows(MANIFEST, start, start + row["images"], columns, probe=item.probe)
        layers = LayerStates(item.plan, self._threads)
        pooled: dict[str, tuple[list[torch.Tensor], list[torch.Tensor]]] = defaultdict(lambda: ([], []))
        images: list[dict[str, object]] = []
        notes: list[tuple[str, str]] = []
        for _, batch in self._batches(image_refs(part), spec):
            notes += [(ref.location, note) for ref, note in batch.notes]
            images += [{"image_id": ref.image_id, "path": ref.location, "reason": why} for ref, why in batch.unreadable]
            images += [{"image_id": int(i), "sha256": sha} for i, sha in zip(batch.ids, batch.sha256, strict=True)]
            if len(batch.ids) == 0:
                continue
            found = forward.maps(batch.inputs)
            for layer in item.pooled:
                values = found[layer].to(torch.float32)
                for part_of, reduced in zip(pooled[layer], (maxima(values), means(values)), strict=True):
                    part_of.append(reduced)
            layers.update({layer: found[layer] for layer in item.layers}, batch.ids, known)
        for layer, state in layers.states.items():
            name = f"{item.folder(layer)}/{_shard_name(row['shard'])}"
            self._storage.put_work(item.work, name, to_table(state, known[layer].news(state)))
        readable = np.array([image["image_id"] for image in images if "reason" not in image], np.int64)
        for layer, (largest, mean) in pooled.items():
            name = f"pooled/{item.folder(layer)}/{_shard_name(row['shard'])}"
            self._storage.put_work(item.work, name, pooled_table(readable, largest, mean))
        about = {SECONDS: str(time.monotonic() - started), NOTES: json.dumps([len(notes), notes[:1]])}
        table = pa.Table.from_pylist(images, schema=_IMAGES_SCHEMA.with_metadata(about))
        self._storage.put_work(item.work, f"{IMAGES}/{_shard_name(row['shard'])}", table)
        # Only now, with the shard durable, may it raise the bars for the next.
        for layer, state in layers.states.items():
            with naming(layer):
                known[layer].commit(row["shard"], state)


def _finish_images(
    storage: Storage, item: ModelWork, config: ExemplarConfig, expected: int
) -> tuple[int, float, tuple[str, ...]]:
    """Writes what was skipped and the digests of what was read.

    Returns:
        Usable images, seconds of all shards, and the names of those that saw a usable image.

    Raises:
        MilanError: Too many images were unreadable.
        WorkRemovedError: Another job has made the same layers public meanwhile.
    """
    names = storage.work_names(item.work, IMAGES)
    shards = [storage.get_work(item.work, name) for name in names]
    images = pa.concat_tables([_IMAGES_SCHEMA.empty_table(), *shards]).sort_by("image_id")
    if len(images) != expected:
        due = [why_exemplars(storage, item.fingerprints[layer], item.model.name, layer) for layer in item.layers]
        due += [why_pooled(storage, fingerprint, item.model.name, layer) for layer, fingerprint in item.pooled.items()]
        if not any(due):
            raise WorkRemovedError(f"the exemplars of {item.model.name} are there already; run the job again.")
        raise MilanError(
            f"{expected - len(images)} of {expected} images were not reported back; run the job again, and see that "
            f"every node of the cluster reads and writes {storage.root}."
        )
    bad = images.filter(pc.is_valid(images["reason"]))
    model = item.model.name
    skipped = SKIPPED.table(
        {"model": [model] * len(bad), "image_id": bad["image_id"], "path": bad["path"], "reason": bad["reason"]}
    )
    storage.write(SKIPPED, skipped, item.work, model=model)
    if len(bad):
        first = f"{bad['path'][0].as_py()} ({bad['reason'][0].as_py()})"
        say(f"exemplars of {model}: skipped {len(bad)} of {expected} images, the first {first}; see the table skipped")
    doubts = [json.loads((shard.schema.metadata or {}).get(NOTES.encode(), b"[0, []]")) for shard in shards]
    tell_doubts([(where, why) for _, some in doubts for where, why in some], sum(count for count, _ in doubts))
    if len(bad) > config.max_bad * expected or len(bad) == expected:
        raise MilanError(
            f"{len(bad)} of {expected} probe images are unreadable, the first {first}; "
            "repair them, or raise --max-bad if that is expected."
        )
    _record_digests(storage, item.probe, images)
    seconds = sum(float((shard.schema.metadata or {})[SECONDS.encode()]) for shard in shards)
    seeing = tuple(
        name.rpartition("/")[2]
        for name, shard in zip(names, shards, strict=True)
        if shard["reason"].null_count  # the reason why an image is unusable
    )
    return expected - len(bad), seconds, seeing


def _record_digests(storage: Storage, digest: str, images: pa.Table) -> None:
    """Notes in the manifest the digests of bytes that were read for the first time."""
    manifest = storage.read(MANIFEST, probe=digest)
    if manifest["sha256"].null_count == images["sha256"].null_count:
        return
    place = manifest.schema.get_field_index("sha256")
    field = manifest.schema.field(place)
    found = pc.take(images["sha256"], pc.index_in(manifest["image_id"], images["image_id"].combine_chunks()))
    storage.write(MANIFEST, manifest.set_column(place, field, found.cast(pa.string())), digest, probe=digest)


@dataclass(frozen=True)
class _MergeTask:
    storage: Storage
    item: ModelWork
    layer: str
    config: ExemplarConfig
    shards: tuple[str, ...]
    cost: Cost


@dataclass(frozen=True)
class _Merged:
    """A model whose shards are folded.

    Attributes:
        item: Its work.
        cost: What one of its tables took; masks that are computed again are added.
        winners: Layer whose masks are still to be computed → the ids of its winners.
    """

    item: ModelWork
    cost: Cost
    winners: dict[str, list[int]]


def _merge(storage: Storage, item: ModelWork, config: ExemplarConfig, expected: int) -> _Merged:
    """Folds the shards of every layer and writes its tables, as far as no masks are missing for them.

    Raises:
        MilanError: A layer or too many images cannot be used.
        WorkRemovedError: Another job has made the same layers public meanwhile.
    """
    images, seconds, shards = _finish_images(storage, item, config, expected)
    cost = Cost(images=images)
    cost.add(seconds, len(item.layers) + len(item.pooled))  # one pass for all
    tasks = [_MergeTask(storage, item, layer, config, shards, cost) for layer in item.layers]
    winners: dict[str, list[int]] = {}
    for index, ids in run_parallel(_merge_layer, tasks, here=expected <= FEW_IMAGES):
        if ids is not None:
            winners[item.layers[index]] = ids
    _merge_pooled(storage, item, config, shards, cost)
    return _Merged(item, cost, winners)


def _merge_layer(task: _MergeTask) -> list[int] | None:
    """Folds one layer; returns the winners' ids when their maps must be computed again, else None."""
    storage, item, layer = task.storage, task.item, task.layer
    # By name, not what is there: another job may be removing the same work, and some of it is not all of it.
    with naming(layer):
        state = fold((storage.get_work(item.work, f"{item.folder(layer)}/{n}") for n in task.shards), item.plan)
    levels = state.level.result()
    table = LEVELS.table(
        {
            "model": [item.model.name] * len(levels),
            "layer": [layer] * len(levels),
            "unit": np.arange(len(levels)),
            "level": levels.numpy(),
            "positions": state.level.counted.numpy(),
            "nonfinite": state.level.nonfinite.numpy(),
            "exact": [state.exact] * len(levels),
        }
    )
    unit, rank = torch.nonzero(state.topk.ids >= 0, as_tuple=True)
    size = _mask_size(item, task.config)
    winners = pa.table(
        {
            "unit": unit.numpy(),
            "rank": rank.numpy(),
            "image_id": state.topk.ids[unit, rank].numpy(),
            "activation": state.topk.values[unit, rank].numpy(),
            "level": levels[unit].numpy(),
        },
        schema=_WINNERS_SCHEMA,
    )
    if not state.topk.carries_maps:
        storage.put_work(item.work, f"winners/{item.folder(layer)}", winners)
        storage.write(LEVELS, table, item.fingerprints[layer], model=item.model.name, layer=layer)
        return sorted(set(winners["image_id"].to_pylist()))
    packed = masks.packed_masks(state.topk.maps_of, (unit, rank), levels[unit], size)
    rows = winners.append_column("mask", pa.array(packed, pa.large_binary()))
    _write_exemplars(storage, item, layer, task.config, rows, task.cost)
    storage.write(LEVELS, table, item.fingerprints[layer], model=item.model.name, layer=layer)
    return None


@dataclass(frozen=True)
class _PooledTask:
    storage: Storage
    item: ModelWork
    layer: str
    config: ExemplarConfig
    shards: tuple[str, ...]
    cost: Cost


def _merge_pooled(
    storage: Storage, item: ModelWork, config: ExemplarConfig, shards: tuple[str, ...], cost: Cost
) -> None:
    """Makes the pooled activations of all layers public.

    Raises:
        MilanError: A shard's are not those of the images it read.
    """
    tasks = [_PooledTask(storage, item, layer, config, shards, cost) for layer in item.pooled]
    for _ in run_parallel(_merge_pooled_layer, tasks, here=cost.images <= FEW_IMAGES):
        pass


def _merge_pooled_layer(task: _PooledTask) -> None:
    """Strings the shards of one layer together in the manifest's order, one at a time."""
    item, layer, images = task.item, task.layer, task.cost.images
    run = item.pooled[layer].hash
    names = [f"pooled/{item.folder(layer)}/{shard}" for shard in task.shards]
    first = task.storage.get_work(item.work, names[0])
    metadata = {"units": str(len(first["max"][0])), "probe": item.probe, **arithmetic.metadata(task.config.arithmetic)}
    rows = 0

    def pieces() -> Iterator[pa.Table]:
        nonlocal rows
        for piece in in_groups(task.storage.get_work(item.work, name) for name in names):
            rows += len(piece)
            keys = {"model": [item.model.name] * len(piece), "layer": [layer] * len(piece)}
            yield POOLED.table({**keys, **{name: piece[name] for name in piece.column_names}})
        if rows != images:
            raise MilanError(
                f"{rows} of {images} images have pooled activations of layer {layer!r}; run the job again."
            )
        record_run(task.storage, "pooled", run, item.model.name, layer=layer, rows=rows, cost=task.cost)

    task.storage.write_stream(POOLED, pieces(), item.pooled[layer], metadata, model=item.model.name, layer=layer)


def _mask_size(item: ModelWork, config: ExemplarConfig) -> tuple[int, int]:
    return config.mask_size or references.model(item.model).preprocess.view.shape


def _write_exemplars(
    storage: Storage, item: ModelWork, layer: str, config: ExemplarConfig, rows: pa.Table, cost: Cost
) -> None:
    """Makes a layer's exemplars public: unit, rank, image_id, activation and mask of every winner."""
    name = item.model.name
    height, width = _mask_size(item, config)
    metadata = {
        "mask_height": str(height),
        "mask_width": str(width),
        "probe": item.probe,
        "view": item.view,
        "k": str(config.k),
        "quantile": str(config.quantile),
        **arithmetic.metadata(config.arithmetic),
        "layout": item.layouts[layer].to_json(),
        ORDER_KEY: str(item.order[layer]),
        **({COMPUTES: item.computes[layer]} if layer in item.computes else {}),
    }
    columns: dict[str, object] = {"model": [name] * len(rows), "layer": [layer] * len(rows)}
    columns |= {column: rows[column] for column in ("unit", "rank", "image_id", "activation", "mask")}
    table = EXEMPLARS.table(columns, metadata)
    record_run(storage, "exemplars", item.fingerprints[layer].hash, name, layer=layer, rows=len(table), cost=cost)
    storage.write(EXEMPLARS, table, item.fingerprints[layer], model=name, layer=layer)


def _recompute(
    storage: Storage,
    unmasked: Sequence[_Merged],
    probe: references.ProbeRef,
    config: ExemplarConfig,
    resources: Resources,
    manifest: pa.Table,
) -> Iterator[tuple[_Merged, str | None]]:
    """Masks of the layers whose maps were too large to carry, from one more pass over the winners alone.

    One pool serves all models, and a model's exemplars become public with its last block.

    Yields:
        Each model as it is through, and why it failed; None when it did not.

    Raises:
        WorkRemovedError: Another job has made the same layers public meanwhile.
    """
    if not unmasked:
        return
    rows: list[Row] = []
    for index, merged in enumerate(unmasked):
        size = references.model(merged.item.model).batch(config.batch_size)
        ids = sorted(set().union(*merged.winners.values()))
        for block in (ids[start : start + size] for start in range(0, len(ids), size)):
            what = {"model": index, "name": config_hash({"winners": block}), "layers": list(merged.winners)}
            rows.append({**what, "images": len(block), **_refs_row(manifest.take(block))})
    names = [[row["name"] for row in rows if row["model"] == index] for index in range(len(unmasked))]
    waiting = Counter(row["model"] for row in rows)
    failed: dict[int, str] = {}

    def through(index: int) -> tuple[_Merged, str | None]:
        if index not in failed:
            try:
                _write_masked(storage, unmasked[index], names[index], config)
            except WorkRemovedError:
                raise
            except MilanError as error:
                failed[index] = str(error)
        return unmasked[index], failed.get(index)

    for index in range(len(unmasked)):
        if not waiting[index]:  # no unit of these layers has a winner
            yield through(index)
    layers = [[(merged.item.model.name, layer) for layer in merged.winners] for merged in unmasked]
    pieces = (piece for row in rows for piece in layers[row["model"]])
    arguments = _worker_arguments(storage, [merged.item for merged in unmasked], probe, config, resources)
    with Progress("masks", sum(row["images"] for row in rows), "images", pieces) as progress:
        for answer in run_pool(MaskWorker, arguments, rows, resources):
            index = answer["model"]
            progress.advance(answer["images"], layers[index])
            unmasked[index].cost.add(answer["seconds"], len(unmasked[index].winners))
            if answer["error"]:
                failed.setdefault(index, answer["error"])
            waiting[index] -= 1
            if not waiting[index]:
                yield through(index)


def _write_masked(storage: Storage, merged: _Merged, names: list[str], config: ExemplarConfig) -> None:
    """Strings the masks of a model's blocks together, and makes its exemplars public."""
    item = merged.item
    for layer in merged.winners:
        blocks = (storage.get_work(item.work, f"masks/{item.folder(layer)}/{name}") for name in names)
        empty = _WINNERS_SCHEMA.append(pa.field("mask", pa.large_binary())).empty_table()
        parts = pa.concat_tables([empty, *blocks]).sort_by([("unit", "ascending"), ("rank", "ascending")])
        _write_exemplars(storage, item, layer, config, parts, merged.cost)


class MaskWorker(ModelWorker):
    """Recomputes the maps of winning images and thresholds them."""

    def _run(self, row: Row) -> None:
        """Stores masks of the winners in one block of images, for every layer that waits for them."""
        item = self._work[row["model"]]
        spec, forward = self._forward(row["model"])
        size = _mask_size(item, self._config)
        winners = {layer: self._storage.get_work(item.work, f"winners/{item.folder(layer)}") for layer in row["layers"]}
        found: dict[str, list[pa.Table]] = defaultdict(list)
        for _, batch in self._batches(_refs(row), spec):
            batch.complete("was read before but not now ({reason}); run the job again.")
            slot = {int(image_id): n for n, image_id in enumerate(batch.ids)}
            maps = forward.maps(batch.inputs)
            for layer, rows in winners.items():
                mine = rows.filter(pc.is_in(rows["image_id"], pa.array(batch.ids)))
                where = torch.tensor([slot[i] for i in mine["image_id"].to_pylist()], dtype=torch.int64)
                units, levels = (torch.from_numpy(np.array(mine[name])) for name in ("unit", "level"))
                packed = masks.packed_masks(lambda *of: maps[layer][of].float(), (where, units), levels, size)  # noqa: B023
                found[layer].append(mine.append_column("mask", pa.array(packed, pa.large_binary())))
        for layer, parts in found.items():
            table = pa.concat_tables(parts)
            self._storage.put_work(item.work, f"masks/{item.folder(layer)}/{row['name']}", table)


_Needed = dict[tuple[str, str], set[int]]
"""(probe, view) → the images whose views are needed."""


def _needed(storage: Storage, model: str, layers: Sequence[str]) -> _Needed:
    """The winners of a model's layers."""
    needed: _Needed = defaultdict(set)
    for layer in layers:
        meta = storage.metadata(EXEMPLARS, model=model, layer=layer) or {}
        column = storage.read(EXEMPLARS, ["image_id"], model=model, layer=layer)["image_id"]
        needed[meta["probe"], meta["view"]].update(pc.unique(column).to_pylist())
    return needed


def _ensure_views(
    storage: Storage,
    needed: Mapping[references.ModelRef, _Needed],
    probe: references.ProbeRef,
    config: ExemplarConfig,
    resources: Resources,
) -> None:
    """Stores the winners' images, once per view over all models."""
    every: _Needed = defaultdict(set)
    makers: dict[tuple[str, str], references.ModelRef] = {}
    for ref, of_model in needed.items():
        for place, images in of_model.items():
            every[place] |= images
            makers[place] = ref
    for (digest, key), ids in every.items():
        shown = ExemplarImages(probe, digest, key, makers[digest, key], config)
        ensure_views(storage, shown, sorted(ids), resources)
