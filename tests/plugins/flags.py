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

from milan_ray.models.concept_truth import ConceptTruth
from milan_ray.models.generators import register_generator
from milan_ray.models.image_text import register_image_text
from milan_ray.models.registry import register_model
from milan_ray.models.segmentation import register_segmenter
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
    """Noise below half brightness with one field each of all colours, or of a share; every fifth image has no maps."""

    size: int = 120
    concepts: bool = True
    share: float = 1.0

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
            field[row : row + 5, column : column + 5] = self.share == 1 or rng.random() < self.share
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
            assert self.colours.bias is not None
            self.colours.bias.zero_()
        self.seen = nn.Identity()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.colours(images).clone()
        maps[:, 4, :, SIDE // 2 :] = 0
        return self.seen(maps)


def watcher(weights: str | None) -> nn.Module:
    return Watcher()


class Fields:
    """A generator: noise below half brightness, with a field of every colour that the text names."""

    name = "flags/fields"

    def identity(self) -> dict[str, object]:
        return {"fields": 1}

    def to(self, device: torch.device) -> Fields:
        return self

    def generate(self, text: str, count: int, seed: int) -> np.ndarray:
        rng = np.random.default_rng([seed, *text.encode()])
        images = rng.integers(0, 60, (count, SIDE, SIDE, 3), dtype=np.uint8)
        for channel, colour in enumerate(COLOURS):
            if colour in text.split():
                images[:, 2:8, 2:8, channel] = rng.integers(150, 256, (count, 6, 6))
        return images


class BrightFields:
    """A segmentation network: each colour is where its channel is bright."""

    def identity(self) -> str:
        return "bright"

    def maps(self, image: Image.Image) -> dict[str, np.ndarray]:
        pixels = np.asarray(image)
        shown: dict[str, np.ndarray] = {}
        for channel, colour in enumerate(COLOURS):
            shown[colour] = (pixels[..., channel] >= 150) & ~np.any([*shown.values(), np.zeros((SIDE, SIDE), bool)], 0)
        return shown


register_generator("flags/fields", Fields)
register_segmenter("flags/bright", BrightFields)
register_probe("flags", Flags)
register_probe("flags/some", partial(Flags, 400, share=0.4))
register_probe("flags/unlabelled", partial(Flags, concepts=False))
register_model("flags/watcher", watcher, ("colours", "seen"), Preprocess(View(SIDE, SIDE), (0, 0, 0), (1, 1, 1)))
register_image_text(
    "flags/truth", partial(ConceptTruth, (*COLOURS, "left"), lambda text: set(text.split()), "1"), COLOURS
)
