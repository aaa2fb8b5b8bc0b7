"""Accuracy of a classifier with units switched off: images × sets of units, as tasks (docs/experiments.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch

from milan_ray.config import Resources, config_hash
from milan_ray.device import resolve_device
from milan_ray.engine import references
from milan_ray.engine.cluster import gpus_each
from milan_ray.engine.model_cache import loaded_model
from milan_ray.engine.tasks import retry_if_overtaken, run_parallel
from milan_ray.errors import MilanError
from milan_ray.exemplars.forward import pass_size, read_inputs
from milan_ray.models.ablation import Ablation, UnitSet
from milan_ray.models.registry import ModelSpec
from milan_ray.models.weights import weights_digest
from milan_ray.probe.base import ImageRef
from milan_ray.probe.manifest import image_refs
from milan_ray.progress import Progress
from milan_ray.stages.exemplars import store_manifest
from milan_ray.storage import Storage

IMAGES = 512
"""Images per task."""

SETS = 256
"""Sets of units per task."""

_COUNTS_SCHEMA = pa.schema([("correct", pa.list_(pa.int32()))])


@dataclass(frozen=True)
class Accuracies:
    """Correct answers of a classifier with units switched off.

    Attributes:
        classes: Names of the C classes.
        correct: int64 (S, C), images of each class that each of S sets leaves correctly classified.
        images: int64 (C,), images of each class.
        work: Where the counts lie in the run directory; the caller removes them when its own table is there.
    """

    classes: tuple[str, ...]
    correct: np.ndarray
    images: np.ndarray
    work: str = ""

    @property
    def accuracy(self) -> np.ndarray:
        """Share of all images, (S,)."""
        return self.correct.sum(1) / self.images.sum()


@dataclass(frozen=True)
class _Task:
    storage: Storage
    work: str
    name: str
    model: references.ModelRef
    probe: references.ProbeRef
    refs: tuple[ImageRef, ...]
    labels: tuple[int, ...]
    sets: tuple[UnitSet, ...]
    outputs: int
    threads: int
    device: str


@retry_if_overtaken
def run_ablations(
    storage: Storage,
    model: references.ModelRef,
    probe: references.ProbeRef,
    sets: Sequence[UnitSet],
    resources: Resources,
    within: str = "",
) -> Accuracies:
    """Counts what a classifier gets right with each set of units switched off.

    Tasks that are done lie in the run directory until the caller has made its table of them, so that a job that dies
    goes on where it was.

    Args:
        storage: The run directory.
        model: The classifier; its layers may be any that the sets name.
        probe: Images with classes.
        sets: Sets of units, see :class:`milan_ray.models.ablation.Ablation`.
        resources: What of the cluster to use; Ray must be connected.
        within: Configuration hash of the caller's table, whose work this is part of; the caller removes that. Empty
            leaves it to :attr:`Accuracies.work`.

    Raises:
        MilanError: The images have no classes, or others than the model's.
    """
    model = replace(model, layers=tuple(dict.fromkeys(layer for one in sets for layer in one)) or model.layers)
    spec = references.model(model)
    manifest, digest = store_manifest(storage, probe)
    classes, labels = class_numbers(manifest["class_label"].to_pylist(), spec)
    refs = image_refs(manifest)
    weights = weights_digest(spec.load())
    tidy = [{layer: sorted(set(map(int, units))) for layer, units in one.items()} for one in sets]
    work = config_hash({"ablations": tidy, "model": spec.name, "weights": weights, "probe": digest})
    work = f"{within}/{work}" if within else work
    stored = set(storage.work_names(work))
    tasks = [
        _Task(
            storage,
            work,
            f"counts/{start:08d}-{first:06d}",
            model,
            probe,
            tuple(refs[start : start + IMAGES]),
            tuple(labels[start : start + IMAGES]),
            tuple(tidy[first : first + SETS]),
            len(classes),
            resources.threads,
            resources.device,
        )
        for first in range(0, len(tidy), SETS)
        for start in range(0, len(refs), IMAGES)
    ]
    due = [task for task in tasks if task.name not in stored]
    with Progress(f"ablations of {spec.name}", sum(len(task.refs) * len(task.sets) for task in due), "images") as shown:
        for index, _ in run_parallel(_count, due, resources.cpus_per_actor, gpus_each(resources)):
            shown.advance(len(due[index].refs) * len(due[index].sets))
    correct = np.zeros((len(tidy), len(classes)), np.int64)
    for task in tasks:
        first = int(task.name.rsplit("-", 1)[1])
        rows = storage.get_work(work, task.name)["correct"].to_pylist()
        correct[first : first + len(rows)] += np.array(rows, np.int64)
    return Accuracies(classes, correct, np.bincount(labels, minlength=len(classes)), work)


def class_numbers(labels: Sequence[str | None], spec: ModelSpec) -> tuple[tuple[str, ...], list[int]]:
    """The classes of images as the numbers of a model's outputs.

    By the names of the outputs where the model has them and the images' classes are among them; else in alphabetical
    order, as folders of classes are numbered everywhere.

    Args:
        labels: Class of each image.
        spec: The model.

    Returns:
        Names of the classes, and each image's number.

    Raises:
        MilanError: There are no images, an image has no class, or there are more classes than outputs.
    """
    names = sorted({label for label in labels if label is not None})
    if not names or None in labels:
        raise MilanError(
            "accuracy needs images with classes, and some have none: give a folder of class folders, or --labels."
        )
    if spec.classes is not None:
        if set(names) <= set(spec.classes):
            names = list(spec.classes)
        elif len(names) != len(spec.classes):
            raise MilanError(
                f"{spec.name} tells {len(spec.classes)} classes, {', '.join(spec.classes[:3])}, …, and the images have "
                f"{len(names)}, {', '.join(names[:3])}, …: give images of the model's classes."
            )
    numbers = {name: number for number, name in enumerate(names)}
    return tuple(names), [numbers[str(label)] for label in labels]


def _count(task: _Task) -> None:
    torch.set_num_threads(task.threads)
    device = resolve_device(task.device)
    spec, network = loaded_model(task.model, str(device))
    ablation = Ablation(spec, network, task.sets)
    batch = read_inputs(references.probe(task.probe), task.refs, spec)
    batch.complete("{reason}: accuracy needs every image; remove it or mend it.")
    views, labels = torch.from_numpy(batch.views), torch.tensor(task.labels)
    correct = torch.zeros(len(task.sets), task.outputs, dtype=torch.int64)
    size = pass_size(spec.batch(128), device)
    for some, of in zip(views.split(size), labels.split(size), strict=True):
        correct += ablation.correct(some, of)[:, : task.outputs]
    task.storage.put_work(task.work, task.name, pa.table({"correct": correct.tolist()}, schema=_COUNTS_SCHEMA))
