"""A zoo of 24 networks of the world, barely trained, and some that fail.

Three architectures from four seeds, each on plain and on face-blurred scenes; all are dissected on plain scenes, as in
the paper's audit (§6: "exemplar sets containing only unblurred images"). Their weights lie beside this file, where
``train`` puts them. Where a file ``loads`` lies there too, every build writes a line into it.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from milan_ray.models.registry import register_model
from milan_ray.models.weights import WeightsFile
from milan_ray.probe.registry import register_probe
from milan_ray.world.networks import ARCHITECTURES, CLASSES
from milan_ray.world.probe import WorldProbe
from milan_ray.world.scenes import SceneOptions, make_scene, render
from milan_ray.world.training import PREPROCESS, Recipe, fit

FOLDER = Path(__file__).parent
SEEDS = range(4)
DATA = {"scenes": SceneOptions(), "scenes-blurred": SceneOptions(blur_faces=True)}
LAYERS = {"cnn": ("conv1", "conv3"), "resnet": ("stem", "layer2"), "vit": ("stem", "blocks.2")}
BARELY = Recipe(scenes=32, epochs=1, lr=5e-3, batch_size=16)


def log(name: str) -> None:
    if (FOLDER / "loads").exists():
        with (FOLDER / "loads").open("a") as loads:
            loads.write(f"{os.getpid()} {name}\n")


def file_of(name: str) -> Path:
    return FOLDER / f"{name.replace('/', '-')}.safetensors"


def train() -> None:
    """Trains every network for two steps: some seconds in all."""
    scenes = range(BARELY.scenes)
    labels = torch.tensor([CLASSES.index(make_scene("train", i).label) for i in scenes])
    for data, options in DATA.items():
        images = torch.from_numpy(np.stack([render(make_scene("train", i, options)) for i in scenes]))
        for architecture in ARCHITECTURES:
            for seed in SEEDS:
                torch.manual_seed(seed)
                network = ARCHITECTURES[architecture].build()
                fit(network, images, labels, lambda net, inputs, targets: F.cross_entropy(net(inputs), targets), BARELY)
                weights = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
                save_file(weights, file_of(f"{architecture}{seed}/{data}"))


def trained(name: str, architecture: str, weights: str | None) -> nn.Module:
    log(name)
    network = ARCHITECTURES[architecture].build()
    network.load_state_dict(load_file(weights or file_of(name)))
    return network


class Raises(nn.Module):
    """Fails on any batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("this batch is not to my taste")


def raises(weights: str | None) -> nn.Module:
    log("bad-batch")
    return Raises()


def unbuildable(weights: str | None) -> nn.Module:
    raise RuntimeError("out of order")


for architecture, layers in LAYERS.items():
    for seed in SEEDS:
        for data in DATA:
            name = f"{architecture}{seed}/{data}"
            register_model(name, partial(trained, name, architecture), layers, PREPROCESS, classes=CLASSES)

register_model("bad-batch/bad", raises, ("conv",), PREPROCESS)
register_model("unbuildable/bad", unbuildable, ("conv",), PREPROCESS)
register_model(
    "unfetched/bad",
    unbuildable,
    ("conv",),
    PREPROCESS,
    published={"V1": WeightsFile("unfetched-0.pth", "https://example.invalid/unfetched-0.pth")},
)
register_probe("scenes", partial(WorldProbe, "probe", 48))
