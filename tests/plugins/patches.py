"""Images of twelve places that are bright or dark, a network whose units see one place each, and untrained ones."""

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
from milan_ray.models.image_text import register_image_text
from milan_ray.models.registry import register_model
from milan_ray.models.view import Preprocess, View
from milan_ray.probe.base import ImageRef, ProbeImage
from milan_ray.probe.manifest import Entry, build
from milan_ray.probe.registry import register_probe

SIDE = 16
PLACES = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
UNITS = (*PLACES, *PLACES)
"""What each unit of ``patches/watcher`` sees: two units a place; a last unit never changes."""


def masks() -> np.ndarray:
    """float32 (12, 16, 16), where each place is."""
    places = np.zeros((12, SIDE, SIDE), np.float32)
    for place in range(12):
        row, column = divmod(place, 4)
        places[place, row * 5 : (row + 1) * 5 + row // 2, column * 4 : column * 4 + 4] = 1
    return places


@dataclass(frozen=True)
class Patches:
    """Noise; each place is bright in a quarter of the images."""

    size: int = 200

    name = "patches"

    def manifest(self) -> pa.Table:
        return build([Entry("patches:", str(n), etag="1") for n in range(self.size)])

    def shown(self, number: int) -> np.ndarray:
        return np.random.default_rng([7, number]).random(12) < 0.25

    def read(self, ref: ImageRef) -> ProbeImage:
        rng = np.random.default_rng([1, int(ref.path)])
        bright = (masks() * self.shown(int(ref.path))[:, None, None]).sum(axis=0) * 120
        pixels = (rng.integers(0, 100, (SIDE, SIDE)) + bright * rng.uniform(0.8, 1.2)).astype(np.uint8)
        image = np.repeat(pixels[..., None], 3, axis=2)
        return ProbeImage(Image.fromarray(image), hashlib.sha256(image.tobytes()).hexdigest())

    def concept_maps(self, ref: ImageRef) -> dict[str, np.ndarray]:
        shown = self.shown(int(ref.path))
        return {name: masks()[place] > 0 for place, name in enumerate(PLACES) if shown[place]}


class Watcher(nn.Module):
    """Units that see some places each, and one whose activation never changes."""

    def __init__(self, weights: np.ndarray) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.from_numpy(weights.astype(np.float32)))
        self.register_buffer("places", torch.from_numpy(masks()))
        self.seen, self.head = nn.Identity(), nn.Identity()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = torch.einsum("up,phw->uhw", self.weights, self.places) * images.mean(dim=1, keepdim=True)
        maps = self.seen(torch.cat([maps, torch.zeros_like(maps[:, :1])], dim=1))
        return self.head(maps.mean(dim=(2, 3)))


def trained(weights: str | None) -> nn.Module:
    return Watcher(np.concatenate([np.eye(12), 0.5 * np.eye(12)]))


def untrained(seed: int, weights: str | None) -> nn.Module:
    return Watcher(np.random.default_rng(seed).normal(size=(24, 12)))


def named(text: str) -> set[str]:
    return set(text.split()) & set(PLACES)


view = Preprocess(View(SIDE, SIDE), (0, 0, 0), (1, 1, 1))
register_probe("patches", Patches)
register_image_text("patches/truth", partial(ConceptTruth, PLACES, named, "1"), PLACES)
classes = (*UNITS, "nothing")
register_model("patches/watcher", trained, ("seen",), view, classes=classes)
register_model("patches/twin", trained, ("seen",), view, classes=classes)
for number in (1, 2):
    register_model(f"patches/untrained-{number}", partial(untrained, number), ("seen",), view, classes=classes)
