"""Accuracy of a classifier with units switched off: images × sets of units, as tasks (docs/experiments.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch

from milan_ray.config import Resources, config_hash
from milan_ray.engine import references
from milan_ray.engine.model_cache import loaded_model
from milan_ray.engine.tasks import retry_if_overtaken
from milan_ray.exemplars.forward import pass_size, read_inputs
from milan_ray.models.ablation import Ablation, UnitSet
from milan_ray.models.class_numbers import class_numbers
from milan_ray.models.weights import weights_digest
from milan_ray.probe.base import ImageRef
from milan_ray.probe.manifest import image_refs
from milan_ray.stages.exemplars import store_manifest
from milan_ray.storage import Storage
from milan_ray.studies.tasks import run_tasks, worker_device

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
        correct: int64 (S, C), correctly classified images of each class, with each of S sets switched off.
        images: int64 (C,), images of each class.
        work: Folder of the counts in the run directory; the caller removes it after writing its own table.
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
    """Some images with some sets, the first of which is number ``first``."""

    storage: Storage
    work: str
    model: references.ModelRef
    probe: references.ProbeRef
    outputs: int
    resources: Resources
    name: str
    refs: tuple[ImageRef, ...]
    labels: tuple[int, ...]
    first: int
    sets: tuple[UnitSet, ...]

    @property
    def size(self) -> int:
        """Images to classify."""
        return len(self.refs) * len(self.sets)


@retry_if_overtaken
def run_ablations(
    storage: Storage,
    model: references.ModelRef,
    probe: references.ProbeRef,
    sets: Sequence[UnitSet],
    resources: Resources,
    within: str = "",
) -> Accuracies:
    """Counts the correct answers of a classifier with each set of units switched off.

    Results of finished tasks stay in the run directory until the caller has written its table, so that a job that was
    killed continues. Equal sets are measured once.

    Args:
        storage: The run directory.
        model: The classifier; its layers are replaced by those that the sets name.
        probe: Images with classes.
        sets: Sets of units, see :class:`milan_ray.models.ablation.Ablation`.
        resources: The part of the cluster to use; Ray must be connected.
        within: Configuration hash of the caller's table: the counts become part of its work in progress, which the
            caller removes. Empty stores them in :attr:`Accuracies.work`.

    Raises:
        MilanError: The images have no classes, or classes that the model does not have.
    """
    model = replace(model, layers=tuple(dict.fromkeys(layer for units in sets for layer in units)) or model.layers)
    spec = references.model(model)
    manifest, digest = store_manifest(storage, probe)
    classes, labels = class_numbers(manifest["class_label"].to_pylist(), spec)
    refs = image_refs(manifest)
    distinct, places = _distinct(sets)
    weights = weights_digest(spec.load())
    identity: dict[str, object] = {"ablations": distinct, "model": spec.name, "weights": weights, "probe": digest}
    if spec.features:
        identity["features"] = {layer: features.digest for layer, features in spec.features.items()}
    work = config_hash(identity)
    work = f"{within}/{work}" if within else work
    common = storage, work, model, probe, len(classes), resources
    tasks = [
        _Task(
            *common,
            f"counts/{start:08d}-{first:06d}",
            tuple(refs[start : start + IMAGES]),
            tuple(labels[start : start + IMAGES]),
            first,
            tuple(distinct[first : first + SETS]),
        )
        for first in range(0, len(distinct), SETS)
        for start in range(0, len(refs), IMAGES)
    ]
    stored = set(storage.work_names(work))
    due = [task for task in tasks if task.name not in stored]
    for _ in run_tasks(_count, due, resources, f"ablations of {spec.name}", "images", size=lambda task: task.size):
        pass
    correct = np.zeros((len(distinct), len(classes)), np.int64)
    for task in tasks:
        counts = np.array(storage.get_work(work, task.name)["correct"].to_pylist(), np.int64)
        correct[task.first : task.first + len(counts)] += counts
    return Accuracies(classes, correct[places], np.bincount(labels, minlength=len(classes)), work)


def _distinct(sets: Sequence[UnitSet]) -> tuple[list[dict[str, list[int]]], list[int]]:
    """The sets without repetition, their units sorted; and for each given set its index among them."""
    distinct: dict[frozenset[tuple[str, int]], dict[str, list[int]]] = {}
    keys = []
    for layers in sets:
        sorted_units = {layer: sorted(set(map(int, units))) for layer, units in layers.items()}
        keys.append(frozenset((layer, unit) for layer, units in sorted_units.items() for unit in units))
        distinct.setdefault(keys[-1], sorted_units)
    places = {key: place for place, key in enumerate(distinct)}
    return list(distinct.values()), [places[key] for key in keys]


def _count(task: _Task) -> None:
    device = worker_device(task.resources)
    spec, network = loaded_model(task.model, str(device))
    ablation = Ablation(spec, network, task.sets)
    batch = read_inputs(references.probe(task.probe), task.refs, spec)
    batch.complete("{reason}: accuracy needs every image; remove it or mend it.")
    size = pass_size(spec.batch(128), device)
    views, labels = torch.from_numpy(batch.views).split(size), torch.tensor(task.labels).split(size)
    parts = [ablation.correct(*some)[:, : task.outputs] for some in zip(views, labels, strict=True)]
    correct = torch.stack(parts).sum(0)
    task.storage.put_work(task.work, task.name, pa.table({"correct": correct.tolist()}, schema=_COUNTS_SCHEMA))
