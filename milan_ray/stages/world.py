"""The built-in world's own stages: its networks, its annotators, its judges."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from milan_ray.config import ExemplarConfig, Fingerprint
from milan_ray.engine import references
from milan_ray.engine.stage import Known, Layers, Output, Stage, due, pairs, piece_schema
from milan_ray.engine.tasks import run_parallel
from milan_ray.exemplars import masks
from milan_ray.exemplars.forward import read_inputs
from milan_ray.exemplars.masks import mask_size
from milan_ray.probe.manifest import image_refs
from milan_ray.progress import Progress, say
from milan_ray.schema import ANNOTATIONS, EXEMPLARS, LEVELS, MANIFEST
from milan_ray.stages.arithmetic import Forwards, arithmetics_of
from milan_ray.storage import EXEMPLARS_KEY, Storage
from milan_ray.world.annotators import annotate_unit
from milan_ray.world.image_text import FOLDER, build, image_text_task
from milan_ray.world.iou import ConceptIoU
from milan_ray.world.lexicon import NAMES
from milan_ray.world.plugin import weights_dir
from milan_ray.world.probe import WORLD_DIGEST
from milan_ray.world.training import TrainTask

ANNOTATORS_VERSION = "annotators-1"

SOURCE = "world"
"""Source of the annotations that the world's annotators write."""


def train_networks(wanted: Sequence[TrainTask]) -> int:
    """Trains the world's networks that are not there yet, side by side; returns how many."""
    place, tasks = Storage(weights_dir()), untrained(wanted)
    if not tasks:
        say(f"the world's networks: all in {place.root}")
        return 0
    say(f"training the world's networks: {', '.join(task.name for task in tasks)}")
    with Progress("networks", len(tasks), "networks") as progress:
        for index, weights in run_parallel(TrainTask.run, tasks):
            place.put(tasks[index].file, weights)
            progress.advance()
            say(f"  {tasks[index].name}: {_metrics(weights)} on held-out scenes")
    return len(tasks)


def untrained(wanted: Sequence[TrainTask]) -> list[TrainTask]:
    """The trainings whose networks are not there."""
    place = Storage(weights_dir())
    return [task for task in wanted if not place.exists(task.file)]


def image_text_folder() -> Path:
    """Where the world's model of images and texts lies, once it is trained."""
    return weights_dir() / FOLDER


def train_image_text() -> str:
    """Trains the world's model of images and texts if it is not there yet; returns its folder."""
    folder = image_text_folder()
    build(folder)
    train_networks([image_text_task()])
    return str(folder)


def _metrics(weights: bytes) -> str:
    """The metrics of a training, from the header of its safetensors file."""
    header = json.loads(weights[8 : 8 + int.from_bytes(weights[:8], "little")])
    metrics = json.loads(header["__metadata__"]["metrics"])
    return ", ".join(
        f"{name} {metrics[name]:.3f}" for name in ("accuracy", "misled", "auroc", "psnr") if name in metrics
    )


class Annotations(Stage):
    """Annotations by the world's annotators; :func:`annotate` makes them.

    Args:
        models: Model → layers.
    """

    table, name, title = ANNOTATIONS, "annotations", "annotations"

    def __init__(self, models: Layers) -> None:
        self._models = models

    def outputs(self, known: Known) -> Iterator[Output]:
        """A table per layer, which follows from its exemplars."""
        for model, layer in pairs(self._models):
            exemplars = known.config(EXEMPLARS, model=model, layer=layer)
            inputs = {"kernel": ANNOTATORS_VERSION, "world": WORLD_DIGEST, "exemplars": exemplars}
            yield Output({"source": SOURCE, "model": model, "layer": layer}, Fingerprint.of(inputs))


def annotate(storage: Storage, probe: references.ProbeRef, models: Layers) -> None:
    """Lets the world's annotators describe every unit of some models, where their annotations are missing or stale."""
    outputs = due(Annotations(models), storage)
    if not outputs:
        say("annotations: all up to date")
        return
    with Progress("annotations", len(outputs), "layers") as progress:
        for _ in run_parallel(partial(_annotate_layer, storage, probe), outputs):
            progress.advance()


def _annotate_layer(storage: Storage, probe: references.ProbeRef, output: Output) -> None:
    keys = output.of_layer
    exemplars = storage.read(EXEMPLARS, ["unit", "image_id", "mask"], **keys)
    metadata = storage.metadata(EXEMPLARS, **keys) or {}
    size = mask_size(metadata)
    ids = sorted(set(exemplars["image_id"].to_pylist()))
    source = references.probe(probe)
    refs = image_refs(storage.read(MANIFEST, probe=metadata["probe"]), ids)
    maps = {ref.image_id: source.concept_maps(ref) or {} for ref in refs}
    units = exemplars["unit"].to_numpy()
    rows: list[dict[str, object]] = []
    for unit in np.unique(units).tolist():
        of_unit = exemplars.filter(units == unit)
        annotations = annotate_unit(
            masks.unpack(of_unit["mask"].to_pylist(), size),
            [maps[image_id] for image_id in of_unit["image_id"].to_pylist()],
            f"{output.model}/{output.layer}/{unit}",
        )
        rows += [{"unit": unit, "annotator": each.annotator, "text": each.text} for each in annotations]
    columns = output.columns(pa.Table.from_pylist(rows, schema=piece_schema(ANNOTATIONS)))
    table = ANNOTATIONS.table(columns, {EXEMPLARS_KEY: storage.config_of(EXEMPLARS, **keys)})
    storage.write(ANNOTATIONS, table, output.fingerprint, **output.keys)


@dataclass(frozen=True)
class Truth:
    """Activations and concepts of a network's units on held-out scenes.

    Attributes:
        activations: float32 (N, U), each unit's maximum over positions; units of all layers side by side.
        iou: float64 (U,), each unit's highest IoU with a concept.
        concept: int64 (U,), which concept that is: place in :data:`~milan_ray.world.lexicon.NAMES`.
    """

    activations: np.ndarray
    iou: np.ndarray
    concept: np.ndarray


def truth(storage: Storage, models: Mapping[str, Sequence[str]], probe: references.ProbeRef) -> dict[str, Truth]:
    """Runs models over held-out scenes and compares their units with the scenes' concept maps."""
    names = list(models)
    truths: dict[str, Truth] = {}
    with Progress("held-out scenes", len(names), "models") as progress:
        for index, result in run_parallel(partial(_truth, storage, probe), list(models.items())):
            truths[names[index]] = result
            progress.advance()
    return truths


def _truth(storage: Storage, probe: references.ProbeRef, model: tuple[str, Sequence[str]]) -> Truth:
    """The truth of one model, given by its name and layers."""
    name, layers = model
    source = references.probe(probe)
    spec = references.model(references.ModelRef(name))
    batch_size = ExemplarConfig().batch_size
    forward = Forwards(spec, spec.load, arithmetics_of(storage, name, layers), batch_size)
    states: dict[str, ConceptIoU] = {}
    for layer in layers:
        levels = storage.read(LEVELS, ["level"], model=name, layer=layer)["level"]
        states[layer] = ConceptIoU(torch.from_numpy(np.array(levels)), NAMES)
    pooled: list[np.ndarray] = []
    refs = image_refs(source.manifest())
    for start in range(0, len(refs), batch_size):
        batch = refs[start : start + batch_size]
        concepts = [source.concept_maps(ref) or {} for ref in batch]
        maps = forward.maps(read_inputs(source, batch, spec).inputs)
        for layer, state in states.items():
            state.update(maps[layer], concepts)
        pooled.append(np.concatenate([maps[layer].amax(dim=(2, 3)).numpy() for layer in layers], axis=1))
    ious = np.concatenate([state.result() for state in states.values()])
    return Truth(np.concatenate(pooled), ious.max(axis=1), ious.argmax(axis=1))
