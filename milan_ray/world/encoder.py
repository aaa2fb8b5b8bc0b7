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
    """A residual network for images (B, 3, 64, 64) whose maps the captioner pools.

    It replaces the ImageNet-pretrained network of the paper (§3.2). It is trained on image-level labels (the class, and
    which concepts occur anywhere), with its own seed, scenes and widths. It is not trained on concept positions or
    annotations.
    """

    def __init__(self) -> None:
        super().__init__(len(CLASSES), WIDTHS)
        # Normalises all levels to one scale: a decoder needs a fifth of the epochs that it needs on raw ReLU outputs.
        self.levels = nn.ModuleList(nn.BatchNorm2d(width, affine=False) for width in WIDTHS)
        self.occurs = nn.Conv2d(WIDTHS[-1], len(NAMES), 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Class logits, then one logit for the occurrence of each concept: (B, classes + concepts)."""
        maps = [level(maps) for level, maps in zip(self.levels, self.pyramid(images), strict=True)][-1]
        return torch.cat([self.head(maps.mean(dim=(2, 3))), self.occurs(maps).amax(dim=(2, 3))], dim=1)
