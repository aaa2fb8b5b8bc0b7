"""Labels from concept maps (docs/labelers.md): network dissection and compositional explanations, sharded exactly.

levels ─► [actor pool: forward once more, masks beside concept maps] ─► counts, packed masks ─► [merge per layer]
                                                 ├─► netdissect
                                                 └─► [a beam search per block of units] ─► compexp
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from milan_ray.config import ExemplarConfig, Fingerprint, Resources, config_hash
from milan_ray.engine import references
from milan_ray.engine.actor_pool import Row, run_pool
from milan_ray.engine.model_cache import ModelCache
from milan_ray.engine.run_log import Cost, record_run
from milan_ray.engine.stage import Known, Layers, Output, Stage, pairs
from milan_ray.engine.tasks import FEW_IMAGES, retry_if_overtaken, run_parallel
from milan_ray.errors import MilanError, all_failed
from milan_ray.exemplars.concepts import ConceptCounts, Seen, fires, grid_size, pack_words, sample
from milan_ray.exemplars.shard import Plan
from milan_ray.labelers.compexp import CompExp, Totals, explain, labels
from milan_ray.labelers.netdissect import INTERPRETABLE, NetDissect
from milan_ray.labelers.protocol import Evidence, Label
from milan_ray.models.registry import ModelSpec
from milan_ray.models.view import View
from milan_ray.probe.base import Probe
from milan_ray.probe.manifest import image_refs
from milan_ray.progress import Progress, say
from milan_ray.schema import DESCRIPTIONS, EXEMPLARS, LEVELS, MANIFEST
from milan_ray.stages.descriptions import write_labels
from milan_ray.stages.exemplars import DissectedModels, ModelWork, ModelWorker, describe_model
from milan_ray.storage import Storage, WorkRemovedError

KERNEL_VERSION = "concepts-1"

UNITS = 64
"""Units per beam search of formulas: what bounds its memory, and what a worker does at a time."""

FEW = 2**16
"""Images times units: formulas of no more are searched by the driver: workers take longer to start."""

PEEK = 16
"""Images that are asked for concept maps before anything starts."""

_CONCEPTS_SCHEMA = pa.schema([("image_id", pa.int64()), ("names", pa.list_(pa.string())), ("bits", pa.large_binary())])
_MASKS_SCHEMA = pa.schema([("image_id", pa.int64()), ("unit", pa.int32()), ("bits", pa.large_binary())])
_FORMULAS_SCHEMA = pa.schema([("unit", pa.int32()), ("text", pa.string()), ("iou", pa.float64())])

ConceptLabeler = NetDissect | CompExp
"""A labeler that counts units beside concept maps."""


@dataclass(frozen=True)
class LabelConfig:
    """How units are labelled from concept maps.

    Attributes:
        labelers: Which, and how.
        size: (height, width) of the grid that positions are counted on; None takes about 56 along the shorter side of
            a large view, and a small view's own pixels.
    """

    labelers: tuple[ConceptLabeler, ...] = (NetDissect(), CompExp())
    size: tuple[int, int] | None = None

    def grid(self, spec: ModelSpec) -> tuple[int, int]:
        """The grid of a model's views."""
        return self.size or grid_size(spec.preprocess.view.shape)


@dataclass(frozen=True)
class _Work:
    """One model's labels to make.

    Attributes:
        item: What a worker must know of the model.
        layers: Its layers, with what decides their labels: labeler → layer, those to do.
        exemplars: Layer → configuration hash of its exemplars.
        size: Grid.
    """

    item: ModelWork
    layers: dict[str, dict[str, Fingerprint]]
    exemplars: dict[str, str]
    size: tuple[int, int]


def label_fingerprint(
    labeler: ConceptLabeler, exemplars: str, size: tuple[int, int], units: tuple[int, ...]
) -> Fingerprint:
    """What decides a layer's labels.

    Args:
        labeler: The labeler.
        exemplars: Configuration hash of the layer's exemplars, which covers weights, probe, concept maps and levels.
        size: The grid.
        units: The units selected; empty for all.
    """
    return Fingerprint.of({**labeler.identity(), "kernel": KERNEL_VERSION, "exemplars": exemplars, "grid": size}, units)


@retry_if_overtaken
def run_labels(
    storage: Storage,
    dissected: DissectedModels,
    models: Sequence[references.ModelRef],
    probe: references.ProbeRef,
    config: ExemplarConfig,
    how: LabelConfig,
    resources: Resources,
    units: tuple[int, ...] = (),
) -> dict[str, str]:
    """Labels every unit of every layer by the concept maps of its probe, doing only what is missing.

    Images that have no concept maps count nowhere; unreadable ones are those of the table ``skipped`` already.

    Args:
        storage: The run directory, which holds exemplars and levels.
        dissected: What :func:`milan_ray.stages.exemplars.run_exemplars` left there.
        models: The models dissected.
        probe: The probe images.
        config: How they were dissected.
        how: How to label.
        resources: What of the cluster to use; Ray must be connected.
        units: The units of every layer to label; empty for all.

    Returns:
        Model → why it could not be labelled.

    Raises:
        MilanError: The probe has no concept maps, or every model failed.
    """
    failed: dict[str, str] = {}
    work: list[_Work] = []
    source = references.probe(probe)
    for ref in dict.fromkeys(models):
        if ref.name not in dissected.models:
            continue
        try:
            planned = _plan(storage, ref, source, dissected.probe, config, how, units)
        except MilanError as error:
            failed[ref.name] = str(error)
            continue
        if planned is None:
            say(f"labels of {ref.name}: all up to date")
        else:
            work.append(planned)
    if work:
        digest = dissected.probe
        rows = storage.read_rows(MANIFEST, 0, PEEK, ["image_id", "root", "path"], probe=digest)
        check_concepts(source, rows)
        broken, seconds = _run_shards(storage, work, dissected.probe, probe, config, how, resources)
        failed |= broken
        for planned in work:
            name = planned.item.model.name
            if name in failed:
                continue
            try:
                _finish(storage, planned, how, config, seconds[name])
            except WorkRemovedError:
                raise
            except MilanError as error:
                failed[name] = str(error)
    all_failed(failed, len(dissected.models))
    return failed


def _plan(
    storage: Storage,
    ref: references.ModelRef,
    source: Probe,
    probe: str,
    config: ExemplarConfig,
    how: LabelConfig,
    units: tuple[int, ...],
) -> _Work | None:
    """What is missing or stale of a model's labels; None when nothing is."""
    spec = references.model(ref)
    size = how.grid(spec)
    fingerprints: dict[str, dict[str, Fingerprint]] = {labeler.name: {} for labeler in how.labelers}
    stage = ConceptLabels({spec.name: spec.layers}, {spec.name: size}, how.labelers, units)
    for output in stage.outputs(Known(storage)):
        fingerprints[output.keys["labeler"]][output.layer] = output.fingerprint
    due = {
        labeler: {
            layer: fingerprint
            for layer, fingerprint in of.items()
            if storage.why(DESCRIPTIONS, fingerprint, labeler=labeler, model=spec.name, layer=layer)
        }
        for labeler, of in fingerprints.items()
    }
    images = storage.count(MANIFEST, probe=probe)
    # Over all layers, so that a job killed while results become public finds its counts again.
    hashes = {
        labeler: {layer: fingerprint.hash for layer, fingerprint in of.items()} for labeler, of in fingerprints.items()
    }
    work = config_hash({"model": spec.name, "labels": hashes, "shard_size": config.shard(images)})
    missing = tuple(layer for layer in spec.layers if any(layer in of for of in due.values()))
    if not missing:
        storage.remove_work(work)
        return None
    model = describe_model(spec, source, probe, config)
    plan = Plan(images, config.k, config.quantile, config.samples, config.map_budget)
    item = ModelWork(ref, model.weights, spec.layers, missing, probe, work, plan, {}, {}, model.view, model.layouts)
    exemplars = {layer: storage.config_of(EXEMPLARS, model=spec.name, layer=layer) for layer in missing}
    return _Work(item, due, exemplars, size)


class ConceptLabels(Stage):
    """Labels of some layers by concept maps; :func:`run_labels` makes them, all labelers' from the same counts.

    Args:
        models: Model name → layers.
        grids: Model name → (height, width) of the grid that positions are counted on.
        labelers: Which labelers.
        units: The units of every layer to label; empty for all.
    """

    table, name, title = DESCRIPTIONS, "labels", "labels"

    def __init__(
        self,
        models: Layers,
        grids: Mapping[str, tuple[int, int]],
        labelers: Sequence[ConceptLabeler],
        units: tuple[int, ...] = (),
    ) -> None:
        self._models, self._grids, self._labelers, self._units = models, grids, labelers, units

    def outputs(self, known: Known) -> Iterator[Output]:
        """Labels of every layer by every labeler, by what its exemplars are."""
        for labeler in self._labelers:
            for model, layer in pairs(self._models):
                exemplars = known.config(EXEMPLARS, model=model, layer=layer)
                known.check_units(self._units, model, layer)
                fingerprint = label_fingerprint(labeler, exemplars, self._grids[model], self._units)
                yield Output({"labeler": labeler.name, "model": model, "layer": layer}, fingerprint)


def check_concepts(source: Probe, manifest: pa.Table) -> None:
    """Sees before anything starts that there are concept maps at all.

    Raises:
        MilanError: The first images have none.
    """
    first = manifest.slice(0, PEEK)
    if all(source.concept_maps(ref) is None for ref in image_refs(first, range(len(first)))):
        raise MilanError(
            f"probe {source.name!r} has no concept maps, which these labelers compare units with: give images with "
            "label maps beside them, with --legend where these hold numbers (docs/labelers.md), or register a probe "
            "with concept_maps."
        )


def _run_shards(
    storage: Storage,
    work: Sequence[_Work],
    digest: str,
    probe: references.ProbeRef,
    config: ExemplarConfig,
    how: LabelConfig,
    resources: Resources,
) -> tuple[dict[str, str], dict[str, float]]:
    """Counts every shard that is not stored yet; returns the models that failed, and each model's seconds."""
    total = storage.count(MANIFEST, probe=digest)
    names = shard_names(total, config)
    size = config.shard(total)
    rows: list[Row] = []
    for index, planned in enumerate(work):
        stored = set(storage.work_names(planned.item.work))
        wanted = [CONCEPTS, *(f"{kind}/{planned.item.folder(layer)}" for layer, kind in _pieces(planned))]
        fresh = [n for n, name in enumerate(names) if any(f"{folder}/{name}" not in stored for folder in wanted)]
        if len(fresh) < len(names):
            say(f"labels of {planned.item.model.name}: {len(names) - len(fresh)} of {len(names)} shards are done")
        rows += [
            {"model": index, "name": names[n], "start": n * size, "images": min(size, total - n * size)} for n in fresh
        ]
    failed: dict[str, str] = {}
    seconds: dict[str, float] = defaultdict(float)
    arguments = {
        "storage": storage,
        "work": [planned.item for planned in work],
        "labels": list(work),
        "probe": probe,
        "config": config,
        "threads": resources.threads,
        "device": resources.device,
    }
    layers = [[(planned.item.model.name, layer) for layer in planned.item.read] for planned in work]
    pieces = (piece for row in rows for piece in layers[row["model"]])
    with Progress("concepts", sum(row["images"] for row in rows), "images", pieces) as progress:
        for answer in run_pool(CountWorker, arguments, rows, resources):
            name = work[answer["model"]].item.model.name
            progress.advance(answer["images"], layers[answer["model"]])
            seconds[name] += answer["seconds"]
            if answer["error"]:
                failed.setdefault(name, answer["error"])
    return failed, seconds


CONCEPTS = "concepts"
"""Work folder of a shard's concept maps; written last, so it also says that the shard is finished."""


def shard_names(images: int, config: ExemplarConfig) -> list[str]:
    """The shards of a probe, by name."""
    return [f"{n:06d}" for n in range(-(-images // config.shard(images)))]


def _pieces(planned: _Work) -> list[tuple[str, str]]:
    """(layer, kind of work file) of everything a shard writes."""
    composed = planned.layers.get(CompExp.name, {})
    return [(layer, "counts") for layer in planned.item.layers] + [(layer, "masks") for layer in composed]


class CountWorker(ModelWorker):
    """Counts the units of one shard of the probe beside its concepts."""

    runs = "the model or its concept maps"

    def __init__(self, labels: list[_Work], **arguments: Any) -> None:
        super().__init__(**arguments)
        self._labels = labels
        self._levels = ModelCache(self._load_levels)

    def _load_levels(self, index: int) -> dict[str, torch.Tensor]:
        item = self._work[index]
        tables = {layer: self._storage.read(LEVELS, model=item.model.name, layer=layer) for layer in item.layers}
        return {layer: torch.tensor(table["level"].to_numpy()).to(self._device) for layer, table in tables.items()}

    def _run(self, row: Row) -> None:
        index, item, planned = row["model"], self._work[row["model"]], self._labels[row["model"]]
        spec, forward = self._forward(index)
        levels = self._levels(index)
        view = spec.preprocess.view if spec.images is None else View(spec.preprocess.view.shape, None)
        composed = planned.layers.get(CompExp.name, {})
        refs = image_refs(
            part := self._storage.read_rows(
                MANIFEST, row["start"], row["start"] + row["images"], ["image_id", "root", "path"], probe=item.probe
            ),
            range(len(part)),
        )
        counts = {layer: ConceptCounts(len(level)) for layer, level in levels.items()}
        shown: list[dict[str, object]] = []
        fired: dict[str, list[pa.Table]] = {layer: [_MASKS_SCHEMA.empty_table()] for layer in composed}
        for part_refs, batch in self._batches(refs, spec):
            by_id = {ref.image_id: ref for ref in part_refs}
            truth = [self._probe.concept_maps(by_id[int(image_id)]) for image_id in batch.ids]
            if all(found is None for found in truth):
                continue
            maps = forward.maps(batch.inputs)
            for place, whole in enumerate(truth):
                if whole is None:
                    continue
                image_id = int(batch.ids[place])
                found = sample(whole, view, planned.size)
                names = sorted(found)
                words = pack_words(np.stack([found[name] for name in names])) if names else _nothing(planned.size)
                shown.append({"image_id": image_id, "names": names, "bits": words.tobytes()})
                for layer in item.layers:
                    units, on = fires(maps[layer][place], levels[layer], planned.size)
                    counts[layer].update(Seen(names, words, units, on, planned.size[0] * planned.size[1]))
                    if layer in composed:
                        fired[layer].append(_mask_rows(image_id, units, on))
        for layer, state in counts.items():
            self._storage.put_work(item.work, f"counts/{item.folder(layer)}/{row['name']}", state.to_table())
        for layer, tables in fired.items():
            self._storage.put_work(item.work, f"masks/{item.folder(layer)}/{row['name']}", pa.concat_tables(tables))
        table = pa.Table.from_pylist(shown, schema=_CONCEPTS_SCHEMA)
        self._storage.put_work(item.work, f"{CONCEPTS}/{row['name']}", table)


def _nothing(size: tuple[int, int]) -> np.ndarray:
    return pack_words(np.zeros((0, *size), bool))


def _mask_rows(image_id: int, units: np.ndarray, words: np.ndarray) -> pa.Table:
    bits = pa.array([row.tobytes() for row in words], pa.large_binary())
    ids = pa.array(np.full(len(units), image_id, np.int64))
    return pa.table([ids, pa.array(units, pa.int32()), bits], schema=_MASKS_SCHEMA)


@dataclass(frozen=True)
class _Merge:
    storage: Storage
    work: str
    folder: str
    shards: tuple[str, ...]


def _merge(task: _Merge) -> ConceptCounts:
    """Adds the shards of one layer up."""
    tables = (task.storage.get_work(task.work, f"counts/{task.folder}/{name}") for name in task.shards)
    state = ConceptCounts.from_table(next(tables))
    for table in tables:
        state.merge(ConceptCounts.from_table(table))
    return state


@dataclass(frozen=True)
class _Compose:
    storage: Storage
    work: str
    folder: str
    shards: tuple[str, ...]
    units: tuple[int, ...]
    size: tuple[int, int]
    labeler: CompExp

    @property
    def name(self) -> str:
        """Where the result goes."""
        return f"formulas/{self.folder}/{config_hash({'units': self.units})}"

    def images(self) -> Iterator[Seen]:
        """Every annotated image of the probe, with the masks of these units."""
        width, positions = _nothing(self.size).shape[1], self.size[0] * self.size[1]
        for shard in self.shards:
            shown = self.storage.get_work(self.work, f"{CONCEPTS}/{shard}")
            fired = self.storage.get_work(self.work, f"masks/{self.folder}/{shard}")
            fired = fired.filter(pc.is_in(fired["unit"], pa.array(self.units, pa.int32()))).combine_chunks()
            words = np.frombuffer(b"".join(fired["bits"].to_pylist()), np.uint64).reshape(-1, width)
            ids, units = fired["image_id"].to_numpy(), fired["unit"].to_numpy()
            order = np.argsort(ids, kind="stable")
            ids, units, words = ids[order], units[order], words[order]
            for row in shown.to_pylist():
                begin, end = np.searchsorted(ids, [row["image_id"], row["image_id"] + 1]).tolist()
                concepts = np.frombuffer(row["bits"], np.uint64).reshape(-1, width)
                yield Seen(row["names"], concepts, units[begin:end], words[begin:end], positions)


def _compose(task: _Compose) -> float:
    """Searches the formulas of one block of units; returns how many seconds it took."""
    started = time.monotonic()
    counts = ConceptCounts.from_table(task.storage.get_work(task.work, f"merged/{task.folder}"))
    totals = Totals.of(counts)
    best = explain(task.units, totals, task.images, task.labeler.beam_size, task.labeler.length)
    rows = [
        {"unit": unit, "text": label.text, "iou": label.score}
        for unit, found in labels(best, totals.names).items()
        for label in found
    ]
    task.storage.put_work(task.work, task.name, pa.Table.from_pylist(rows, schema=_FORMULAS_SCHEMA))
    return time.monotonic() - started


def _finish(storage: Storage, planned: _Work, how: LabelConfig, config: ExemplarConfig, seconds: float) -> None:
    """Adds a model's shards up and makes its labels public.

    Raises:
        MilanError: No image had concept maps.
    """
    item = planned.item
    name = item.model.name
    shards = tuple(shard_names(item.plan.images, config))
    few = item.plan.images <= FEW_IMAGES
    merges = [_Merge(storage, item.work, item.folder(layer), shards) for layer in item.layers]
    counts: dict[str, ConceptCounts] = {}
    for index, state in run_parallel(_merge, merges, in_driver=few):
        counts[item.layers[index]] = state
    images = next(iter(counts.values())).images
    if not images or not next(iter(counts.values())).size:
        raise MilanError(f"no image that {name} could read shows a concept; look at the probe's label maps.")
    evidence = {layer: Evidence(counts=counts[layer]) for layer in item.layers}
    searched: dict[str, float] = {}
    for labeler in how.labelers:
        if isinstance(labeler, CompExp) and planned.layers[labeler.name]:
            formulas, searched = _search(storage, planned, labeler, counts, shards)
            for layer, found in formulas.items():
                evidence[layer] = replace(evidence[layer], formulas=found)
    due = [(labeler, layer) for labeler in how.labelers for layer in planned.layers[labeler.name]]
    for labeler, layer in due:
        fingerprint = planned.layers[labeler.name][layer]
        labelled = labeler.label(evidence[layer])
        labelled = {unit: labelled[unit] for unit in fingerprint.units or sorted(labelled)}
        output = Output({"labeler": labeler.name, "model": name, "layer": layer}, fingerprint)
        cost = Cost(images=images)
        cost.add(seconds, len(due))
        if isinstance(labeler, CompExp):
            cost.add(searched[layer])
        record_run(storage, labeler.name, fingerprint.hash, name, layer=layer, rows=len(labelled), cost=cost)
        write_labels(storage, output, labeler, labelled, planned.exemplars[layer])
        clear = sum(best[0].score > INTERPRETABLE for best in labelled.values())
        say(f"{labeler.name}: {name} {layer}: {clear} of {len(labelled)} units above IoU {INTERPRETABLE}")
    storage.remove_work(item.work)


def _search(
    storage: Storage, planned: _Work, labeler: CompExp, counts: dict[str, ConceptCounts], shards: tuple[str, ...]
) -> tuple[dict[str, dict[int, list[Label]]], dict[str, float]]:
    """Layer → the formulas of its units, searched block by block, and layer → the seconds that took on one process.

    Blocks that are stored are not searched again.
    """
    item = planned.item
    stored = set(storage.work_names(item.work))
    tasks: dict[str, list[_Compose]] = {}
    for layer, fingerprint in planned.layers[labeler.name].items():
        folder = item.folder(layer)
        if f"merged/{folder}" not in stored:
            storage.put_work(item.work, f"merged/{folder}", counts[layer].to_table())
        units = fingerprint.units or tuple(range(len(counts[layer].unit)))
        tasks[layer] = [
            _Compose(storage, item.work, folder, shards, units[start : start + UNITS], planned.size, labeler)
            for start in range(0, len(units), UNITS)
        ]
    fresh = [(layer, task) for layer, of in tasks.items() for task in of if task.name not in stored]
    seconds = dict.fromkeys(tasks, 0.0)
    with Progress(f"formulas of {item.model.name}", sum(len(task.units) for _, task in fresh), "units") as progress:
        here = item.plan.images * sum(len(task.units) for _, task in fresh) <= FEW
        for index, spent in run_parallel(_compose, [task for _, task in fresh], in_driver=here):
            layer, task = fresh[index]
            progress.advance(len(task.units))
            seconds[layer] += spent
    found: dict[str, dict[int, list[Label]]] = {}
    for layer, of in tasks.items():
        found[layer] = defaultdict(list)
        for task in of:
            for row in storage.get_work(item.work, task.name).to_pylist():
                found[layer][row["unit"]].append(Label(row["text"], row["iou"]))
    return found, seconds
