"""Labels from concept maps (docs/labelers.md): network dissection and compositional explanations, sharded exactly.

levels ─► [actor pool: forward once more, masks and concept maps] ─► counts, packed masks ─► [merge per layer]
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
from milan_ray.exemplars.concepts import ConceptCounts, ImageMasks, fires, grid_size, pack_words, sample
from milan_ray.exemplars.shard import StateConfig
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
from milan_ray.stages.exemplars import ModelWork, ModelWorker, describe_model
from milan_ray.storage import Storage, WorkRemovedError

KERNEL_VERSION = "concepts-1"

UNITS_PER_SEARCH = 64
"""Units per beam search of formulas: what bounds its memory, and what a worker does at a time."""

FEW = 2**16
"""Images times units: formulas of no more are searched by the driver: workers take longer to start."""

PEEK = 16
"""Images whose concept maps are looked for before anything starts."""

_CONCEPTS_SCHEMA = pa.schema([("image_id", pa.int64()), ("names", pa.list_(pa.string())), ("bits", pa.large_binary())])
_MASKS_SCHEMA = pa.schema([("image_id", pa.int64()), ("unit", pa.int32()), ("bits", pa.large_binary())])
_FORMULAS_SCHEMA = pa.schema([("unit", pa.int32()), ("text", pa.string()), ("iou", pa.float64())])

ConceptLabeler = NetDissect | CompExp
"""A labeler that compares units with concept maps."""


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
    """Labels of one model to make.

    Attributes:
        item: What a worker must know of the model.
        due: The labels: one output per labeler and layer.
        exemplars: Layer → configuration hash of its exemplars.
        size: (height, width) of the grid.
        shards: Names of the shards of the probe.
    """

    item: ModelWork
    due: tuple[Output, ...]
    exemplars: dict[str, str]
    size: tuple[int, int]
    shards: tuple[str, ...]

    @property
    def composed(self) -> dict[str, Output]:
        """Layer → its labels by formulas, which need the units' masks."""
        return {output.layer: output for output in self.due if output.keys["labeler"] == CompExp.name}

    @property
    def pieces(self) -> list[str]:
        """Folders in which every shard has a piece."""
        folder = self.item.folder
        counts = [f"counts/{folder(layer)}" for layer in self.item.layers]
        return [CONCEPTS, *counts, *(f"masks/{folder(layer)}" for layer in self.composed)]


class ConceptLabels(Stage):
    """Labels of some layers by the concept maps of their probe.

    All labelers and layers of a model share its counts, and all models one pool of actors; a model that fails does not
    stop the others. Images without concept maps count nowhere; unreadable ones are in the table ``skipped`` already.

    Args:
        layers: Model → layers.
        models: The models; those without layers are left out.
        probe: The probe they were dissected on.
        config: How they were dissected.
        how: How to label.
        units: The units of every layer to label; empty for all.
    """

    table, name, title = DESCRIPTIONS, "labels", "labels"

    def __init__(
        self,
        layers: Layers,
        models: Sequence[references.ModelRef],
        probe: references.ProbeRef,
        config: ExemplarConfig,
        how: LabelConfig,
        units: tuple[int, ...] = (),
    ) -> None:
        self._layers, self._probe, self._config, self._how, self._units = layers, probe, config, how, units
        self._models = {ref.name: ref for ref in models if ref.name in layers}

    def outputs(self, known: Known) -> Iterator[Output]:
        """Labels of every layer by every labeler, by what its exemplars are."""
        grids = {name: self._how.grid(references.model(ref)) for name, ref in self._models.items()}
        for labeler in self._how.labelers:
            for model, layer in pairs(self._layers):
                # Weights, probe, concept maps and levels are what the exemplars were made of.
                exemplars = known.config(EXEMPLARS, model=model, layer=layer)
                known.check_units(self._units, model, layer)
                above = {"kernel": KERNEL_VERSION, "exemplars": exemplars, "grid": grids[model]}
                fingerprint = Fingerprint.of({**labeler.identity(), **above}, self._units)
                yield Output({"labeler": labeler.name, "model": model, "layer": layer}, fingerprint)

    @retry_if_overtaken
    def run(self, storage: Storage, resources: Resources) -> dict[str, str]:
        """Makes the labels that are missing or stale.

        Args:
            storage: The run directory, which holds exemplars and levels.
            resources: What of the cluster to use; Ray must be connected.

        Returns:
            Model → why it could not be labelled.

        Raises:
            MilanError: The probe has no concept maps, or every model failed.
        """
        failed: dict[str, str] = {}
        todo: dict[str, _Work] = {}
        for name in self._models:
            try:
                work = self._work(storage, name)
            except MilanError as error:
                failed[name] = str(error)
                continue
            if work is None:
                say(f"labels of {name}: all up to date")
            else:
                todo[name] = work
        if todo:
            digest = next(iter(todo.values())).item.probe
            rows = storage.read_rows(MANIFEST, 0, PEEK, ["image_id", "root", "path"], probe=digest)
            check_concepts(references.probe(self._probe), rows)
            broken, seconds = self._count(storage, todo, resources)
            failed |= broken
        for name, work in todo.items():
            if name in failed:
                continue
            try:
                self._finish(storage, work, seconds[name])
            except WorkRemovedError:
                raise
            except MilanError as error:
                failed[name] = str(error)
        all_failed(failed, len(self._models))
        return failed

    def _work(self, storage: Storage, name: str) -> _Work | None:
        """What is missing or stale of a model's labels; None when nothing is."""
        ref, config = self._models[name], self._config
        spec = references.model(ref)
        of_model = ConceptLabels({name: self._layers[name]}, [ref], self._probe, config, self._how, self._units)
        every = list(of_model.outputs(Known(storage)))
        due = tuple(output for output in every if self.why(storage, output))
        hashes: dict[str, dict[str, str]] = {labeler.name: {} for labeler in self._how.labelers}
        for output in every:
            hashes[output.keys["labeler"]][output.layer] = output.fingerprint.hash
        digest = (storage.metadata(EXEMPLARS, model=name, layer=every[0].layer) or {})["probe"]
        images = storage.count(MANIFEST, probe=digest)
        # Over all layers, so that a job killed while results become public finds its counts again.
        work = config_hash({"model": name, "labels": hashes, "shard_size": config.shard(images)})
        missing = tuple(layer for layer in spec.layers if any(output.layer == layer for output in due))
        if not missing:
            storage.remove_work(work)
            return None
        model = describe_model(spec, references.probe(self._probe), digest, config)
        plan = StateConfig(images, config.k, config.quantile, config.samples, config.map_budget)
        item = ModelWork(
            ref, model.weights, spec.layers, missing, digest, work, plan, {}, {}, model.view, model.layouts
        )
        exemplars = {layer: storage.config_of(EXEMPLARS, model=name, layer=layer) for layer in missing}
        shards = tuple(f"{number:06d}" for number in range(-(-images // config.shard(images))))
        return _Work(item, due, exemplars, self._how.grid(spec), shards)

    def _count(
        self, storage: Storage, todo: Mapping[str, _Work], resources: Resources
    ) -> tuple[dict[str, str], dict[str, float]]:
        """Counts every shard that is not stored yet; returns the models that failed, and each model's seconds."""
        names = list(todo)
        rows: list[Row] = []
        for index, (name, work) in enumerate(todo.items()):
            stored = set(storage.work_names(work.item.work))
            images, size = work.item.plan.images, self._config.shard(work.item.plan.images)
            fresh = [
                number
                for number, shard in enumerate(work.shards)
                if any(f"{folder}/{shard}" not in stored for folder in work.pieces)
            ]
            if done := len(work.shards) - len(fresh):
                say(f"labels of {name}: {done} of {len(work.shards)} shards are done")
            for number in fresh:
                start = number * size
                span = {"start": start, "images": min(size, images - start)}
                rows.append({"model": index, "name": work.shards[number], **span})
        failed: dict[str, str] = {}
        seconds: dict[str, float] = defaultdict(float)
        arguments = {
            "storage": storage,
            "work": [work.item for work in todo.values()],
            "labels": list(todo.values()),
            "probe": self._probe,
            "config": self._config,
            "threads": resources.threads,
            "device": resources.device,
        }
        layers = [[(name, layer) for layer in work.item.read] for name, work in todo.items()]
        pieces = (piece for row in rows for piece in layers[row["model"]])
        with Progress("concepts", sum(row["images"] for row in rows), "images", pieces) as progress:
            for answer in run_pool(CountWorker, arguments, rows, resources):
                name = names[answer["model"]]
                progress.advance(answer["images"], layers[answer["model"]])
                seconds[name] += answer["seconds"]
                if answer["error"]:
                    failed.setdefault(name, answer["error"])
        return failed, seconds

    def _finish(self, storage: Storage, work: _Work, seconds: float) -> None:
        """Adds a model's shards up and writes its labels.

        Raises:
            MilanError: No image had concept maps.
        """
        item, name = work.item, work.item.model.name
        labelers = {labeler.name: labeler for labeler in self._how.labelers}
        merges = [_Merge(storage, item.work, item.folder(layer), work.shards) for layer in item.layers]
        counts: dict[str, ConceptCounts] = {}
        for index, state in run_parallel(_merge, merges, in_driver=item.plan.images <= FEW_IMAGES):
            counts[item.layers[index]] = state
        first = next(iter(counts.values()))
        if not first.images or not first.size:
            raise MilanError(f"no image that {name} could read shows a concept; look at the probe's label maps.")
        evidence = {layer: Evidence(counts=counts[layer]) for layer in item.layers}
        searched: dict[str, float] = {}
        if work.composed:
            composer = labelers[CompExp.name]
            assert isinstance(composer, CompExp)
            formulas, searched = _search(storage, work, composer, counts)
            evidence |= {layer: replace(evidence[layer], formulas=of_layer) for layer, of_layer in formulas.items()}
        for output in work.due:
            labeler, layer = labelers[output.keys["labeler"]], output.layer
            labels = labeler.label(evidence[layer])
            labels = {unit: labels[unit] for unit in output.fingerprint.units or sorted(labels)}
            cost = Cost(images=first.images)
            cost.add(seconds, len(work.due))
            if isinstance(labeler, CompExp):
                cost.add(searched[layer])
            run = output.fingerprint.hash
            record_run(storage, labeler.name, run, name, layer=layer, rows=len(labels), cost=cost)
            write_labels(storage, output, labeler, labels, work.exemplars[layer])
            clear = sum(best[0].score > INTERPRETABLE for best in labels.values())
            say(f"{labeler.name}: {name} {layer}: {clear} of {len(labels)} units above IoU {INTERPRETABLE}")
        storage.remove_work(item.work)


def check_concepts(source: Probe, manifest: pa.Table) -> None:
    """Checks before anything starts that there are concept maps at all.

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


CONCEPTS = "concepts"
"""Work folder of a shard's concept maps; written last, so it also says that the shard is finished."""


class CountWorker(ModelWorker):
    """Counts on one shard of the probe how often units and concepts meet."""

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
        composed = planned.composed
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
                    counts[layer].update(ImageMasks(names, words, units, on, planned.size[0] * planned.size[1]))
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

    def images(self) -> Iterator[ImageMasks]:
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
                yield ImageMasks(row["names"], concepts, units[begin:end], words[begin:end], positions)


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


def _search(
    storage: Storage, work: _Work, labeler: CompExp, counts: dict[str, ConceptCounts]
) -> tuple[dict[str, dict[int, list[Label]]], dict[str, float]]:
    """Layer → the formulas of its units, searched block by block, and layer → the seconds that took on one process.

    Blocks that are stored are not searched again.
    """
    item = work.item
    stored = set(storage.work_names(item.work))
    tasks: dict[str, list[_Compose]] = {}
    for layer, output in work.composed.items():
        folder = item.folder(layer)
        if f"merged/{folder}" not in stored:
            storage.put_work(item.work, f"merged/{folder}", counts[layer].to_table())
        units = output.fingerprint.units or tuple(range(len(counts[layer].unit)))
        tasks[layer] = [
            _Compose(
                storage, item.work, folder, work.shards, units[start : start + UNITS_PER_SEARCH], work.size, labeler
            )
            for start in range(0, len(units), UNITS_PER_SEARCH)
        ]
    fresh = [(layer, task) for layer, of in tasks.items() for task in of if task.name not in stored]
    seconds = dict.fromkeys(tasks, 0.0)
    with Progress(f"formulas of {item.model.name}", sum(len(task.units) for _, task in fresh), "units") as progress:
        here = item.plan.images * sum(len(task.units) for _, task in fresh) <= FEW
        for index, spent in run_parallel(_compose, [task for _, task in fresh], in_driver=here):
            layer, task = fresh[index]
            progress.advance(len(task.units))
            seconds[layer] += spent
    formulas: dict[str, dict[int, list[Label]]] = {}
    for layer, of in tasks.items():
        formulas[layer] = defaultdict(list)
        for task in of:
            for row in storage.get_work(item.work, task.name).to_pylist():
                formulas[layer][row["unit"]].append(Label(row["text"], row["iou"]))
    return formulas, seconds
