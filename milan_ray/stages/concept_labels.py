"""Labels from concept maps (docs/labelers.md): network dissection and compositional explanations.

levels ─► [actor pool: forward once more, masks and concept maps] ─► counts, packed masks ─► [merge per layer]
                                                 ├─► netdissect
                                                 └─► [a beam search per block of units] ─► compexp
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from milan_ray.config import ExemplarConfig, Fingerprint, Resources, config_hash
from milan_ray.engine import references
from milan_ray.engine.actor_pool import Row
from milan_ray.engine.cluster import sized_for
from milan_ray.engine.run_log import Cost
from milan_ray.engine.stage import Known, Layers, Output, Stage, pairs, publish
from milan_ray.engine.tasks import FEW_IMAGES, retry_if_overtaken, run_parallel
from milan_ray.errors import MilanError, all_failed
from milan_ray.exemplars.concepts import ConceptCounts, ImageMasks, fires, grid_size, pack_words, sample
from milan_ray.labelers.compexp import CompExp, Totals, explain, labels
from milan_ray.labelers.netdissect import INTERPRETABLE, NetDissect
from milan_ray.labelers.protocol import Evidence, Label
from milan_ray.models.registry import ModelSpec
from milan_ray.models.view import View
from milan_ray.probe.base import Probe
from milan_ray.probe.manifest import image_refs
from milan_ray.progress import Progress, say
from milan_ray.schema import DESCRIPTIONS, EXEMPLARS, LEVELS, MANIFEST
from milan_ray.stages.descriptions import described
from milan_ray.stages.exemplars import ModelWork, Run, ShardsWorker, failing, rerun_work, run_shards, shard_name
from milan_ray.stages.exemplars.merge import FEW_PARTS
from milan_ray.storage import Storage, WorkRemovedError

KERNEL_VERSION = "concepts-1"

UNITS_PER_SEARCH = 64
"""Units per beam search of formulas, which bounds its memory; one search is one task."""

FEW = 2**16
"""Maximum of images times units for which the driver searches formulas: workers take longer to start."""

PEEK = 16
"""Images that are checked for concept maps before anything starts."""

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
        size: (height, width) of the grid.
        shards: Number of shards of the probe.
        pieces: Names of their pieces, in their order; known once these are there.
    """

    item: ModelWork
    due: tuple[Output, ...]
    size: tuple[int, int]
    shards: int
    pieces: tuple[str, ...] = ()

    @property
    def composed(self) -> dict[str, Output]:
        """Layer → its labels by formulas, which need the units' masks."""
        return {output.layer: output for output in self.due if output.keys["labeler"] == CompExp.name}

    @property
    def parts(self) -> list[str]:
        """What a finished shard's piece holds."""
        return [*map(self.counts, self.item.layers), *map(self.masks, self.composed), CONCEPTS]

    def counts(self, layer: str) -> str:
        """Name of the part with a layer's counts."""
        return f"counts/{self.item.part(layer)}"

    def masks(self, layer: str) -> str:
        """Name of the part with the masks of a layer's units."""
        return f"masks/{self.item.part(layer)}"

    def counted(self, storage: Storage) -> _Work:
        """The same, with the names of the pieces of its shards.

        Raises:
            WorkRemovedError: Not all of them are there.
        """
        pieces = storage.pieces_with(self.item.work, self.parts)
        if len(pieces) != self.shards:
            raise WorkRemovedError(f"the labels of {self.item.model.name} may be there already; run the job again.")
        return replace(self, pieces=tuple(piece for _, piece in sorted(pieces.items())))


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
        todo: list[_Work] = []
        for name in self._models:
            with failing(failed, name):
                if work := self._work(storage, name, resources):
                    todo.append(work)
                else:
                    say(f"labels of {name}: all up to date")
        if todo:
            rows = storage.read_rows(MANIFEST, 0, PEEK, ["image_id", "root", "path"], probe=todo[0].item.probe)
            check_concepts(references.probe(self._probe), rows)
            run, items = Run(storage, self._probe, self._config, resources), [work.item for work in todo]
            parts = [work.parts for work in todo]
            uncounted, seconds = run_shards(run, CountWorker, items, parts, self.title, labels=todo)
            failed |= uncounted
        for work in todo:
            name = work.item.model.name
            if name not in failed:
                with failing(failed, name):
                    self._finish(storage, work.counted(storage), seconds[name])
        all_failed(failed, len(self._models))
        return failed

    def _work(self, storage: Storage, name: str, resources: Resources) -> _Work | None:
        """What is missing or stale of a model's labels; None when nothing is."""
        ref, layers = self._models[name], self._layers[name]
        of_model = ConceptLabels({name: layers}, [ref], self._probe, self._config, self._how, self._units)
        hashes: dict[str, dict[str, str]] = {labeler.name: {} for labeler in self._how.labelers}
        due: list[Output] = []
        for output in of_model.outputs(Known(storage)):
            hashes[output.keys["labeler"]][output.layer] = output.fingerprint.hash
            due += [output] if self.why(storage, output) else []
        probe = (storage.metadata(EXEMPLARS, model=name, layer=layers[0]) or {})["probe"]
        images = storage.count(MANIFEST, probe=probe)
        config = self._config = sized_for(resources, self._config, images)  # all models have one probe
        # Over all layers, so that a job killed while results become public finds its counts again.
        work = config_hash({"model": name, "labels": hashes, "shard_size": config.shard(images)})
        if not due:
            storage.remove_work(work)
            return None
        spec = references.model(ref)
        missing = [layer for layer in spec.layers if any(output.layer == layer for output in due)]
        item = rerun_work(storage, ref, self._probe, config, missing, work)
        return _Work(item, tuple(due), self._how.grid(spec), item.shards(config))

    def _finish(self, storage: Storage, work: _Work, seconds: float) -> None:
        """Adds a model's shards up and writes its labels.

        Raises:
            MilanError: No image had concept maps.
        """
        item, name = work.item, work.item.model.name
        labelers = {labeler.name: labeler for labeler in self._how.labelers}
        merges = run_parallel(partial(_merge, storage, work), item.layers, in_driver=item.plan.images <= FEW_IMAGES)
        counts = {item.layers[index]: of_layer for index, of_layer in merges}
        first = next(iter(counts.values()))
        if not first.images or not first.size:
            raise MilanError(f"no image that {name} could read shows a concept; look at the probe's label maps.")
        evidence = {layer: Evidence(counts=of_layer) for layer, of_layer in counts.items()}
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
            rows = described(output, labeler, labels, storage.config_of(EXEMPLARS, **output.of_layer))
            publish(storage, DESCRIPTIONS, output, rows, labeler.name, cost)
            clear = sum(best[0].score > INTERPRETABLE for best in labels.values())
            say(f"{labeler.name}: {name} {layer}: {clear} of {len(labels)} units above IoU {INTERPRETABLE}")
        storage.remove_work(item.work)


def check_concepts(source: Probe, manifest: pa.Table) -> None:
    """Checks before anything starts that the probe has concept maps.

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
"""Part of a shard's piece: its concept maps."""


class CountWorker(ShardsWorker):
    """Counts on one shard of the probe how often units and concepts overlap."""

    runs = "the model or its concept maps"

    def __init__(self, labels: list[_Work], **arguments: Any) -> None:
        super().__init__(**arguments)
        self._labels = labels
        self._levels = self._kept(self._load_levels)

    def _load_levels(self, index: int) -> dict[str, torch.Tensor]:
        item = self._work[index]
        tables = {layer: self._storage.read(LEVELS, model=item.model.name, layer=layer) for layer in item.layers}
        return {layer: torch.tensor(table["level"].to_numpy()).to(self._device) for layer, table in tables.items()}

    def _run(self, row: Row) -> None:
        work, shard = self._labels[row["model"]], shard_name(row["shard"])
        item, size = work.item, work.size
        spec, forward = self._forward(row["model"])
        levels = self._levels(row["model"])
        view = spec.preprocess.view if spec.images is None else View(spec.preprocess.view.shape, None)
        counts = {layer: ConceptCounts(len(level)) for layer, level in levels.items()}
        annotated: list[dict[str, object]] = []
        fired: dict[str, list[pa.Table]] = {layer: [_MASKS_SCHEMA.empty_table()] for layer in work.composed}
        for refs, batch in self._shard(spec):
            by_id = {ref.image_id: ref for ref in refs}
            truth = [self._probe.concept_maps(by_id[image_id]) for image_id in batch.ids.tolist()]
            if all(concepts is None for concepts in truth):
                continue
            shown: dict[int, tuple[list[str], np.ndarray]] = {}  # place in the batch → concepts, and where they are
            for place, concepts in enumerate(truth):
                if concepts is None:
                    continue
                on_grid = sample(concepts, view, size)
                names = sorted(on_grid)
                words = pack_words(np.stack([on_grid[name] for name in names])) if names else _nothing(size)
                annotated.append({"image_id": int(batch.ids[place]), "names": names, "bits": words.tobytes()})
                shown[place] = names, words
            for rows, maps in forward.pieces(batch.inputs):
                for layer in maps:
                    for place in range(rows.start, rows.stop):
                        if place not in shown:
                            continue
                        units, on = fires(maps[layer][place - rows.start], levels[layer], size)
                        counts[layer].update(ImageMasks(*shown[place], units, on, size[0] * size[1]))
                        if layer in fired:
                            fired[layer].append(_mask_rows(int(batch.ids[place]), units, on))

        def parts() -> Iterator[tuple[str, pa.Table]]:
            for layer, state in counts.items():
                yield work.counts(layer), state.to_table()
            for layer, tables in fired.items():
                yield work.masks(layer), pa.concat_tables(tables)
            yield CONCEPTS, pa.Table.from_pylist(annotated, schema=_CONCEPTS_SCHEMA)

        self._storage.put_piece(item.work, shard, work.parts, parts())


def _nothing(size: tuple[int, int]) -> np.ndarray:
    return pack_words(np.zeros((0, *size), bool))


def _mask_rows(image_id: int, units: np.ndarray, words: np.ndarray) -> pa.Table:
    bits = pa.array([row.tobytes() for row in words], pa.large_binary())
    ids = pa.array(np.full(len(units), image_id, np.int64))
    return pa.table([ids, pa.array(units, pa.int32()), bits], schema=_MASKS_SCHEMA)


def _merge(storage: Storage, work: _Work, layer: str) -> ConceptCounts:
    """Adds the shards of one layer up."""
    tables = storage.get_parts(work.item.work, work.pieces, work.counts(layer))
    state = ConceptCounts.from_table(next(tables))
    for table in tables:
        state.merge(ConceptCounts.from_table(table))
    return state


_Block = tuple[str, tuple[int, ...]]
"""A layer, and the units of it whose formulas are searched together."""


def _search(
    storage: Storage, work: _Work, labeler: CompExp, counts: dict[str, ConceptCounts]
) -> tuple[dict[str, dict[int, list[Label]]], dict[str, float]]:
    """Searches the formulas of units, block by block; blocks that are stored are not searched again.

    Returns:
        Layer → unit → its formulas, and layer → seconds that the search took on one process.
    """
    item = work.item
    stored = set(storage.work_names(item.work))
    blocks: list[_Block] = []
    for layer, output in work.composed.items():
        if _merged_name(item, layer) not in stored:
            storage.put_work(item.work, _merged_name(item, layer), counts[layer].to_table())
        units = output.fingerprint.units or tuple(range(len(counts[layer].unit)))
        starts = range(0, len(units), UNITS_PER_SEARCH)
        blocks += [(layer, units[start : start + UNITS_PER_SEARCH]) for start in starts]
    fresh = [block for block in blocks if _formulas_name(item, block) not in stored]
    total = sum(len(units) for _, units in fresh)
    few = item.plan.images * total <= FEW
    seconds = dict.fromkeys(work.composed, 0.0)
    with Progress(f"formulas of {item.model.name}", total, "units") as progress:
        for index, spent in run_parallel(partial(_compose, storage, work, labeler), fresh, in_driver=few):
            layer, units = fresh[index]
            progress.advance(len(units))
            seconds[layer] += spent
    formulas: dict[str, dict[int, list[Label]]] = {layer: defaultdict(list) for layer in work.composed}
    for block in blocks:
        for row in storage.get_work(item.work, _formulas_name(item, block)).to_pylist():
            formulas[block[0]][row["unit"]].append(Label(row["text"], row["iou"]))
    return formulas, seconds


def _merged_name(item: ModelWork, layer: str) -> str:
    return f"merged/{item.part(layer)}"


def _formulas_name(item: ModelWork, block: _Block) -> str:
    layer, units = block
    return f"formulas/{item.part(layer)}/{config_hash({'units': units})}"


def _compose(storage: Storage, work: _Work, labeler: CompExp, block: _Block) -> float:
    """Searches the formulas of one block of units; returns how many seconds it took."""
    started = time.monotonic()
    (layer, units), item = block, work.item
    totals = Totals.of(ConceptCounts.from_table(storage.get_work(item.work, _merged_name(item, layer))))
    best = explain(units, totals, partial(_images, storage, work, block), labeler.beam_size, labeler.length)
    rows = [
        {"unit": unit, "text": label.text, "iou": label.score}
        for unit, of_unit in labels(best, totals.names).items()
        for label in of_unit
    ]
    storage.put_work(item.work, _formulas_name(item, block), pa.Table.from_pylist(rows, schema=_FORMULAS_SCHEMA))
    return time.monotonic() - started


def _images(storage: Storage, work: _Work, block: _Block) -> Iterator[ImageMasks]:
    """Every annotated image of the probe, with the masks of a block's units."""
    (layer, block_units), item = block, work.item
    width, positions = _nothing(work.size).shape[1], work.size[0] * work.size[1]
    tables = (storage.get_parts(item.work, work.pieces, part, FEW_PARTS) for part in (CONCEPTS, work.masks(layer)))
    for annotated, fired in zip(*tables, strict=True):
        fired = fired.filter(pc.is_in(fired["unit"], pa.array(block_units, pa.int32()))).combine_chunks()
        words = np.frombuffer(b"".join(fired["bits"].to_pylist()), np.uint64).reshape(-1, width)
        ids, units = fired["image_id"].to_numpy(), fired["unit"].to_numpy()
        order = np.argsort(ids, kind="stable")
        ids, units, words = ids[order], units[order], words[order]
        for row in annotated.to_pylist():
            begin, end = np.searchsorted(ids, [row["image_id"], row["image_id"] + 1]).tolist()
            concepts = np.frombuffer(row["bits"], np.uint64).reshape(-1, width)
            yield ImageMasks(row["names"], concepts, units[begin:end], words[begin:end], positions)
