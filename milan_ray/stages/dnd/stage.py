"""Describe-and-Dissect (Bai et al., TMLR 2025; docs/describe-and-dissect.md), an actor pool per step.

pooled ─► [augment: top images, attention crops] ─► [caption] ─► [summarise] ─► candidate labels
candidate labels ─► [draw: images of each, the units' activations for them] ─► drawings ─► [score] ─► descriptions

Without a generator, [find: probe images that fit each, the units' activations for them] takes the place of [draw].
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from milan_ray.config import ExemplarConfig, Fingerprint, Resources, config_hash
from milan_ray.engine import references
from milan_ray.engine.actor_pool import Row, run_pool
from milan_ray.engine.run_log import Cost
from milan_ray.engine.stage import (
    Job,
    Known,
    Layers,
    Output,
    RunnableStage,
    StepStage,
    TaskStage,
    pairs,
    publish,
    run_stages,
)
from milan_ray.engine.tasks import FEW_IMAGES, run_parallel
from milan_ray.errors import MilanError, all_failed
from milan_ray.labelers.dnd.labeler import DescribeAndDissect
from milan_ray.labelers.protocol import Drawn, Evidence
from milan_ray.progress import Progress, say
from milan_ray.schema import DESCRIPTIONS, DRAWINGS, EXEMPLARS
from milan_ray.stages.dnd.config import DndConfig
from milan_ray.stages.dnd.workers import (
    DRAWN_SCHEMA,
    WANTED_SCHEMA,
    AugmentWorker,
    CaptionWorker,
    DndWork,
    DrawWorker,
    FindWorker,
    SummariseWorker,
    find_top,
)
from milan_ray.stages.embeddings import ImageEmbeddings
from milan_ray.stages.exemplars import ModelWork, Run, failing, rerun_work
from milan_ray.storage import EXEMPLARS_KEY, Storage

UNITS_PER_BLOCK = 8
"""Units of a layer that are augmented, captioned and summarised at a time."""

LABELS = 4
"""Distinct candidate labels that images are generated of at a time."""

LABELS_FOUND = 256
"""Distinct candidate labels that images are found for at a time: each time, the pooled activations are read once."""


class Drawings(StepStage):
    """Candidate labels of a model's layers, with the images generated of them.

    Args:
        ref: The model.
        layers: Its layers.
        probe: The probe it was dissected on.
        config: How it was dissected.
        how: How to describe.
        identity: As :func:`milan_ray.stages.dnd.config.drawings_identity` gives it.
        units: The units of every layer to describe; empty for all.
    """

    table = DRAWINGS

    def __init__(
        self,
        ref: references.ModelRef,
        layers: Sequence[str],
        probe: references.ProbeRef,
        config: ExemplarConfig,
        how: DndConfig,
        identity: Mapping[str, object],
        units: tuple[int, ...] = (),
    ) -> None:
        self._ref, self._layers, self._probe, self._config = ref, layers, probe, config
        self._how, self._identity, self._units = how, identity, units
        self.name = how.labeler.name
        self.title = f"drawings by {self.name} of {ref.name}"

    def outputs(self, known: Known) -> Iterator[Output]:
        """Drawings of every layer, by what its exemplars are."""
        model = self._ref.name
        for layer in self._layers:
            exemplars = known.config(EXEMPLARS, model=model, layer=layer)
            known.check_units(self._units, model, layer)
            fingerprint = Fingerprint.of({**self._identity, "exemplars": exemplars}, self._units)
            yield Output({"labeler": self.name, "model": model, "layer": layer}, fingerprint)

    def run(self, job: Job) -> None:
        """Runs the unfinished rows of all steps, one step after the other, and merges the drawings.

        Raises:
            MilanError: The model generates images itself, or a step failed.
        """
        how, storage = self._how, job.storage
        work = DndWork(self._model_work(job), how, self._identity, self._units)
        item, name = work.item, self._ref.name
        units = _units_of(storage, work)
        rows: list[Row] = []
        blocks: dict[str, list[str]] = defaultdict(list)
        for layer in item.layers:
            for start in range(0, len(units[layer]), UNITS_PER_BLOCK):
                part = units[layer][start : start + UNITS_PER_BLOCK]
                blocks[layer].append(f"{item.part(layer)}/{config_hash({'units': part})}")
                row = {"model": 0, "images": len(part), "layer": layer, "block": blocks[layer][-1], "units": part}
                rows.append(row)
        work = replace(work, blocks=blocks)
        count = sum(map(len, units.values()))
        source = "the probe's images" if how.generator is None else how.generator.name
        say(f"{self.name}: {count} units of {name} by {how.captioner.name}, {how.summariser.name}, {source}")
        if how.generator is None:
            say(f"{self.name}: nothing is drawn: the probe images that fit a candidate best, by --clip, score it")
        clock = _Clock(storage, work, job.resources)
        plain = {"storage": storage, "work": work, "threads": job.resources.threads, "device": job.resources.device}
        modelled = {**Run(storage, self._probe, self._config, job.resources).arguments([item]), "dnd": work}
        clock.run("augmented", AugmentWorker, modelled, rows)
        clock.run("captions", CaptionWorker, plain, rows)
        clock.run("candidates", SummariseWorker, plain, rows, in_driver=how.summariser.is_server)
        drawing = _chunks(storage, work)
        if how.generator is None:
            clock.run("drawn", FindWorker, plain, drawing)
        else:
            clock.run("drawn", DrawWorker, modelled, drawing)
        images = sum(row["images"] for row in drawing)
        for output in job.due:
            share = len(units[output.layer]) / max(1, count)
            cost = Cost(clock.seconds * share, clock.seconds, images)
            _publish(storage, work, output, [row["block"] for row in drawing], cost)
        say(f"{self.name} of {name}: {clock.text(count)}")

    def _model_work(self, job: Job) -> ModelWork:
        """The model's work, for workers."""
        spec = references.model(self._ref)
        if spec.images is not None:
            raise MilanError(
                f"{spec.name} generates images; Describe-and-Dissect shows images to models: choose another."
            )
        due = [output.layer for output in job.due]
        return rerun_work(job.storage, self._ref, self._probe, self._config, due, job.work)


class DrawnLabels(TaskStage):
    """Labels of some layers, chosen by the activations of their units for the drawings.

    Args:
        models: Model name → layers.
        labeler: The labeler that chooses.
        units: The units of every layer to describe; empty for all.
    """

    table = DESCRIPTIONS

    def __init__(self, models: Layers, labeler: DescribeAndDissect, units: tuple[int, ...] = ()) -> None:
        self._models, self._labeler, self._units = models, labeler, units
        self.name = self.title = labeler.name

    def outputs(self, known: Known) -> Iterator[Output]:
        """Labels of every layer, by what its drawings are."""
        for model, layer in pairs(self._models):
            keys = {"labeler": self.name, "model": model, "layer": layer}
            parts = {**self._labeler.identity(), "drawings": known.all_units(DRAWINGS, **keys)}
            yield Output(keys, Fingerprint.of(parts, self._units))

    def make(self, storage: Storage, output: Output) -> pa.Table:
        """A layer's labels."""
        from milan_ray.stages.descriptions import described  # with its captioner, which workers can do without

        drawn = read_drawings(storage, self.name, output.model, output.layer, self._units)
        exemplars = storage.config_of(EXEMPLARS, **output.of_layer)
        return described(output, self._labeler, self._labeler.label(Evidence(drawn=drawn)), exemplars)


def dnd_stages(
    models: Sequence[references.ModelRef],
    layers: Layers,
    probe: references.ProbeRef,
    config: ExemplarConfig,
    how: DndConfig,
    identity: Mapping[str, object],
    units: tuple[int, ...] = (),
) -> dict[str, list[RunnableStage]]:
    """The stages that describe and dissect models: model → its stages.

    Args:
        models: The models.
        layers: Model → layers; models without an entry are left out.
        probe: The probe they were dissected on.
        config: How they were dissected.
        how: How to describe.
        identity: As :func:`milan_ray.stages.dnd.config.drawings_identity` gives it.
        units: The units of every layer to describe; empty for all.
    """
    found = [] if how.generator is not None or how.embedder is None else [ImageEmbeddings(how.embedder, probe)]
    return {
        ref.name: [
            *found,
            Drawings(ref, layers[ref.name], probe, config, how, identity, units),
            DrawnLabels({ref.name: layers[ref.name]}, how.labeler, units),
        ]
        for ref in models
        if ref.name in layers
    }


def run_dnd(storage: Storage, stages: Mapping[str, Sequence[RunnableStage]], resources: Resources) -> dict[str, str]:
    """Describes and dissects models, each by its stages; a model that fails does not stop the others.

    Args:
        storage: The run directory, which holds exemplars and pooled activations.
        stages: Of :func:`dnd_stages`.
        resources: What of the cluster to use; Ray must be connected.

    Returns:
        Model → why it could not be described.

    Raises:
        MilanError: Every model failed.
    """
    failed: dict[str, str] = {}
    for model, of_model in stages.items():
        with failing(failed, model):
            run_stages(of_model, storage, resources)
    all_failed(failed, len(stages))
    return failed


def read_drawings(
    storage: Storage, labeler: str, model: str, layer: str, units: tuple[int, ...] = ()
) -> dict[int, list[Drawn]]:
    """Unit → its candidates with the images drawn for them, in the order in which they were proposed.

    Args:
        storage: The run directory.
        labeler: The labeler's name, with its tag.
        model: Name of the model.
        layer: Module path.
        units: The units wanted; empty for all.
    """
    table = storage.read(DRAWINGS, labeler=labeler, model=model, layer=layer)
    drawings: dict[int, list[Drawn]] = defaultdict(list)
    for row in table.sort_by([("unit", "ascending"), ("place", "ascending")]).to_pylist():
        if not units or row["unit"] in units:
            similar = row["similarities"]
            cosines = None if similar is None else np.array(similar, np.float32)
            drawings[row["unit"]].append(Drawn(row["text"], np.array(row["activations"], np.float32), cosines))
    return dict(drawings)


def _units_of(storage: Storage, work: DndWork) -> dict[str, list[int]]:
    """Layer → its units that have top images; stores these images in the work."""
    item = work.item
    tops = run_parallel(partial(find_top, storage, work), item.layers, in_driver=item.plan.images <= FEW_IMAGES)
    return {item.layers[index]: units for index, units in tops}


class _Clock:
    """Runs the unfinished rows of steps, and adds up the seconds that they take."""

    def __init__(self, storage: Storage, work: DndWork, resources: Resources) -> None:
        self._storage, self._work, self._resources = storage, work, resources
        self._parts: dict[str, float] = {}
        self.seconds = 0.0

    def run(
        self,
        stage: str,
        worker: Callable[..., Any],
        arguments: dict[str, Any],
        rows: Sequence[Row],
        in_driver: bool = False,
    ) -> None:
        """Runs a step on the rows whose result is not stored: on a pool of actors, or in this process (``in_driver``).

        Raises:
            MilanError: As a worker raised it.
        """
        item = self._work.item
        stored = set(self._storage.work_names(item.work, stage))
        fresh = [row for row in rows if f"{stage}/{row['block']}" not in stored]
        if len(fresh) < len(rows):
            say(f"{stage} of {item.model.name}: {len(rows) - len(fresh)} of {len(rows)} blocks are done already")
        answers = (
            self._in_driver(worker, arguments, fresh)
            if in_driver
            else run_pool(worker, arguments, fresh, self._resources)
        )
        unit = "images" if stage == "drawn" else "units"
        taken = 0.0
        with Progress(stage, sum(row["images"] for row in fresh), unit) as progress:
            for answer in answers:
                if answer.get("error"):
                    raise MilanError(answer["error"])
                progress.advance(answer["images"])
                taken += answer["seconds"]
        self._parts[stage] = taken
        self.seconds += taken

    @staticmethod
    def _in_driver(worker: Callable[..., Any], arguments: dict[str, Any], rows: Sequence[Row]) -> Any:
        if not rows:
            return
        threads = torch.get_num_threads()
        try:
            working = worker(**arguments)
            for row in rows:
                started = time.monotonic()
                yield {**working(row), "seconds": time.monotonic() - started}
            if isinstance(working, SummariseWorker):
                working.close()
        finally:
            torch.set_num_threads(threads)

    def text(self, units: int) -> str:
        """Seconds per unit and step, for people."""
        parts = ", ".join(f"{stage} {taken / max(1, units):.2f}" for stage, taken in self._parts.items())
        return f"seconds per unit: {parts}"


def _chunks(storage: Storage, work: DndWork) -> list[Row]:
    """Sorts all candidates by text, so that images of each distinct one are generated once for the whole model."""
    item, count = work.item, LABELS_FOUND if work.how.generator is None else LABELS
    wanted: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for number, layer in enumerate(item.every):
        for block in work.blocks.get(layer, ()):
            for row in storage.get_work(item.work, f"candidates/{block}").to_pylist():
                wanted[row["text"]].append((number, row["unit"]))
    texts = sorted(wanted)
    rows: list[Row] = []
    stored = set(storage.work_names(item.work, "wanted"))
    for start in range(0, len(texts), count):
        chunk = texts[start : start + count]
        name = config_hash({"texts": chunk})
        asking = [{"text": text, "layer": layer, "unit": unit} for text in chunk for layer, unit in wanted[text]]
        if f"wanted/{name}" not in stored:
            storage.put_work(item.work, f"wanted/{name}", pa.Table.from_pylist(asking, schema=WANTED_SCHEMA))
        rows.append({"model": 0, "block": name, "texts": chunk, "images": len(chunk) * work.how.drawn})
    return rows


def _publish(storage: Storage, work: DndWork, output: Output, chunks: Sequence[str], cost: Cost) -> None:
    """Merges a layer's drawings and writes them."""
    item, layer = work.item, output.layer
    number = item.every.index(layer)
    drawn = pa.concat_tables(
        [DRAWN_SCHEMA.empty_table(), *(storage.get_work(item.work, f"drawn/{chunk}") for chunk in chunks)]
    )
    drawn = drawn.filter(pc.equal(drawn["layer"], number))
    by_text = {(row["unit"], row["text"]): row for row in drawn.to_pylist()}
    rows: list[dict[str, object]] = []
    for block in work.blocks[layer]:
        places: dict[int, int] = defaultdict(int)
        for asked in storage.get_work(item.work, f"candidates/{block}").to_pylist():
            unit = asked["unit"]
            row = by_text[unit, asked["text"]]
            scores = {name: row[name] for name in ("text", "activations", "similarities")}
            rows.append({**output.keys, "unit": unit, "place": places[unit], **scores})
            places[unit] += 1
    rows.sort(key=lambda row: (row["unit"], row["place"]))
    metadata = {EXEMPLARS_KEY: storage.config_of(EXEMPLARS, model=output.model, layer=layer)}
    table = pa.Table.from_pylist(rows, schema=DRAWINGS.schema.with_metadata(metadata))
    publish(storage, DRAWINGS, output, table, work.how.labeler.name, cost)
