"""Training of the world's networks: seeded, on the CPU, about a minute each, as tasks that any worker can run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from safetensors.torch import save
from torch import nn
from torch.nn import functional as F

from milan_ray.models.view import Preprocess, View
from milan_ray.scoring.auroc import auroc
from milan_ray.world.encoder import EncoderNet
from milan_ray.world.generator import SceneGenerator, scene_code
from milan_ray.world.lexicon import NAMES
from milan_ray.world.networks import ARCHITECTURES, CLASSES, MEAN, PLACES, STD, PlantedNet, planted_concepts
from milan_ray.world.scenes import SIDE, SceneOptions, concept_maps, make_scene, render
from milan_ray.world.superposition import SuperposedNet

PREPROCESS = Preprocess(View(resize=None, crop=SIDE), MEAN, STD)
"""View and normalisation of every network of the world."""

Loss = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]

Trained = tuple[dict[str, torch.Tensor], dict[str, float]]
"""Weights, and metrics on held-out scenes."""


@dataclass(frozen=True)
class Recipe:
    """Training parameters of a network.

    Attributes:
        scenes: Number of training scenes of the split ``train``, from ``first`` on.
        epochs: Number of passes over the scenes.
        lr: Maximum learning rate of the one-cycle schedule.
        first: Index of the first scene; different networks train on different scenes.
        batch_size: Scenes per step.
    """

    scenes: int
    epochs: int
    lr: float
    first: int = 0
    batch_size: int = 64

    @property
    def span(self) -> tuple[str, int, int]:
        """Split, first scene and number of the training scenes."""
        return "train", self.first, self.scenes


RECIPES: dict[str, Recipe] = {
    "cnn": Recipe(scenes=10_000, epochs=2, lr=6e-3),
    "resnet": Recipe(scenes=9_000, epochs=3, lr=5e-3, first=20_000),
    "vit": Recipe(scenes=7_000, epochs=3, lr=3e-3, first=40_000, batch_size=32),
    "encoder": Recipe(scenes=12_000, epochs=2, lr=4e-3, first=60_000, batch_size=32),
    "planted": Recipe(scenes=6_000, epochs=3, lr=5e-3, first=80_000, batch_size=32),
    "superposed": Recipe(scenes=10_000, epochs=4, lr=5e-3, first=400_000, batch_size=32),
    "generator": Recipe(scenes=6_000, epochs=3, lr=6e-3, first=100_000, batch_size=16),
    "cnn-places": Recipe(scenes=6_000, epochs=2, lr=6e-3, first=120_000),
    "resnet-places": Recipe(scenes=5_000, epochs=2, lr=5e-3, first=140_000),
    "generator-places": Recipe(scenes=4_000, epochs=2, lr=6e-3, first=160_000, batch_size=16),
    "cnn-text": Recipe(scenes=4_000, epochs=3, lr=6e-3, first=180_000),
    "resnet-text": Recipe(scenes=4_000, epochs=3, lr=5e-3, first=190_000),
    "resnet-colour": Recipe(scenes=4_000, epochs=3, lr=5e-3, first=240_000),
    "cnn-1": Recipe(scenes=6_000, epochs=2, lr=6e-3, first=300_000),
    "resnet-1": Recipe(scenes=5_000, epochs=2, lr=5e-3, first=340_000),
}
"""The networks' default recipes, by network."""

PLACES_SUFFIX = "-places"
"""Name suffix of the networks of the second dataset, which has other scenes, and places as classes."""

MISLED = {
    "cnn-text": ("cnn", "text", 1),
    "resnet-text": ("resnet", "text", 3),
    "resnet-colour": ("resnet", "colour", 1),
}
"""Classifiers trained on scenes of which some reveal the class in a corner: name → (architecture, spurious feature,
number of networks). Each network has its own initial weights, order and scenes."""

SPURIOUS_SHARE = 0.5
"""Fraction of scenes with the spurious feature; the paper's value."""

PAIRED = {"cnn": 3, "resnet": 3}
"""Architecture → number of pairs of classifiers, ``cnn-1`` and ``cnn-1-blurred`` and so on. Both start from the same
initial weights and train on the same scenes in the same order, the second with all faces blurred out."""

BLURRED_SUFFIX = "-blurred"
"""Name suffix of the networks trained with blurred faces."""

TESTS = ("heldout", 1_000_000, 1_000)
"""Split, first scene and number of the test scenes, which are beyond the scenes of all probes."""


def images_of(split: str, start: int, count: int, options: SceneOptions | None = None) -> torch.Tensor:
    """Renders consecutive scenes, uint8 (count, 64, 64, 3)."""
    return torch.from_numpy(np.stack([render(make_scene(split, i, options)) for i in range(start, start + count)]))


def labels_of(split: str, start: int, count: int) -> torch.Tensor:
    """Classes of consecutive scenes, int64 (count,), as indices into ``CLASSES``."""
    return torch.tensor([CLASSES.index(make_scene(split, i).label) for i in range(start, start + count)])


def places_of(split: str, start: int, count: int) -> torch.Tensor:
    """Places of consecutive scenes, int64 (count,), as indices into ``PLACES``."""
    scenes = (make_scene(split, i) for i in range(start, start + count))
    return torch.tensor([PLACES.index(f"{scene.ground}, {scene.sky}") for scene in scenes])


def attributes_of(split: str, start: int, count: int) -> torch.Tensor:
    """Visible concepts of consecutive scenes, 0 or 1, float32 (count, C), columns as ``NAMES``."""
    present = (concept_maps(make_scene(split, i)).keys() for i in range(start, start + count))
    return torch.tensor([[float(name in shown) for name in NAMES] for shown in present])


def planted_targets(split: str, start: int, count: int, concepts: Sequence[str] = planted_concepts) -> torch.Tensor:
    """Coverage of grid cells by concepts in consecutive scenes, uint8 (count, len(concepts), 16, 16), 255 = all."""
    targets = np.zeros((count, len(concepts), 16, 16), dtype=np.uint8)
    column = {name: number for number, name in enumerate(concepts)}
    for row in range(count):
        for name, shown in concept_maps(make_scene(split, start + row)).items():
            if name in column:
                cells = shown.reshape(16, SIDE // 16, 16, SIDE // 16).sum(axis=(1, 3))
                targets[row, column[name]] = cells * 255 // (SIDE // 16) ** 2
    return torch.from_numpy(targets)


def codes_of(split: str, start: int, count: int) -> torch.Tensor:
    """Codes of consecutive scenes, float32 (count, CODE_SIZE)."""
    return torch.from_numpy(np.stack([scene_code(make_scene(split, i)) for i in range(start, start + count)]))


@contextmanager
def reproducible(seed: int, threads: int) -> Iterator[None]:
    """Context manager that sets torch's seed and number of threads, and restores the caller's afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def fit(network: nn.Module, images: torch.Tensor, targets: torch.Tensor, loss_of: Loss, recipe: Recipe) -> list[float]:
    """Trains a network in place.

    Args:
        network: Takes normalised images (B, 3, 64, 64).
        images: uint8 (N, 64, 64, 3).
        targets: N targets for ``loss_of``.
        loss_of: (network, inputs, targets) → scalar.
        recipe: Epochs, batch size, learning rate.

    Returns:
        The mean loss of every epoch.
    """
    network.train().to(memory_format=torch.channels_last)  # a fifth faster on CPUs
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.02)
    steps = len(images) // recipe.batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=recipe.epochs * steps)
    history = []
    for _ in range(recipe.epochs):
        order = torch.randperm(len(images))
        total = 0.0
        for step in range(steps):
            rows = order[step * recipe.batch_size : (step + 1) * recipe.batch_size]
            inputs = PREPROCESS(images[rows]).to(memory_format=torch.channels_last)
            loss = loss_of(network, inputs, targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        history.append(total / steps)
    network.eval()
    return history


@torch.no_grad()
def outputs_on(network: nn.Module, images: torch.Tensor, batch_size: int = 250) -> torch.Tensor:
    """A network's outputs on uint8 images (N, 64, 64, 3), in eval mode."""
    network.eval()
    return torch.cat([network(PREPROCESS(batch)) for batch in images.split(batch_size)])


def _accuracy(network: nn.Module, labels: torch.Tensor, options: SceneOptions | None = None) -> float:
    """The fraction of test scenes, rendered with the options, for which the network guesses the label."""
    guesses = outputs_on(network, images_of(*TESTS, options)).argmax(dim=1)
    return (guesses == labels).float().mean().item()


def _class_loss(network: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(network(inputs), labels)


def _encoder_loss(network: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = network(inputs)
    classes, attributes = logits[:, : len(CLASSES)], logits[:, len(CLASSES) :]
    return F.cross_entropy(classes, targets[:, 0].long()) + 4 * F.binary_cross_entropy_with_logits(
        attributes, targets[:, 1:]
    )


def _planted_loss(network: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    assert isinstance(network, PlantedNet)
    # Most cells do not contain a concept, so the few that do have three times the weight.
    return F.binary_cross_entropy_with_logits(network.maps(inputs), targets.float() / 255, pos_weight=torch.tensor(3.0))


def train_classifier(
    architecture: str,
    seed: int = 0,
    threads: int = 1,
    recipe: Recipe | None = None,
    places: bool = False,
    options: SceneOptions | None = None,
) -> Trained:
    """Trains one of the architectures to classify the big object, or the place.

    Args:
        architecture: A key of :data:`milan_ray.world.networks.ARCHITECTURES`.
        seed: Random seed of weights and order.
        threads: Number of torch threads; another number rounds differently and so gives other weights.
        recipe: Training parameters; None takes the default recipe.
        places: Whether to classify places instead of objects.
        options: Rendering options of the training scenes; the test scenes are unchanged.

    Returns:
        Weights, and metrics: ``accuracy`` on held-out scenes and the last epoch's ``loss``.
    """
    recipe = recipe or RECIPES[f"{architecture}{PLACES_SUFFIX}" if places else architecture]
    of, classes = (places_of, PLACES) if places else (labels_of, CLASSES)
    with reproducible(seed, threads):
        network = ARCHITECTURES[architecture].build(len(classes))
        images = images_of(*recipe.span, options)
        history = fit(network, images, of(*recipe.span), _class_loss, recipe)
        return network.state_dict(), {"accuracy": _accuracy(network, of(*TESTS)), "loss": history[-1]}


def train_misled(architecture: str, spurious: str, recipe: Recipe, seed: int = 0, threads: int = 1) -> Trained:
    """Trains a classifier on scenes of which a fraction reveals the class in a corner.

    Args:
        architecture: A key of :data:`milan_ray.world.networks.ARCHITECTURES`.
        spurious: Spurious feature in the corner, see :class:`~milan_ray.world.scenes.SceneOptions`.
        recipe: Training parameters.
        seed: Random seed of weights and order.
        threads: Number of torch threads.

    Returns:
        Weights, and metrics: ``accuracy`` on held-out scenes with empty corners, ``misled``, the accuracy if all
        corners show another class, and the last epoch's ``loss``.
    """
    with reproducible(seed, threads):
        network = ARCHITECTURES[architecture].build(len(CLASSES))
        shown = SceneOptions(spurious=spurious, share=SPURIOUS_SHARE)
        images = images_of(*recipe.span, shown)
        history = fit(network, images, labels_of(*recipe.span), _class_loss, recipe)
        labels, misleading = labels_of(*TESTS), SceneOptions(spurious=spurious, misleading=True)
        accuracy, misled = _accuracy(network, labels), _accuracy(network, labels, misleading)
        return network.state_dict(), {"loss": history[-1], "accuracy": accuracy, "misled": misled}


def train_encoder(seed: int = 100, threads: int = 1, recipe: Recipe | None = None) -> Trained:
    """Trains the captioner's encoder on image-level labels: the class and the concepts that occur, without positions.

    Returns:
        Weights, and metrics: class ``accuracy`` and mean ``auroc`` of the attributes on held-out scenes.
    """
    recipe = recipe or RECIPES["encoder"]
    with reproducible(seed, threads):
        network = EncoderNet()
        targets = torch.cat([labels_of(*recipe.span)[:, None].float(), attributes_of(*recipe.span)], dim=1)
        fit(network, images_of(*recipe.span), targets, _encoder_loss, recipe)
        outputs = outputs_on(network, images_of(*TESTS))
        labels = labels_of(*TESTS)
        present = attributes_of(*TESTS)
    accuracy = (outputs[:, : len(CLASSES)].argmax(dim=1) == labels).float().mean().item()
    return network.state_dict(), {"accuracy": accuracy, "auroc": _mean_auroc(outputs[:, len(CLASSES) :], present)}


def train_planted(seed: int = 200, threads: int = 1, recipe: Recipe | None = None) -> Trained:
    """Trains the network of planted units, backbone and 1×1 convolution together, on concept maps.

    Returns:
        Weights, and metrics: mean ``auroc`` of the units' maxima for their concepts on held-out scenes.
    """
    recipe = recipe or RECIPES["planted"]
    with reproducible(seed, threads):
        network = PlantedNet()
        metrics = {"auroc": _fit_planted(network, recipe)}
    return network.state_dict(), metrics


def train_superposed(seed: int = 600, threads: int = 1, recipe: Recipe | None = None) -> Trained:
    """Trains the network in superposition as :func:`train_planted` trains its own; its directions are not trained.

    Returns:
        Weights, and metrics: mean ``auroc`` of the directions' maxima for their concepts on held-out scenes.
    """
    recipe = recipe or RECIPES["superposed"]
    with reproducible(seed, threads):
        network = SuperposedNet()
        metrics = {"auroc": _fit_planted(network, recipe)}
    return network.state_dict(), metrics


def _fit_planted(network: PlantedNet, recipe: Recipe) -> float:
    """Trains a network's planted units on concept maps; returns its outputs' mean AUROC on held-out scenes."""
    targets = planted_targets(*recipe.span, network.concepts)
    share = (targets.float().mean(dim=(0, 2, 3)) / 255).clamp(min=1e-4)
    # Starts from each concept's frequency; otherwise the first epoch only learns that all concepts are rare.
    network.planted.bias = nn.Parameter(torch.logit(share))
    fit(network, images_of(*recipe.span), targets, _planted_loss, recipe)
    columns = [NAMES.index(name) for name in network.concepts]
    return _mean_auroc(outputs_on(network, images_of(*TESTS)), attributes_of(*TESTS)[:, columns])


def _painting_loss(network: nn.Module, images: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    return F.l1_loss(network(codes), images)


def train_generator(seed: int = 400, threads: int = 1, recipe: Recipe | None = None) -> Trained:
    """Trains the generator to render scenes from their codes, with a loss per pixel.

    Returns:
        Weights, and metrics: ``psnr`` of its images on held-out scenes, dB.
    """
    recipe = recipe or RECIPES["generator"]
    with reproducible(seed, threads):
        network = SceneGenerator()
        codes = codes_of(*recipe.span)
        fit(network, images_of(*recipe.span), codes, _painting_loss, recipe)
        images, codes = images_of(*TESTS), codes_of(*TESTS)
        with torch.no_grad():
            painted = torch.cat([PREPROCESS.pixels(network(batch)) for batch in codes.split(250)])
        error = (painted.float() - images.float()).square().mean().item()
    return network.state_dict(), {"psnr": 10 * math.log10(255**2 / error)}


def _mean_auroc(scores: torch.Tensor, present: torch.Tensor) -> float:
    """Mean, over columns, of the AUROC of a column's scores for its own concept."""
    each = auroc(scores.numpy(), present.numpy() > 0).diagonal()
    return float(np.nanmean(each))


@dataclass(frozen=True)
class TrainTask:
    """One training, small enough to be sent to a worker.

    Attributes:
        name: Name of the network; the weights' file is ``<name>.safetensors``.
        train: Returns (weights, metrics).
        core_seconds: Estimated CPU time, seconds.
    """

    name: str
    train: Callable[[], Trained]
    core_seconds: float

    @property
    def file(self) -> str:
        """File name of the weights."""
        return f"{self.name}.safetensors"

    def run(self) -> bytes:
        """Trains the network and returns a complete safetensors file; its metadata ``metrics`` is JSON."""
        weights, metrics = self.train()
        contiguous = {name: tensor.contiguous() for name, tensor in weights.items()}
        return save(contiguous, {"format": "pt", "metrics": json.dumps(metrics)})


def generator_task(threads: int = 1) -> TrainTask:
    """The training task of the generator, which is needed only for dissecting it."""
    return TrainTask("generator", partial(train_generator, threads=threads), 90)


def superposed_task(threads: int = 1) -> TrainTask:
    """The training task of the network in superposition, which is needed only for describing directions."""
    return TrainTask("superposed", partial(train_superposed, threads=threads), 80)


def places_tasks(threads: int = 1) -> list[TrainTask]:
    """The training tasks of the second dataset's networks, which only the groups need; the longest first."""
    short = RECIPES["generator-places"]
    return [
        TrainTask("generator-places", partial(train_generator, 401, threads, short), 40),
        TrainTask("resnet-places", partial(train_classifier, "resnet", 11, threads, places=True), 20),
        TrainTask("cnn-places", partial(train_classifier, "cnn", 10, threads, places=True), 13),
    ]


def misled_names(name: str) -> tuple[str, ...]:
    """The networks of an entry of :data:`MISLED`: ``name``, ``name-2`` and so on."""
    return tuple(f"{name}-{number}" if number > 1 else name for number in range(1, MISLED[name][2] + 1))


def misled_tasks(names: Sequence[str] = tuple(MISLED), threads: int = 1) -> list[TrainTask]:
    """The training tasks of :data:`MISLED`'s networks, which are needed only for editing networks."""
    tasks = []
    for name in names:
        architecture, spurious, _ = MISLED[name]
        recipe = RECIPES[name]
        for number, own in enumerate(misled_names(name)):
            scenes = replace(recipe, first=recipe.first + number * recipe.scenes)
            train = partial(train_misled, architecture, spurious, scenes, 20 + number, threads)
            tasks.append(TrainTask(own, train, 25))
    return tasks


def paired_names() -> list[tuple[str, str]]:
    """The pairs of :data:`PAIRED`: (network trained with faces, network trained with blurred faces)."""
    names = [f"{architecture}-{number}" for architecture, count in PAIRED.items() for number in range(1, count + 1)]
    return [(name, f"{name}{BLURRED_SUFFIX}") for name in names]


def paired_tasks(threads: int = 1) -> list[TrainTask]:
    """The training tasks of :data:`PAIRED`'s networks, which only the audit needs; the longest first."""
    tasks = []
    for name, blurred in paired_names():
        architecture, number = name.split("-")
        recipe = RECIPES[f"{architecture}-1"]
        recipe = replace(recipe, first=recipe.first + (int(number) - 1) * recipe.scenes)
        train = partial(train_classifier, architecture, 30 + int(number), threads, recipe)
        seconds = 20 if architecture == "resnet" else 13
        tasks.append(TrainTask(name, train, seconds))
        tasks.append(TrainTask(blurred, partial(train, options=SceneOptions(blur_faces=True)), seconds))
    return sorted(tasks, key=lambda task: -task.core_seconds)


def train_all_tasks(threads: int = 1) -> list[TrainTask]:
    """All training tasks of the demo, the longest first, so that a few workers finish at about the same time."""
    classifiers = {name: partial(train_classifier, name, seed, threads) for seed, name in enumerate(ARCHITECTURES)}
    return [
        TrainTask("encoder", partial(train_encoder, threads=threads), 75),
        TrainTask("planted", partial(train_planted, threads=threads), 55),
        TrainTask("resnet", classifiers["resnet"], 50),
        TrainTask("vit", classifiers["vit"], 50),
        TrainTask("cnn", classifiers["cnn"], 22),
    ]
