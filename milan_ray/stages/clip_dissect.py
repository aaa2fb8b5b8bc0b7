"""CLIP-Dissect (docs/clip-dissect.md): labels from pooled activations and embeddings, a chunk of concepts at a time.

pooled ─► [per layer: every unit's images] ─┐
image_embeddings, text_embeddings ──────────┴─► [per chunk of concepts: Σ_c exp per image] ─► [per chunk of concepts:
similarities of all units, their best] ─► [merge per layer] ─► descriptions

Every chunk multiplies the images by its concepts, once for all layers; nothing of size images × concepts is stored.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from milan_ray.config import Fingerprint, Resources, config_hash
from milan_ray.device import resolve_device, torch_threads
from milan_ray.engine import references
from milan_ray.engine.cluster import gpus_each
from milan_ray.engine.run_log import Cost, record_run
from milan_ray.engine.stage import Known, Layers, Output, Stage, abandon, numbered, pairs
from milan_ray.engine.tasks import FEW_IMAGES, removed_if_damaged, retry_if_overtaken, run_parallel
from milan_ray.errors import MilanError
from milan_ray.exemplars.pooled import matrix
from milan_ray.exemplars.topk import RunningTopK
from milan_ray.labelers.clip_dissect import Best, ClipDissect, Cosines, LogSumExp, pointwise, rank_reorder
from milan_ray.labelers.netdissect import NOTHING
from milan_ray.labelers.protocol import Evidence
from milan_ray.models.image_text import Embedder, ImageTextRef
from milan_ray.progress import Progress, say
from milan_ray.schema import DESCRIPTIONS, EXEMPLARS, IMAGE_EMBEDDINGS, POOLED
from milan_ray.scoring.simulation import held_out
from milan_ray.stages.descriptions import write_labels
from milan_ray.stages.embeddings import (
    TextEmbeddings,
    embeddings_of,
    lists_of,
    rows_of,
    run_image_embeddings,
    text_embeddings,
)
from milan_ray.storage import Storage

KERNEL_VERSION = "clip-dissect-1"

CHUNKS = 8
"""Chunks that a list of concepts is cut into, at least, as long as they are not tiny."""

MOST = 512
"""Concepts per chunk at most: what bounds memory, images × chunk × 4 bytes."""

IMAGES = 1024
"""Images per matrix product."""

FEW = 2**22
"""Products of images and concepts; no more are computed by the driver: workers take longer to start."""


def chunk_of(concepts: int) -> int:
    """Concepts per chunk, which depends on the length of the list alone."""
    return min(MOST, 16 * math.ceil(concepts / (16 * CHUNKS)))


def clip_dissect_fingerprint(
    labeler: ClipDissect,
    texts: Mapping[str, object],
    exemplars: str,
    pooled: str,
    images: str,
    units: tuple[int, ...],
) -> Fingerprint:
    """What decides a layer's labels.

    Args:
        labeler: The labeler.
        texts: Identity of the model's embeddings of texts.
        exemplars: Configuration hash of the layer's exemplars, which the report shows the labels beside.
        pooled: Configuration hash of its pooled activations.
        images: Configuration hash of the probe's embeddings.
        units: The units selected; empty for all.
    """
    parts = {**labeler.identity(), "kernel": KERNEL_VERSION, "clip": dict(texts)}
    above = {"exemplars": exemplars, "pooled": pooled, "image_embeddings": images}
    return Fingerprint.of(parts | above, units)


class ClipDissectLabels(Stage):
    """Labels of some layers from a list of concepts; :func:`run_clip_dissect` makes them together.

    Args:
        models: Model name → layers.
        labeler: The list of concepts, and how to compare.
        ref: The model of images and texts.
        embedder: The same, loaded.
        digest: Digest of the manifest of the probe that the layers were dissected on.
        units: The units of every layer to label; empty for all.
    """

    table = DESCRIPTIONS

    def __init__(
        self,
        models: Layers,
        labeler: ClipDissect,
        ref: ImageTextRef,
        embedder: Embedder,
        digest: str,
        units: tuple[int, ...] = (),
    ) -> None:
        self._models, self._labeler, self._units = models, labeler, units
        self._embedded = {"encoder": ref.name, "probe": digest}
        self._texts = embedder.text_identity()
        self.name, self.title = labeler.name, f"descriptions ({labeler.name})"

    def outputs(self, known: Known) -> Iterator[Output]:
        """Labels of every layer, by its exemplars, their pooled activations and the probe's embeddings."""
        for model, layer in pairs(self._models):
            exemplars, pooled = (known.config(table, model=model, layer=layer) for table in (EXEMPLARS, POOLED))
            images = known.config(IMAGE_EMBEDDINGS, **self._embedded)
            fingerprint = clip_dissect_fingerprint(self._labeler, self._texts, exemplars, pooled, images, self._units)
            yield Output({"labeler": self.name, "model": model, "layer": layer}, fingerprint)


@dataclass(frozen=True)
class _Scan:
    storage: Storage
    work: str
    layer: Output
    labeler: ClipDissect
    encoder: str
    probe: str


@retry_if_overtaken
def run_clip_dissect(
    storage: Storage,
    models: Layers,
    probe: references.ProbeRef,
    labeler: ClipDissect,
    ref: ImageTextRef,
    resources: Resources,
    units: tuple[int, ...] = (),
) -> None:
    """Labels every unit of every layer whose labels are missing or stale.

    Args:
        storage: The run directory, which holds exemplars and pooled activations.
        models: Model name → layers.
        probe: The probe they were dissected on.
        labeler: The list of concepts, and how to compare.
        ref: The model of images and texts.
        resources: What of the cluster to use; Ray must be connected.
        units: The units of every layer to label; empty for all.

    Raises:
        MilanError: Pooled activations or the model are missing, are of another probe, or a layer has no such unit.
    """
    digest = run_image_embeddings(storage, probe, ref, resources)
    embedder = references.image_text(ref, probe.plugins)
    for model, path in pairs(models):
        meta = storage.metadata(POOLED, model=model, layer=path)
        if meta is None or meta["probe"] != digest:
            raise MilanError(f"{model} {path} has no pooled activations of this probe; make them with --pooled.")
        references.check_units(units, int(meta["units"]), model, path)
    every = numbered(ClipDissectLabels(models, labeler, ref, embedder, digest, units), storage)
    # Over all layers, so that a job killed while results become public finds its pieces again.
    work = config_hash({labeler.name: [layer.fingerprint.hash for layer in every]})
    due = [layer for layer in every if storage.why(DESCRIPTIONS, layer.fingerprint, **layer.keys)]
    if not due:
        storage.remove_work(work)
        abandon(TextEmbeddings(sorted(set(labeler.concepts)), ref, embedder), storage)
        say(f"descriptions ({labeler.name}): all up to date")
        return
    with removed_if_damaged(storage, work):
        vectors = text_embeddings(storage, labeler.concepts, ref, resources, probe.plugins)
        stored = set(storage.work_names(work))
        if "concepts" not in stored:
            storage.put_work(work, "concepts", pa.table({"embedding": lists_of(vectors)}))
        few = storage.count(IMAGE_EMBEDDINGS, encoder=ref.name, probe=digest) <= FEW_IMAGES
        scans = [_Scan(storage, work, layer, labeler, ref.name, digest) for layer in every]
        scans = [scan for scan in scans if f"units/{scan.layer.number}" not in stored]
        scanned = {layer.number: 0.0 for layer in every}
        for index, took in run_parallel(_scan, scans, in_driver=few):
            scanned[scans[index].layer.number] = took
        needed = np.unique(np.concatenate([_needed(storage, work, layer) for layer in every]))
        seconds = _compare(storage, work, every, labeler, ref.name, digest, needed, resources)
        size = chunk_of(len(labeler.concepts))
        for layer in due:
            found = [
                storage.get_work(work, f"best/{_chunk_name(first)}/{layer.number}")
                for first in range(0, len(labeler.concepts), size)
            ]
            best = Best.merged(Best(rows_of(t["concepts"]), rows_of(t["scores"])) for t in found)
            alive = storage.get_work(work, f"units/{layer.number}")["alive"].to_numpy()
            named = best.labels(labeler.concepts, alive, NOTHING)
            labels = labeler.label(Evidence(concepts={unit: named[unit] for unit in units or sorted(named)}))
            cost = Cost(scanned[layer.number], scanned[layer.number], len(needed))
            cost.add(seconds, len(due))
            run, model, path = layer.fingerprint.hash, layer.model, layer.layer
            record_run(storage, labeler.name, run, model, layer=path, rows=len(labels), cost=cost)
            exemplars = storage.config_of(EXEMPLARS, model=model, layer=path)
            write_labels(storage, layer, labeler, labels, exemplars)
    storage.remove_work(work)


def _scan(task: _Scan) -> float:
    """Finds the images of every unit of a layer, in one pass over its pooled activations; returns the seconds."""
    started = time.monotonic()
    keys = {"model": task.layer.model, "layer": task.layer.layer}
    known = np.concatenate(
        [
            part["image_id"].to_numpy()
            for part in task.storage.stream(IMAGE_EMBEDDINGS, ["image_id"], encoder=task.encoder, probe=task.probe)
        ]
    )
    known = known[~held_out(known, task.labeler.hold_out)]
    total = task.storage.count(POOLED, **keys)
    state: RunningTopK | None = None
    sums = np.zeros(0)
    counts = np.zeros(0, np.int64)
    low = high = np.zeros(0, np.float32)
    for part in task.storage.stream(POOLED, ["image_id", task.labeler.pooling], **keys):
        ids, values = part["image_id"].to_numpy(), matrix(part[task.labeler.pooling])
        here = np.isin(ids, known)
        ids, values = ids[here], values[here]
        if not len(ids):
            continue
        if state is None:
            # Cosines look at every image and need no list of them.
            k = 1 if _every_image(task.labeler) else task.labeler.images(min(total, len(known)))
            state = RunningTopK.empty(values.shape[1], k)
            sums, counts = np.zeros(values.shape[1]), np.zeros(values.shape[1], np.int64)
            low, high = (np.full(values.shape[1], bound, np.float32) for bound in (np.inf, -np.inf))
        state.update(torch.from_numpy(np.nan_to_num(values, nan=-np.inf)), torch.from_numpy(ids))
        sums += np.nansum(values, axis=0, dtype=np.float64)
        counts += np.isfinite(values).sum(axis=0)
        low, high = np.fmin(low, values.min(axis=0)), np.fmax(high, values.max(axis=0))
    if state is None:
        raise MilanError(f"no image has both activations of {keys['model']} {keys['layer']} and an embedding.")
    table = pa.table(
        {
            "images": lists_of(state.ids.numpy()),
            "activations": lists_of(state.values.numpy()),
            "mean": sums / np.maximum(counts, 1),
            "alive": high > low,
        }
    )
    task.storage.put_work(task.work, f"known/{task.layer.number}", pa.table({"image_id": known}))
    task.storage.put_work(task.work, f"units/{task.layer.number}", table)
    return time.monotonic() - started


def _every_image(labeler: ClipDissect) -> bool:
    return labeler.similarity.startswith("cos")


def _needed(storage: Storage, work: str, layer: Output) -> np.ndarray:
    """The images that some unit of a layer is compared on."""
    scanned = storage.get_work(work, f"units/{layer.number}")
    ids = scanned["images"].combine_chunks().flatten().to_numpy()
    return np.unique(ids[ids >= 0])


@dataclass(frozen=True)
class _Chunk:
    storage: Storage
    work: str
    layers: tuple[Output, ...]
    labeler: ClipDissect
    encoder: str
    probe: str
    first: int
    device: str

    @property
    def name(self) -> str:
        return _chunk_name(self.first)

    def vectors(self, device: torch.device) -> torch.Tensor:
        """Embeddings of the chunk's concepts, (chunk, D), zeros beyond the last: every product has one shape."""
        every = rows_of(self.storage.get_work(self.work, "concepts")["embedding"])
        size = chunk_of(len(every))
        padded = np.zeros((size, every.shape[1]), np.float32)
        own = every[self.first : self.first + size]
        padded[: len(own)] = own
        return torch.from_numpy(padded).to(device)

    @property
    def concepts(self) -> int:
        """How many concepts the chunk holds."""
        total = len(self.labeler.concepts)
        return min(chunk_of(total), total - self.first)

    def fit(self, images: np.ndarray, device: torch.device) -> torch.Tensor:
        """P of some images, given by their embeddings (N, D), and the chunk's concepts: float32 (N, concepts)."""
        vectors = self.vectors(device).T
        found = []
        for start in range(0, len(images), IMAGES):
            some = images[start : start + IMAGES]
            padded = torch.zeros(IMAGES, images.shape[1])
            padded[: len(some)] = torch.from_numpy(some)
            found.append((padded.to(device) @ vectors)[: len(some), : self.concepts])
        return torch.cat(found)


def _chunk_name(first: int) -> str:
    return f"{first:07d}"


def _compare(
    storage: Storage,
    work: str,
    layers: Sequence[Output],
    labeler: ClipDissect,
    encoder: str,
    probe: str,
    needed: np.ndarray,
    resources: Resources,
) -> float:
    """Compares all units of all layers with all concepts; returns the seconds of all pieces together."""
    total, size = len(labeler.concepts), chunk_of(len(labeler.concepts))
    if "needed" not in storage.work_names(work):
        storage.put_work(work, "needed", pa.table({"image_id": needed}))
    chunks = [
        _Chunk(storage, work, tuple(layers), labeler, encoder, probe, first, resources.device)
        for first in range(0, total, size)
    ]
    images = storage.count(IMAGE_EMBEDDINGS, encoder=encoder, probe=probe)
    here = (images if _every_image(labeler) else len(needed)) * total <= FEW
    gpus = 0.0 if here else gpus_each(resources)
    stored = set(storage.work_names(work))
    seconds = 0.0
    say(f"descriptions ({labeler.name}): {len(layers)} layers, {total} concepts, by {encoder} and {labeler.similarity}")
    with torch_threads(resources.threads), Progress(f"descriptions ({labeler.name})", total, "concepts") as progress:
        if labeler.wpmi is not None:
            fresh = [chunk for chunk in chunks if f"sums/{chunk.name}" not in stored]
            for _, took in run_parallel(_sum, fresh, resources.cpus_per_actor, gpus, here):
                seconds += took
        kinds = [f"best/{{}}/{layer.number}" for layer in layers]
        fresh = [chunk for chunk in chunks if any(kind.format(chunk.name) not in stored for kind in kinds)]
        progress.advance(total - sum(chunk.concepts for chunk in fresh))
        for index, took in run_parallel(_compare_chunk, fresh, resources.cpus_per_actor, gpus, here):
            seconds += took
            progress.advance(fresh[index].concepts)
    return seconds


def _images_of(task: _Chunk) -> tuple[np.ndarray, np.ndarray]:
    """The images that any unit is compared on: their ids, ascending, and embeddings."""
    ids = task.storage.get_work(task.work, "needed")["image_id"].to_numpy()
    return ids, embeddings_of(task.storage, task.encoder, task.probe, ids)


def _sum(task: _Chunk) -> float:
    """A chunk's part of the sums over all concepts."""
    started = time.monotonic()
    assert task.labeler.wpmi is not None
    device = resolve_device(task.device)
    _, images = _images_of(task)
    state = LogSumExp()
    state.update(task.name, (task.labeler.wpmi.a * task.fit(images, device).double()).cpu().numpy())
    task.storage.put_work(task.work, f"sums/{task.name}", state.to_table())
    return time.monotonic() - started


def _compare_chunk(task: _Chunk) -> float:
    """Every unit's best among a chunk's concepts."""
    started = time.monotonic()
    device = resolve_device(task.device)
    if _every_image(task.labeler):
        for layer in task.layers:
            _write_best(task, layer, _cosines(task, layer, device))
        return time.monotonic() - started
    ids, images = _images_of(task)
    fit = task.fit(images, device)
    normalisers = torch.zeros(0)
    if task.labeler.wpmi is not None:
        state = LogSumExp()
        total = len(task.labeler.concepts)
        for first in range(
            0, total, chunk_of(total)
        ):  # by name: a piece that is missing is an error, not a smaller sum
            found = task.storage.get_work(task.work, f"sums/{_chunk_name(first)}")
            state.merge(LogSumExp.from_table(found))
        normalisers = torch.from_numpy(state.result()).to(device)
    for layer in task.layers:
        scanned = task.storage.get_work(task.work, f"units/{layer.number}")
        own = rows_of(scanned["images"])
        rows = torch.from_numpy(np.where(own >= 0, np.searchsorted(ids, own), -1)).to(device)
        if task.labeler.wpmi is not None:
            found = pointwise(fit, normalisers, rows, task.labeler.wpmi)
        else:
            activations = torch.from_numpy(rows_of(scanned["activations"]).copy()).to(device)
            found = rank_reorder(fit, rows, activations)
        _write_best(task, layer, found)
    return time.monotonic() - started


def _cosines(task: _Chunk, layer: Output, device: torch.device) -> torch.Tensor:
    """Cosines of a layer's units and a chunk's concepts, in one pass over the layer's pooled activations."""
    keys = {"model": layer.model, "layer": layer.layer}
    scanned = task.storage.get_work(task.work, f"units/{layer.number}")
    known = task.storage.get_work(task.work, f"known/{layer.number}")["image_id"].to_numpy()
    known = known[np.isin(known, task.storage.read(POOLED, ["image_id"], **keys)["image_id"].to_numpy())]
    images = embeddings_of(task.storage, task.encoder, task.probe, known)
    fit = task.fit(images, device)
    units = torch.from_numpy(scanned["mean"].to_numpy(zero_copy_only=False).copy()).to(device)
    state = Cosines(units, fit.double().mean(dim=0), 3 if task.labeler.similarity.endswith("cubed") else 1)
    for part in task.storage.stream(POOLED, ["image_id", task.labeler.pooling], **keys):
        ids = part["image_id"].to_numpy()
        here = np.isin(ids, known)
        values = torch.from_numpy(matrix(part[task.labeler.pooling])[here]).to(device)
        state.update(values, fit[torch.from_numpy(np.searchsorted(known, ids[here])).to(device)])
    return state.result()


def _write_best(task: _Chunk, layer: Output, similarities: torch.Tensor) -> None:
    best = Best.of(similarities.cpu().numpy(), task.first)
    table = pa.table({"concepts": lists_of(best.concepts), "scores": lists_of(best.scores)})
    task.storage.put_work(task.work, f"best/{task.name}/{layer.number}", table)
