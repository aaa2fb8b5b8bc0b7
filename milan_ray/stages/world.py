"""The built-in world's own stages: its networks, its annotators, its judges."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from milan_ray.config import ExemplarConfig, Fingerprint
from milan_ray.engine import references
from milan_ray.engine.stage import Known, Layers, Output, Stage, due, pairs
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
    """What a training says of itself, from the header of its safetensors file."""
    header = json.loads(weights[8 : 8 + int.from_bytes(weights[:8], "little")])
    found = json.loads(header["__metadata__"]["metrics"])
    return ", ".join(f"{name} {found[name]:.3f}" for name in ("accuracy", "misled", "auroc", "psnr") if name in found)


@dataclass(frozen=True)
class _Annotate:
    storage: Storage
    probe: references.ProbeRef
    output: Output


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
    tasks = [_Annotate(storage, probe, output) for output in due(Annotations(models), storage)]
    if not tasks:
        say("annotations: all up to date")
        return
    with Progress("annotations", len(tasks), "layers") as progress:
        for _ in run_parallel(_annotate_layer, tasks):
            progress.advance()


def _annotate_layer(task: _Annotate) -> None:
    keys = {"model": task.output.model, "layer": task.output.layer}
    exemplars = task.storage.read(EXEMPLARS, ["unit", "image_id", "mask"], **keys)
    meta = task.storage.metadata(EXEMPLARS, **keys) or {}
    size = mask_size(meta)
    ids = sorted(set(exemplars["image_id"].to_pylist()))
    source = references.probe(task.probe)
    maps = {
        ref.image_id: source.concept_maps(ref) or {}
        for ref in image_refs(task.storage.read(MANIFEST, probe=meta["probe"]), ids)
    }
    units = exemplars["unit"].to_numpy()
    rows: list[tuple[int, str, str]] = []
    for unit in np.unique(units):
        mine = exemplars.filter(units == unit)
        found = annotate_unit(
            masks.unpack(mine["mask"].to_pylist(), size),
            [maps[image_id] for image_id in mine["image_id"].to_pylist()],
            f"{task.output.model}/{task.output.layer}/{unit}",
        )
        rows += [(int(unit), annotation.annotator, annotation.text) for annotation in found]
    table = ANNOTATIONS.table(
        {
            **{key: [value] * len(rows) for key, value in task.output.keys.items()},
            "unit": [unit for unit, _, _ in rows],
            "annotator": [who for _, who, _ in rows],
            "text": [text for _, _, text in rows],
        },
        {EXEMPLARS_KEY: task.storage.config_of(EXEMPLARS, **keys)},
    )
    task.storage.write(ANNOTATIONS, table, task.output.fingerprint, **task.output.keys)


@dataclass(frozen=True)
class Truth:
    """What a network's units do on held-out scenes.

    Attributes:
        activations: float32 (N, U), each unit's maximum over positions; units of all layers side by side.
        iou: float64 (U,), each unit's highest IoU with a concept.
        concept: int64 (U,), which concept that is: place in :data:`~milan_ray.world.lexicon.NAMES`.
    """

    activations: np.ndarray
    iou: np.ndarray
    concept: np.ndarray


@dataclass(frozen=True)
class _Judge:
    storage: Storage
    model: references.ModelRef
    layers: tuple[str, ...]
    probe: references.ProbeRef


def truth(storage: Storage, models: Mapping[str, Sequence[str]], probe: references.ProbeRef) -> dict[str, Truth]:
    """Runs models over held-out scenes and compares their units with the scenes' concept maps."""
    tasks = [_Judge(storage, references.ModelRef(model), tuple(layers), probe) for model, layers in models.items()]
    names = list(models)
    found: dict[str, Truth] = {}
    with Progress("held-out scenes", len(tasks), "models") as progress:
        for index, result in run_parallel(_judge, tasks):
            found[names[index]] = result
            progress.advance()
    return found


def _judge(task: _Judge) -> Truth:
    source = references.probe(task.probe)
    spec = references.model(task.model)
    batch_size = ExemplarConfig().batch_size
    forward = Forwards(spec, spec.load, arithmetics_of(task.storage, spec.name, task.layers), batch_size)
    states = {
        layer: ConceptIoU(
            torch.from_numpy(np.array(task.storage.read(LEVELS, ["level"], model=spec.name, layer=layer)["level"])),
            NAMES,
        )
        for layer in task.layers
    }
    pooled: list[np.ndarray] = []
    refs = image_refs(source.manifest())
    for start in range(0, len(refs), batch_size):
        batch = refs[start : start + batch_size]
        concepts = [source.concept_maps(ref) or {} for ref in batch]
        maps = forward.maps(read_inputs(source, batch, spec).inputs)
        for layer, state in states.items():
            state.update(maps[layer], concepts)
        pooled.append(np.concatenate([maps[layer].amax(dim=(2, 3)).numpy() for layer in task.layers], axis=1))
    ious = np.concatenate([state.result() for state in states.values()])
    return Truth(np.concatenate(pooled), ious.max(axis=1), ious.argmax(axis=1))
