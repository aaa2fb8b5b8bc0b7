"""Plug-in with a zoo of small untrained networks of one view, for benchmarks."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import torch
from torch import nn

from milan_ray.models.registry import register_model
from milan_ray.models.view import Preprocess, View

NETWORKS = tuple(f"small/{seed}" for seed in range(12))
"""Their names."""


def build(seed: int, weights: str | None) -> nn.Module:
    """Three convolutions, of which each halves the sides of its input."""
    torch.manual_seed(seed)
    widths = (3, 16, 32, 64)
    layers = ((nn.Conv2d(*pair, 3, stride=2, padding=1), nn.ReLU()) for pair in pairwise(widths))
    return nn.Sequential(*(layer for block in layers for layer in block))


for number, name in enumerate(NETWORKS):
    register_model(name, partial(build, number), ("1", "3", "5"), Preprocess(View(resize=72, crop=64)))
