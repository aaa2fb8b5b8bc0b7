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
from functools import partial

import numpy as np
import pyarrow as pa
import torch

from milan_ray.config import Fingerprint, Resources
from milan_ray.device import resolve_device, to_device, torch_threads
from milan_ray.engine import references
from milan_ray.engine.cluster import gpus_each
from milan_ray.engine.run_log import Cost
from milan_ray.engine.stage import Job, Known, Layers, Output, RunnableStage, StepStage, abandon, pairs, publish
from milan_ray.engine.tasks import FEW_IMAGES, run_parallel
from milan_ray.errors import MilanError
from milan_ray.exemplars.pooled import matrix
from milan_ray.exemplars.topk import RunningTopK
from milan_ray.labelers.clip_dissect import Best, ClipDissect, Cosines, LogSumExp, pointwise, rank_reorder
from milan_ray.labelers.netdissect import NOTHING
from milan_ray.labelers.protocol import Evidence, Label
from milan_ray.models.image_text import ImageTextRef
from milan_ray.progress import Progress, say
from milan_ray.schema import CONTRASTS, DESCRIPTIONS, EXEMPLARS, IMAGE_EMBEDDINGS, POOLED
from milan_ray.scoring.simulation import held_out
from milan_ray.stages.contrasts import Contrasts, ContrastSource, contrasts_metadata
from milan_ray.stages.descriptions import described
from milan_ray.stages.embeddings import (
    ImageEmbeddings,
    TextEmbeddings,
    embedded_ids,
    embeddings_of,
    lists_of,
    padded,
    products,
    rows_of,
    text_embeddings,
)
from milan_ray.storage import Storage
from milan_ray.storage.pieces import piece_name

KERNEL_VERSION = "clip-dissect-1"

CHUNKS = 8
"""Minimum number of chunks of a list of concepts; chunks have a multiple of 16 concepts."""

MOST = 512
"""Maximum number of concepts per chunk, which bounds memory: images × chunk × 4 bytes."""

FEW = 2**22
"""Maximum number of products of images and concepts that the driver computes: workers take longer to start."""


def chunk_of(concepts: int) -> int:
    """Concepts per chunk, which depends on the length of the list alone."""
    return min(MOST, 16 * math.ceil(concepts / (16 * CHUNKS)))


@dataclass(frozen=True)
class _How:
    """Inputs that all pieces of work share.

    Attributes:
        storage: The run directory.
        work: Hash of the work.
        labeler: The list of concepts, and how to compare.
        images: Partition of the probe's embeddings: encoder and probe.
        layers: What a chunk's piece holds: the part of every layer.
        contrasts: Name of the model by which contrasts were chosen; None without.
    """

    storage: Storage
    work: str
    labeler: ClipDissect
    images: dict[str, str]
    layers: tuple[str, ...]
    contrasts: str | None = None

    def get(self, name: str) -> pa.Table:
        """Reads a table of the work."""
        return self.storage.get_work(self.work, name)

    def put(self, name: str, table: pa.Table) -> None:
        """Writes a table of the work."""
        self.storage.put_work(self.work, name, table)

    @property
    def best(self) -> str:
        """The work with the best concepts of each chunk: one piece per chunk, whatever the number of layers."""
        return f"{self.work}/best"

    @property
    def every_image(self) -> bool:
        """Whether units are compared on all images instead of their own list of images: with cosines."""
        return self.labeler.similarity.startswith("cos")

    @property
    def chunks(self) -> range:
        """The number of every chunk's first concept."""
        total = len(self.labeler.concepts)
        return range(0, total, chunk_of(total))


class ClipDissectLabels(StepStage):
    """Labels of some layers from a list of concepts.

    Args:
        models: Model name → layers.
        labeler: The list of concepts, and how to compare.
        images: The probe that the layers were dissected on, as the model of images and texts sees it.
        units: The units of every layer to label; empty for all.
        contrasts: Name of the model by which contrasts of all units were chosen; required where the labeler has a μ.
    """

    table = DESCRIPTIONS

    def __init__(
        self,
        models: Layers,
        labeler: ClipDissect,
        images: ImageEmbeddings,
        units: tuple[int, ...] = (),
        contrasts: str | None = None,
    ) -> None:
        self._models, self._labeler, self._images, self._units = models, labeler, images, units
        self._contrasts = contrasts
        self.name, self.title = labeler.name, f"descriptions ({labeler.name})"

    def outputs(self, known: Known) -> Iterator[Output]:
        """Labels of every layer, by its exemplars, their pooled activations and the probe's embeddings.

        Raises:
            MilanError: A layer has no pooled activations of the probe, or not the units selected.
        """
        texts = self._images.embedder.text_identity()
        identity = {**self._labeler.identity(), "kernel": KERNEL_VERSION, "clip": dict(texts)}
        if not known.pending(POOLED):
            self._check(known.storage)
        for model, layer in pairs(self._models):
            exemplars, pooled = (known.config(table, model=model, layer=layer) for table in (EXEMPLARS, POOLED))
            images = known.config(IMAGE_EMBEDDINGS, **self._images.keys)
            above = {"exemplars": exemplars, "pooled": pooled, "image_embeddings": images}
            if self._contrasts is not None:
                above["contrasts"] = known.config(CONTRASTS, encoder=self._contrasts, model=model, layer=layer)
            yield Output(
                {"labeler": self.name, "model": model, "layer": layer}, Fingerprint.of(identity | above, self._units)
            )

    def _check(self, storage: Storage) -> None:
        """Checks that every layer has pooled activations of the probe, and the units selected."""
        for model, layer in pairs(self._models):
            meta = storage.metadata(POOLED, model=model, layer=layer)
            if meta is None or meta["probe"] != self._images.digest:
                raise MilanError(f"{model} {layer} has no pooled activations of this probe; make them with --pooled.")
            references.check_units(self._units, int(meta["units"]), model, layer)

    def run(self, job: Job) -> None:
        """Scans the layers, compares their units with every chunk of concepts, and keeps the best."""
        storage, work, labeler = job.storage, job.work, self._labeler
        parts = tuple(layer.part for layer in job.every)
        how = _How(storage, work, labeler, self._images.keys, parts, self._contrasts)
        ref, plugins = self._images.ref, self._images.probe.plugins
        vectors = text_embeddings(storage, labeler.concepts, ref, job.resources, plugins)
        stored = set(storage.work_names(work))
        if "concepts" not in stored:
            how.put("concepts", pa.table({"embedding": lists_of(vectors)}))
        few = storage.count(IMAGE_EMBEDDINGS, **how.images) <= FEW_IMAGES
        scans = [layer for layer in job.every if f"units/{layer.number}" not in stored]
        scanned = {layer.number: 0.0 for layer in job.every}
        for index, seconds in run_parallel(partial(_scan, how), scans, in_driver=few):
            scanned[scans[index].number] = seconds
        images = [
            rows_of(table[column]).ravel()
            for table in (how.get(f"units/{layer.number}") for layer in job.every)
            for column in ("images", "contrasts")
            if column in table.column_names
        ]
        needed = np.unique(np.concatenate(images))
        needed = needed[needed >= 0]  # -1 stands for no image
        seconds = _compare(how, job.every, needed, job.resources)
        for layer in job.due:
            cost = Cost(scanned[layer.number], scanned[layer.number], len(needed))
            cost.add(seconds, len(job.due))
            exemplars = storage.config_of(EXEMPLARS, **layer.of_layer)
            further = None
            if self._contrasts is not None:
                keys = {"encoder": self._contrasts, **layer.of_layer}
                further = {"mu": str(labeler.mu), **contrasts_metadata(storage, keys)}
            rows = described(layer, labeler, self._best(how, layer), exemplars, further=further)
            publish(storage, DESCRIPTIONS, layer, rows, self.name, cost)

    def _best(self, how: _How, layer: Output) -> Mapping[int, list[Label]]:
        """Unit → its labels, best first, from the best of every chunk."""
        chunks = [piece_name(_chunk_name(first), how.layers) for first in how.chunks]
        tables = how.storage.get_parts(how.best, chunks, layer.part)
        best = Best.merged(Best(rows_of(table["concepts"]), rows_of(table["scores"])) for table in tables)
        alive = how.get(f"units/{layer.number}")["alive"].to_numpy()
        named = best.labels(how.labeler.concepts, alive, NOTHING)
        return how.labeler.label(Evidence(concepts={unit: named[unit] for unit in self._units or sorted(named)}))

    def clean_up(self, storage: Storage) -> None:
        """Removes embeddings of concepts that a killed run left unfinished."""
        texts = sorted(set(self._labeler.concepts))
        abandon(TextEmbeddings(texts, self._images.ref, self._images.embedder), storage)


def clip_dissect_stages(
    models: Layers,
    probe: references.ProbeRef,
    labeler: ClipDissect,
    ref: ImageTextRef,
    units: tuple[int, ...] = (),
    source: ContrastSource | None = None,
) -> list[RunnableStage]:
    """The stages that label layers from a list of concepts.

    Args:
        models: Model name → layers.
        probe: The probe they were dissected on.
        labeler: The list of concepts, and how to compare.
        ref: The model of images and texts.
        units: The units of every layer to label; empty for all.
        source: What contrasts are chosen from, by the same model; required where the labeler has a μ.

    Raises:
        MilanError: The model is missing, or the probe holds latents.
    """
    if source is None:
        images = ImageEmbeddings(ref, probe)
        return [images, ClipDissectLabels(models, labeler, images, units)]
    images = source.images
    # Of all units, because the prior over a layer's units is of all.
    contrasts = Contrasts(models, source)
    return [images, contrasts, ClipDissectLabels(models, labeler, images, units, ref.name)]


def _scan(how: _How, layer: Output) -> float:
    """Finds the images of every unit of a layer, in one pass over its pooled activations; returns the seconds."""
    started = time.monotonic()
    storage = how.storage
    keys = layer.of_layer
    known = embedded_ids(storage, **how.images)
    known = known[~held_out(known, how.labeler.hold_out)]
    total = storage.count(POOLED, **keys)
    state: RunningTopK | None = None
    sums = np.zeros(0)
    counts = np.zeros(0, np.int64)
    low = high = np.zeros(0, np.float32)
    for part in storage.stream(POOLED, ["image_id", how.labeler.pooling], **keys):
        ids, values = part["image_id"].to_numpy(), matrix(part[how.labeler.pooling])
        embedded = np.isin(ids, known)
        ids, values = ids[embedded], values[embedded]
        if not len(ids):
            continue
        if state is None:
            k = 1 if how.every_image else how.labeler.images(min(total, len(known)))
            state = RunningTopK.empty(values.shape[1], k)
            sums, counts = np.zeros(values.shape[1]), np.zeros(values.shape[1], np.int64)
            low, high = (np.full(values.shape[1], bound, np.float32) for bound in (np.inf, -np.inf))
        state.update(torch.from_numpy(np.nan_to_num(values, nan=-np.inf)), torch.from_numpy(ids))
        sums += np.nansum(values, axis=0, dtype=np.float64)
        counts += np.isfinite(values).sum(axis=0)
        low, high = np.fmin(low, values.min(axis=0)), np.fmax(high, values.max(axis=0))
    if state is None:
        raise MilanError(f"no image has both activations of {keys['model']} {keys['layer']} and an embedding.")
    columns: dict[str, pa.Array] = {}
    if how.contrasts is not None:
        columns["contrasts"] = lists_of(_contrasts(how, keys, len(state.ids), known))
    table = pa.table(
        columns
        | {
            "images": lists_of(state.ids.numpy()),
            "activations": lists_of(state.values.numpy()),
            "mean": sums / np.maximum(counts, 1),
            "alive": high > low,
        }
    )
    how.put(f"known/{layer.number}", pa.table({"image_id": known}))
    how.put(f"units/{layer.number}", table)
    return time.monotonic() - started


def _contrasts(how: _How, keys: Mapping[str, str], units: int, known: np.ndarray) -> np.ndarray:
    """The contrasts of every unit of a layer among some images: ids by rank, int64 (U, n), −1 where it has fewer."""
    assert how.contrasts is not None
    table = how.storage.read(CONTRASTS, ["unit", "image_id"], encoder=how.contrasts, **keys)
    unit, ids = (table[name].to_numpy() for name in ("unit", "image_id"))
    unit, ids = unit[np.isin(ids, known)], ids[np.isin(ids, known)]
    place = np.arange(len(unit)) - np.searchsorted(unit, unit)  # rows are sorted by unit and rank
    contrasts = np.full((units, int(place.max(initial=0)) + 1), -1, np.int64)
    contrasts[unit, place] = ids
    return contrasts


@dataclass(frozen=True)
class _Chunk:
    how: _How
    layers: tuple[Output, ...]
    first: int
    device: str

    @property
    def concepts(self) -> int:
        """How many concepts the chunk holds."""
        total = len(self.how.labeler.concepts)
        return min(chunk_of(total), total - self.first)

    def fit(self, images: np.ndarray, device: torch.device) -> torch.Tensor:
        """P of some images, given by their embeddings (N, D), and the chunk's concepts: float32 (N, concepts).

        The last chunk is padded, so that every product has one shape.
        """
        vectors = rows_of(self.how.get("concepts")["embedding"])
        size = chunk_of(len(vectors))
        chunk = padded(vectors[self.first : self.first + size], size)
        return products(images, to_device(chunk, device), self.concepts)


def _chunk_name(first: int) -> str:
    return f"{first:07d}"


def _compare(how: _How, layers: Sequence[Output], needed: np.ndarray, resources: Resources) -> float:
    """Compares all units of all layers with all concepts; returns the seconds of all pieces together."""
    storage, work, labeler, encoder = how.storage, how.work, how.labeler, how.images["encoder"]
    total = len(labeler.concepts)
    if "needed" not in storage.work_names(work):
        how.put("needed", pa.table({"image_id": needed}))
    chunks = [_Chunk(how, tuple(layers), first, resources.device) for first in how.chunks]
    images = storage.count(IMAGE_EMBEDDINGS, **how.images) if how.every_image else len(needed)
    few = images * total <= FEW
    gpus = 0.0 if few else gpus_each(resources)
    stored = set(storage.work_names(work))
    seconds = 0.0
    say(f"descriptions ({labeler.name}): {len(layers)} layers, {total} concepts, by {encoder} and {labeler.similarity}")
    with torch_threads(resources.threads), Progress(f"descriptions ({labeler.name})", total, "concepts") as progress:
        if labeler.wpmi is not None:
            fresh = [chunk for chunk in chunks if f"sums/{_chunk_name(chunk.first)}" not in stored]
            for _, took in run_parallel(_sum, fresh, resources.cpus_per_actor, gpus, few):
                seconds += took
        compared = storage.pieces_with(how.best, how.layers)
        fresh = [chunk for chunk in chunks if _chunk_name(chunk.first) not in compared]
        progress.advance(total - sum(chunk.concepts for chunk in fresh))
        for index, took in run_parallel(_compare_chunk, fresh, resources.cpus_per_actor, gpus, few):
            seconds += took
            progress.advance(fresh[index].concepts)
    return seconds


def _images_of(task: _Chunk) -> tuple[np.ndarray, np.ndarray]:
    """The images that any unit is compared on: their ids, ascending, and embeddings."""
    ids = task.how.get("needed")["image_id"].to_numpy()
    return ids, embeddings_of(task.how.storage, **task.how.images, image_ids=ids)


def _sum(task: _Chunk) -> float:
    """A chunk's part of the sums over all concepts."""
    started = time.monotonic()
    assert task.how.labeler.wpmi is not None
    device = resolve_device(task.device)
    _, images = _images_of(task)
    state = LogSumExp()
    state.update(_chunk_name(task.first), (task.how.labeler.wpmi.a * task.fit(images, device).double()).cpu().numpy())
    task.how.put(f"sums/{_chunk_name(task.first)}", state.to_table())
    return time.monotonic() - started


def _compare_chunk(task: _Chunk) -> float:
    """Every unit's best among a chunk's concepts."""
    started = time.monotonic()
    device = resolve_device(task.device)

    def parts() -> Iterator[tuple[str, pa.Table]]:
        for layer, similarities in _similarities(task, device):
            best = Best.of(similarities.cpu().numpy(), task.first)
            yield layer.part, pa.table({"concepts": lists_of(best.concepts), "scores": lists_of(best.scores)})

    task.how.storage.put_piece(task.how.best, _chunk_name(task.first), task.how.layers, parts())
    return time.monotonic() - started


def _similarities(task: _Chunk, device: torch.device) -> Iterator[tuple[Output, torch.Tensor]]:
    """Similarities of every layer's units and a chunk's concepts, one layer after the other."""
    if task.how.every_image:
        yield from ((layer, _cosines(task, layer, device)) for layer in task.layers)
        return
    ids, images = _images_of(task)
    fit = task.fit(images, device)
    normalisers = torch.zeros(0)
    if task.how.labeler.wpmi is not None:
        state = LogSumExp()
        for first in task.how.chunks:  # by name: a piece that is missing is an error, not a smaller sum
            state.merge(LogSumExp.from_table(task.how.get(f"sums/{_chunk_name(first)}")))
        normalisers = torch.from_numpy(state.result()).to(device)
    for layer in task.layers:
        scanned = task.how.get(f"units/{layer.number}")
        own = rows_of(scanned["images"])
        rows = torch.from_numpy(np.where(own >= 0, np.searchsorted(ids, own), -1))
        if task.how.labeler.wpmi is not None:
            others = None
            if task.how.contrasts is not None:
                of_units = rows_of(scanned["contrasts"])
                others = torch.from_numpy(np.where(of_units >= 0, np.searchsorted(ids, of_units), -1))
            yield layer, pointwise(fit, normalisers, rows, task.how.labeler.wpmi, others, task.how.labeler.mu)
        else:
            activations = torch.from_numpy(rows_of(scanned["activations"]).copy())
            yield layer, rank_reorder(fit, rows, activations)


def _cosines(task: _Chunk, layer: Output, device: torch.device) -> torch.Tensor:
    """Cosines of a layer's units and a chunk's concepts, in one pass over the layer's pooled activations."""
    keys = layer.of_layer
    scanned = task.how.get(f"units/{layer.number}")
    known = task.how.get(f"known/{layer.number}")["image_id"].to_numpy()
    known = known[np.isin(known, task.how.storage.read(POOLED, ["image_id"], **keys)["image_id"].to_numpy())]
    images = embeddings_of(task.how.storage, **task.how.images, image_ids=known)
    fit = task.fit(images, device)
    units = torch.from_numpy(scanned["mean"].to_numpy(zero_copy_only=False).copy()).to(device)
    state = Cosines(units, fit.double().mean(dim=0), 3 if task.how.labeler.similarity.endswith("cubed") else 1)
    for part in task.how.storage.stream(POOLED, ["image_id", task.how.labeler.pooling], **keys):
        ids = part["image_id"].to_numpy()
        embedded = np.isin(ids, known)
        values = to_device(torch.from_numpy(matrix(part[task.how.labeler.pooling])[embedded]), device)
        state.update(values, fit[to_device(torch.from_numpy(np.searchsorted(known, ids[embedded])), device)])
    return state.result()
