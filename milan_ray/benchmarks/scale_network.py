"""Plug-in with networks and an encoder that cost next to nothing.

The shards of the network of five layers are recorded and replayed; that of three layers is what an actor runs.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

from milan_ray.captioner.encoder import register_encoder
from milan_ray.models.registry import register_model
from milan_ray.models.view import Preprocess, View

NAME = "scale/five-layers"
LAYERS = {"1": (64, 16), "3": (64, 16), "5": (128, 8), "7": (256, 4), "9": (512, 4)}
"""Layer → its units, as in a ResNet-18, and the side of its maps."""

THREE = "scale/three-layers"
"""Three convolutions of eight channels over pictures of 16 × 16 pixels."""

ENCODER = "scale"
FEATURES = 512
"""Features of an exemplar; the captioners' own encoders make some thousands."""


def build(weights: str | None) -> nn.Module:
    """Five convolutions of single pixels with the widths of a ResNet-18."""
    torch.manual_seed(0)
    widths = (3, *(units for units, _ in LAYERS.values()))
    strides = (2, 1, 2, 2, 1)
    layers = (
        (nn.Conv2d(*pair, 1, stride=stride), nn.ReLU()) for pair, stride in zip(pairwise(widths), strides, strict=True)
    )
    return nn.Sequential(*(layer for block in layers for layer in block))


def build_three(weights: str | None) -> nn.Module:
    """The network of three layers."""
    torch.manual_seed(0)
    convolutions = (nn.Conv2d(channels, 8, 3, padding=1) for channels in (3, 8, 8))
    return nn.Sequential(*(layer for convolution in convolutions for layer in (convolution, nn.ReLU())))


def build_encoder(weights: str | None) -> nn.Module:
    """The encoder's one convolution."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, FEATURES, 8, stride=8))


register_model(NAME, build, tuple(LAYERS), Preprocess(View(resize=32, crop=32)))
register_model(THREE, build_three, ("1", "3", "5"), Preprocess(View(resize=16, crop=16)))
register_encoder(ENCODER, build_encoder, ("0",), size=32)
