"""The world's networks: three architectures to describe, and one with planted units. All take (B, 3, 64, 64)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from milan_ray.world.lexicon import NAMES
from milan_ray.world.scenes import GROUNDS, OBJECTS, RELATIONS, SIGN_WORDS, SKIES

MEAN = (0.45, 0.45, 0.45)
STD = (0.25, 0.25, 0.25)

CLASSES = OBJECTS
"""Names of the classifiers' outputs."""

PLACES = tuple(f"{ground}, {sky}" for ground in GROUNDS for sky in SKIES)
"""Output names of the classifiers of places instead of objects, which correspond to Places365 networks."""

planted_concepts: tuple[str, ...] = (*(n for n in NAMES if n not in (*RELATIONS, *SIGN_WORDS)), *RELATIONS)
"""Concepts of the planted units: unit ``i`` of layer ``planted`` detects concept ``i``.

A relation's unit is trained to fire on both of its objects. Single words are left out, because a small network does not
learn to read.
"""


def convolution(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """A convolution, batch normalisation and ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class PlainNet(nn.Module):
    """A plain network of four convolutions.

    Attributes:
        conv1: (B, 24, 32, 32).
        conv2: (B, 48, 16, 16).
        conv3: (B, 80, 8, 8).
        conv4: (B, 96, 8, 8).
    """

    def __init__(self, outputs: int = len(CLASSES)) -> None:
        super().__init__()
        self.conv1 = convolution(3, 24, kernel=5, stride=2)
        self.conv2 = convolution(24, 48)
        self.conv3 = convolution(48, 80)
        self.conv4 = convolution(80, 96)
        self.head = nn.Linear(96, outputs)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Class logits (B, outputs) of images (B, 3, 64, 64)."""
        maps = self.conv2(F.max_pool2d(self.conv1(images), 2))
        maps = self.conv4(self.conv3(F.max_pool2d(maps, 2)))
        return self.head(maps.mean(dim=(2, 3)))


class Block(nn.Module):
    """A residual block: two convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.first = convolution(inputs, outputs, stride=stride)
        self.second = nn.Sequential(nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """Maps (B, inputs, H, W) to (B, outputs, H / stride, W / stride)."""
        return F.relu(self.second(self.first(maps)) + self.shortcut(maps))


class ResidualNet(nn.Module):
    """A small residual network.

    Attributes:
        stem: (B, 24, 32, 32).
        layer1: (B, 48, 16, 16).
        layer2: (B, 72, 8, 8).
        layer3: (B, 104, 8, 8).
    """

    def __init__(self, outputs: int = len(CLASSES), widths: tuple[int, int, int, int] = (24, 48, 72, 104)) -> None:
        super().__init__()
        stem, one, two, three = widths
        self.stem = convolution(3, stem, kernel=5, stride=2)
        self.layer1 = Block(stem, one)
        self.layer2 = Block(one, two, stride=2)
        self.layer3 = Block(two, three)
        self.head = nn.Linear(three, outputs)

    def pyramid(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Maps of stem, layer1, layer2 and layer3."""
        maps = [self.stem(images)]
        maps.append(self.layer1(F.max_pool2d(maps[0], 2)))
        maps.append(self.layer2(maps[1]))
        maps.append(self.layer3(maps[2]))
        return maps

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (B, outputs) of images (B, 3, 64, 64)."""
        return self.head(self.pyramid(images)[-1].mean(dim=(2, 3)))


class TokenBlock(nn.Module):
    """A pre-norm transformer block over tokens (B, T, C)."""

    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(width, hidden), act=nn.GELU(), fc2=nn.Linear(hidden, width)))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (B, T, C) to tokens (B, T, C)."""
        batch, count, width = tokens.shape
        qkv = self.qkv(self.norm1(tokens)).view(batch, count, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(tokens.shape)
        tokens = tokens + self.mix(mixed)
        return tokens + self.mlp(self.norm2(tokens))


class TokenNet(nn.Module):
    """A vision transformer with a convolutional stem, because a plain patch embedding learns too slowly.

    Attributes:
        stem: (B, 72, 8, 8).
        blocks: Three blocks of (B, 65, 72): a class token, then the 8 × 8 patches; the head takes the tokens' mean.
            In so small a network, the blocks' outputs represent concepts, while few ``mlp.fc1`` units, which the paper
            dissects in DINO, do.
    """

    def __init__(self, outputs: int = len(CLASSES), width: int = 72, depth: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            convolution(3, 24, kernel=5, stride=2),
            convolution(24, 48, stride=2),
            convolution(48, width, stride=2),
            convolution(width, width),
        )
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 65, width) * 0.02)
        self.blocks = nn.ModuleList(TokenBlock(width, hidden=80, heads=4) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Class logits (B, outputs) of images (B, 3, 64, 64)."""
        patches = self.stem(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls.expand(len(images), -1, -1), patches], dim=1) + self.position
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(self.norm(tokens).mean(dim=1))


class PlantedNet(nn.Module):
    """A network of units with known meaning: a 1×1 convolution over a backbone's whole pyramid, one unit per concept.

    Attributes:
        concepts: Concept of each unit.
        planted: (B, len(concepts), 16, 16), logits of each concept's presence at each position.
    """

    def __init__(self, concepts: tuple[str, ...] = planted_concepts) -> None:
        super().__init__()
        self.concepts = concepts
        self.backbone = ResidualNet()
        del self.backbone.head
        widths = 24 + 48 + 72 + 104
        self.planted = nn.Conv2d(widths, len(concepts), 1)

    def maps(self, images: torch.Tensor) -> torch.Tensor:
        """Concept logits (B, concepts, 16, 16) of images (B, 3, 64, 64)."""
        pyramid = [
            F.adaptive_avg_pool2d(maps, 16)
            if maps.shape[-1] > 16
            else F.interpolate(maps, size=(16, 16), mode="bilinear", align_corners=False)
            for maps in self.backbone.pyramid(images)
        ]
        return self.planted(torch.cat(pyramid, dim=1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The highest logit of each concept over all positions: (B, concepts)."""
        return self.maps(images).amax(dim=(2, 3))


@dataclass(frozen=True)
class Architecture:
    """An architecture of networks to describe.

    Attributes:
        build: Creates a network with fresh weights; ``outputs`` is the number of classes.
        layers: The layers to describe, in order.
    """

    build: Callable[..., nn.Module]
    layers: tuple[str, ...]


ARCHITECTURES: dict[str, Architecture] = {
    "cnn": Architecture(PlainNet, ("conv1", "conv2", "conv3", "conv4")),
    "resnet": Architecture(ResidualNet, ("stem", "layer1", "layer2", "layer3")),
    "vit": Architecture(TokenNet, ("stem", "blocks.0", "blocks.1", "blocks.2")),
}
"""The classifiers, by short name."""


def random_network(architecture: str, seed: int = 300) -> nn.Module:
    """An untrained network of one of the architectures: a control whose units should have no meaning."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ARCHITECTURES[architecture].build()
