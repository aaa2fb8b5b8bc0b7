"""Scene classifiers (Places365) with the network dissection group's weights and the reference's layer names.

Works like a user's plug-in: importing the module registers the models.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from functools import partial

from torch import nn
from torchvision import models

from milan_ray.models.registry import build_seeded, register_model
from milan_ray.models.torchvision_zoo import build, default_layers
from milan_ray.models.weights import WeightsFile

HOST = "https://dissect.csail.mit.edu/models"
CLASSES = 365

_VGG16 = {"conv1": (0, 2), "conv2": (5, 7), "conv3": (10, 12, 14), "conv4": (17, 19, 21), "conv5": (24, 26, 28)}
_VGG16_NAMES = {f"{stage}_{i}": str(index) for stage, indices in _VGG16.items() for i, index in enumerate(indices, 1)}
_VGG16_NAMES |= {"fc6": "0", "fc7": "3", "fc8": "6", "fc8a": "6"}

_BLOCK = {"0": "conv1", "1": "bn1", "3": "conv2", "4": "bn2", "6": "conv3", "7": "bn3"}


def vgg16_name(name: str) -> str:
    """Torchvision's name of a parameter; the file names it by layer, e.g. ``features.conv1_2.weight``."""
    part, layer, *rest = name.split(".")
    return ".".join((part, _VGG16_NAMES.get(layer, layer), *rest))


def resnet152_name(name: str) -> str:
    """Torchvision's name of a parameter; the file holds nested chains of modules converted from Torch 7.

    ``4.1.0.0.3.weight`` is the second convolution in the second block of the first stage, ``4.0.0.1.0.weight`` the
    shortcut of its first block, ``10.1.weight`` the head.
    """
    name = re.sub(r"^0\.", "conv1.", name)
    name = re.sub(r"^1\.", "bn1.", name)
    name = re.sub(r"^10\.1\.", "fc.", name)
    if match := re.match(r"([4-7])\.(\d+)\.0\.0\.([013467])\.(.*)", name):
        stage, block, module, rest = match.groups()
        return f"layer{int(stage) - 3}.{block}.{_BLOCK[module]}.{rest}"
    if match := re.match(r"([4-7])\.(\d+)\.0\.1\.([01])\.(.*)", name):
        stage, block, module, rest = match.groups()
        return f"layer{int(stage) - 3}.{block}.downsample.{module}.{rest}"
    return name


def in_order(model: models.ResNet) -> nn.Sequential:
    """A ResNet as the chain of modules that the reference dissects by number: 0, 4, 5, 6, 7."""
    *modules, head = model.children()
    return nn.Sequential(*modules, nn.Flatten(), head)


def build_alexnet(weights: str | None) -> nn.Module:
    """Builds the AlexNet of Places365.

    Raises:
        MilanError: The file is missing or does not fit.
    """
    return build_seeded(alexnet, weights)


def alexnet(classes: int = CLASSES) -> nn.Sequential:
    """Krizhevsky's AlexNet with its grouped convolutions, under Caffe's names.

    As in the reference, there is no local response normalisation. Unlike in the reference, ``conv1`` pads its input:
    without padding, images need 227 pixels to reach ``fc6``, and the reference's own images have 224.
    """
    layers: list[tuple[str, nn.Module]] = [
        # With padding, 224 pixels give maps of the same sizes as 227 pixels without it.
        ("conv1", nn.Conv2d(3, 96, 11, stride=4, padding=2)),
        ("relu1", nn.ReLU(inplace=True)),
        ("pool1", nn.MaxPool2d(3, stride=2)),
        ("conv2", nn.Conv2d(96, 256, 5, padding=2, groups=2)),
        ("relu2", nn.ReLU(inplace=True)),
        ("pool2", nn.MaxPool2d(3, stride=2)),
        ("conv3", nn.Conv2d(256, 384, 3, padding=1)),
        ("relu3", nn.ReLU(inplace=True)),
        ("conv4", nn.Conv2d(384, 384, 3, padding=1, groups=2)),
        ("relu4", nn.ReLU(inplace=True)),
        ("conv5", nn.Conv2d(384, 256, 3, padding=1, groups=2)),
        ("relu5", nn.ReLU(inplace=True)),
        ("pool5", nn.MaxPool2d(3, stride=2)),
        ("flatten", nn.Flatten()),
        ("fc6", nn.Linear(256 * 6 * 6, 4096)),
        ("relu6", nn.ReLU(inplace=True)),
        ("dropout6", nn.Dropout()),
        ("fc7", nn.Linear(4096, 4096)),
        ("relu7", nn.ReLU(inplace=True)),
        ("dropout7", nn.Dropout()),
        ("fc8", nn.Linear(4096, classes)),
    ]
    return nn.Sequential(OrderedDict(layers))


def _register(
    architecture: str, factory: Callable[[str | None], nn.Module], layers: tuple[str, ...], file: str
) -> None:
    weights = WeightsFile.at(f"{HOST}/{file}", f"{architecture}/places365.pth")
    register_model(f"{architecture}/places365", factory, layers, published={"PLACES365": weights})


_register("alexnet", build_alexnet, tuple(f"conv{i}" for i in range(1, 6)), "alexnet_places365-6d3c0e75.pth")
_register(
    "resnet18",
    partial(build, "resnet18", classes=CLASSES),
    default_layers("resnet18"),
    "resnet18_places365-2f475921.pth",
)
_register(
    "resnet152",
    partial(build, "resnet152", classes=CLASSES, rename=resnet152_name, arrange=in_order),
    ("0", "4", "5", "6", "7"),
    "resnet152_places365-f928166e5c.pth",
)
_register(
    "vgg16",
    partial(build, "vgg16", classes=CLASSES, rename=vgg16_name),
    default_layers("vgg16"),
    "vgg16_places365-0bafbc55.pth",
)
