"""Fine-tunes the last layer of a classifier with some units switched off, and counts its correct answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from milan_ray.config import Resources
from milan_ray.engine import references
from milan_ray.exemplars.forward import pass_size
from milan_ray.models.ablation import UnitSet
from milan_ray.models.class_numbers import class_numbers
from milan_ray.models.heads import HeadTraining, find_head, fit_head, head_inputs
from milan_ray.probe.manifest import image_refs
from milan_ray.studies.ablation.run import Accuracies
from milan_ray.studies.exemplar_images import model_views
from milan_ray.studies.tasks import run_tasks, worker_device

CHUNK = 512
"""Images read at a time."""


@dataclass(frozen=True)
class Tuned:
    """A classifier's last layer after fine-tuning.

    Attributes:
        head: Its path in the network.
        weight: float32 (classes, inputs).
        bias: float32 (classes,), or None.
        correct: Split → int64 (classes,), correctly classified images of each class.
    """

    head: str
    weight: torch.Tensor
    bias: torch.Tensor | None
    correct: Mapping[str, np.ndarray]

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """Its entries in the network's state dict."""
        bias = {} if self.bias is None else {f"{self.head}.bias": self.bias}
        return {f"{self.head}.weight": self.weight, **bias}


@dataclass(frozen=True)
class _Task:
    model: references.ModelRef
    train: references.ProbeRef
    probes: Mapping[str, references.ProbeRef]
    units: UnitSet
    config: HeadTraining
    resources: Resources


def fine_tune(
    model: references.ModelRef,
    train: references.ProbeRef,
    probes: Mapping[str, references.ProbeRef],
    sets: Sequence[UnitSet],
    config: HeadTraining,
    resources: Resources,
) -> tuple[list[Tuned], dict[str, Accuracies]]:
    """Fine-tunes a classifier's last layer with each set of units switched off, in parallel.

    The rest of the network does not change, so it runs over every image once per set, and the last layer learns from
    its inputs. Nothing is stored: every call computes everything again.

    Args:
        model: The classifier.
        train: Images with classes to learn from.
        probes: Split → images with classes to count accuracy on.
        sets: Different sets of units that are switched off.
        config: Optimisation.
        resources: The part of the cluster to use; Ray must be connected.

    Returns:
        The layer of each set, and per split the accuracies of all sets.

    Raises:
        MilanError: The model does not end in a linear map, or images have no classes.
    """
    layers = tuple(dict.fromkeys(layer for units in sets for layer in units)) or model.layers
    ref = replace(model, layers=layers)
    tasks = [_Task(ref, train, dict(probes), dict(units), config, resources) for units in sets]
    results = dict(run_tasks(_tune, tasks, resources, f"last layer of {model.name}", "trainings"))
    tuned = [results[index] for index in range(len(tasks))]
    spec = references.model(ref)
    accuracies = {}
    for split, probe in probes.items():
        names, labels = class_numbers(references.probe(probe).manifest()["class_label"].to_pylist(), spec)
        correct = np.stack([head.correct[split][: len(names)] for head in tuned])
        accuracies[split] = Accuracies(names, correct, np.bincount(labels, minlength=len(names)))
    return tuned, accuracies


def _tune(task: _Task) -> Tuned:
    device = worker_device(task.resources)
    spec = references.model(task.model)
    network = spec.load().to(device)
    head = ""

    def inputs(ref: references.ProbeRef) -> tuple[torch.Tensor, torch.Tensor]:
        """The last layer's inputs for the images of a probe, and their classes."""
        nonlocal head
        manifest = references.probe(ref).manifest()
        labels = class_numbers(manifest["class_label"].to_pylist(), spec)[1]
        refs, parts = image_refs(manifest), []
        for start in range(0, len(refs), CHUNK):
            views = torch.from_numpy(model_views(ref, refs[start : start + CHUNK], spec))
            head = head or find_head(spec, network, views.to(device))
            parts.append(head_inputs(spec, network, head, task.units, views, pass_size(spec.batch(128), device)))
        return torch.cat(parts), torch.tensor(labels)

    features, labels = inputs(task.train)
    last = network.get_submodule(head)
    assert isinstance(last, nn.Linear)
    bias: torch.Tensor | None = None if last.bias is None else last.bias.cpu()
    weight, bias = fit_head(features, labels, last.weight.cpu(), bias, task.config)
    correct = {}
    for split, probe in task.probes.items():
        features, labels = inputs(probe)
        right = F.linear(features, weight, bias).argmax(-1) == labels
        correct[split] = np.bincount(labels[right].numpy(), minlength=len(weight))
    return Tuned(head, weight, bias, correct)
