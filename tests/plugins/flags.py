"""Images of coloured fields whose concepts are known, and a network that is built to see them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import nn

from milan_ray.models.registry import register_model
from milan_ray.models.view import Preprocess, View
from milan_ray.probe.base import ImageRef, ProbeImage
from milan_ray.probe.manifest import Entry, build
from milan_ray.probe.registry import register_probe

SIDE = 16
COLOURS = ("red", "green", "blue")
TRUTH = ("red", "green", "blue", "red or green", "blue and left")
"""What each unit stands for."""


@dataclass(frozen=True)
class Flags:
    """Noise below half brightness with one field each of some colours; every fifth image has no maps."""

    size: int = 120
    concepts: bool = True

    name = "flags"

    def manifest(self) -> pa.Table:
        return build([Entry("flags:", str(n), etag="1") for n in range(self.size)])

    def draw(self, number: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        rng = np.random.default_rng(number)
        pixels = rng.integers(0, 60, (SIDE, SIDE, 3), dtype=np.uint8)
        left = np.broadcast_to(np.arange(SIDE) < SIDE // 2, (SIDE, SIDE))
        maps = {"left": left, "right": ~left}
        for channel, colour in enumerate(COLOURS):
            row, column = rng.integers(0, SIDE - 5, 2)
            field = np.zeros((SIDE, SIDE), bool)
            field[row : row + 5, column : column + 5] = True
            for other in COLOURS[:channel]:
                field &= ~maps[other]
            pixels[..., channel][field] = rng.integers(150, 256, field.sum())
            maps[colour] = field
        return pixels, maps

    def read(self, ref: ImageRef) -> ProbeImage:
        pixels = self.draw(int(ref.path))[0]
        return ProbeImage(Image.fromarray(pixels), hashlib.sha256(pixels.tobytes()).hexdigest())

    def concept_maps(self, ref: ImageRef) -> dict[str, np.ndarray] | None:
        number = int(ref.path)
        return self.draw(number)[1] if self.concepts and number % 5 else None


class Watcher(nn.Module):
    """Units that fire where a colour is, the last only in the left half."""

    def __init__(self) -> None:
        super().__init__()
        self.colours = nn.Conv2d(3, 5, 1)
        weights = [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 0, 1]]
        with torch.no_grad():
            self.colours.weight.copy_(torch.tensor(weights).view(5, 3, 1, 1))
            self.colours.bias.zero_()
        self.seen = nn.Identity()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.colours(images).clone()
        maps[:, 4, :, SIDE // 2 :] = 0
        return self.seen(maps)


def watcher(weights: str | None) -> nn.Module:
    return Watcher()


register_probe("flags", Flags)
register_probe("flags/unlabelled", partial(Flags, concepts=False))
register_model("flags/watcher", watcher, ("colours", "seen"), Preprocess(View(SIDE, SIDE), (0, 0, 0), (1, 1, 1)))
