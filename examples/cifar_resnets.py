"""An architecture of one's own as a plug-in: the CIFAR ResNets of He et al. 2016 (section 4.2).

    python -m jobs.exemplars --plugin examples/cifar_resnets.py --model resnet20/cifar10 \
        --weights cifar10_resnet20.pth --probe photos/

A plug-in needs three things: a function that builds the model from a weights file, the layers to dissect, and what the
model does to an image. Weights are those of https://github.com/akamaster/pytorch_resnet_cifar10 or your own.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from milan_ray.errors import MilanError
from milan_ray.models.registry import RANDOM, register_model
from milan_ray.models.view import Preprocess, View
from milan_ray.models.weights import load_weights

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class Block(nn.Module):
    """Two 3×3 convolutions and a shortcut without parameters (option A): every second pixel, new channels zero."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride, self.padding = stride, (outputs - inputs) // 2
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, inputs, H, W) → (B, outputs, H / stride, W / stride)."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(out + shortcut)


class CifarResNet(nn.Module):
    """A ResNet of 6·n + 2 layers for 32×32 images, in three stages of n blocks."""

    def __init__(self, n: int, classes: int = len(CLASSES)) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(*(Block(inputs if i == 0 else outputs, outputs, stride if i == 0 else 1) for i in range(n)))
            for inputs, outputs, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2))
        )
        self.linear = nn.Linear(64, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, 32, 32) → logits (B, classes)."""
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        logits: torch.Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits


def build(depth: int, weights: str | None) -> nn.Module:
    """Builds the ResNet of some depth with the weights of a file, or untrained ones from seed 0 for ``random``."""
    if weights is None:
        raise MilanError(f"resnet{depth}/cifar10 has no weights of its own: give --weights FILE, or --weights random.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CifarResNet((depth - 2) // 6)
    if weights != RANDOM:
        load_weights(model, weights)
    return model


for _depth in (20, 32, 44, 56):
    register_model(
        f"resnet{_depth}/cifar10",
        partial(build, _depth),
        layers=("conv1", "layer1", "layer2", "layer3"),
        preprocess=Preprocess(View(resize=(32, 32), crop=None)),
        classes=CLASSES,
    )
