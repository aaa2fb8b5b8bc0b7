"""Plug-in with one network of five layers, whose shards are recorded and replayed."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

from milan_ray.models.registry import register_model
from milan_ray.models.view import Preprocess, View

NAME = "scale/five-layers"
LAYERS = {"1": (64, 16), "3": (64, 16), "5": (128, 8), "7": (256, 4), "9": (512, 4)}
"""Layer → its units, as in a ResNet-18, and the side of its maps."""


def build(weights: str | None) -> nn.Module:
    """Five convolutions of single pixels with the widths of a ResNet-18."""
    torch.manual_seed(0)
    widths = (3, *(units for units, _ in LAYERS.values()))
    strides = (2, 1, 2, 2, 1)
    layers = (
        (nn.Conv2d(*pair, 1, stride=stride), nn.ReLU()) for pair, stride in zip(pairwise(widths), strides, strict=True)
    )
    return nn.Sequential(*(layer for block in layers for layer in block))


register_model(NAME, build, tuple(LAYERS), Preprocess(View(resize=32, crop=32)))
