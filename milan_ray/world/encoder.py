"""The world's own image encoder for the captioner."""

from __future__ import annotations

import torch
from torch import nn

from milan_ray.world.lexicon import NAMES
from milan_ray.world.networks import CLASSES, ResidualNet

LAYERS = ("levels.0", "levels.1", "levels.2", "levels.3")
"""Layers of the feature pyramid."""

WIDTHS = (32, 64, 96, 128)


class EncoderNet(ResidualNet):
    """A residual net for images (B, 3, 64, 64) whose maps the captioner pools.

    It plays the part that ImageNet pretraining has in the paper (§3.2): trained on image-level labels (the class, and
    which concepts occur somewhere), with seed, scenes and widths of its own, never on where a concept is nor on any
    annotation.
    """

    def __init__(self) -> None:
        super().__init__(len(CLASSES), WIDTHS)
        # Levels of one scale: a decoder takes a fifth of the epochs that it needs on raw ReLU outputs.
        self.levels = nn.ModuleList(nn.BatchNorm2d(width, affine=False) for width in WIDTHS)
        self.occurs = nn.Conv2d(WIDTHS[-1], len(NAMES), 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Class logits, then one logit per concept for "it occurs": (B, classes + concepts)."""
        maps = [level(maps) for level, maps in zip(self.levels, self.pyramid(images), strict=True)][-1]
        return torch.cat([self.head(maps.mean(dim=(2, 3))), self.occurs(maps).amax(dim=(2, 3))], dim=1)
