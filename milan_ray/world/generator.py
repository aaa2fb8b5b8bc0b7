"""The world's generator: a small network that renders scenes from their codes. Their concept maps are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import nn
from torch.nn import functional as F

from milan_ray.probe.base import ImageRef
from milan_ray.world.networks import convolution
from milan_ray.world.probe import WorldProbe
from milan_ray.world.scenes import COLOURS, GROUNDS, OBJECTS, SIDE, SIGN_WORDS, SKIES, TEXTURES, Scene, Thing

LAYERS = ("layer0", "layer1", "layer2")
"""The generator's layers to describe, in order."""

THINGS = 3
"""Maximum number of objects in a code: one big and two small objects."""

_PLACE = 4  # presence, x, y, size
_THING = _PLACE + 2 + len(OBJECTS) + 2 * len(COLOURS) + len(TEXTURES) + len(SIGN_WORDS)
_BACKGROUND = 1 + 8 + 2 + len(SKIES) + len(GROUNDS)

CODE_SIZE = _BACKGROUND + THINGS * _THING
"""Number of values in a scene's code."""

_OCTAVES = 5
_WAVES = 2 + 4 * _OCTAVES


def scene_code(scene: Scene) -> np.ndarray:
    """Encodes a scene as numbers: the background, then every object, with zeros for missing ones. Omits the noise.

    Returns:
        float32 (CODE_SIZE,), all in [−1, 1].
    """
    tones = (scene.noise % 3 / 2, scene.noise // 3 % 3 / 2)
    drift = [float(scene.drift == step) for step in range(8)]
    numbers = [scene.horizon / SIDE, *drift, *tones, *_one_hot(scene.sky, SKIES), *_one_hot(scene.ground, GROUNDS)]
    for thing in scene.things:
        numbers += _thing_code(thing)
    return np.array(numbers + [0.0] * (CODE_SIZE - len(numbers)), np.float32)


def _thing_code(thing: Thing) -> list[float]:
    return [
        *(1.0, thing.x / SIDE, thing.y / SIDE, thing.size / SIDE, float(thing.flip), thing.tone / 3),
        *_one_hot(thing.kind, OBJECTS),
        *_one_hot(thing.colour, COLOURS),
        *_one_hot(thing.accent, COLOURS),
        *_one_hot(thing.texture, TEXTURES),
        *_one_hot(thing.word, SIGN_WORDS),
    ]


def _one_hot(name: str, names: Sequence[str]) -> list[float]:
    return [float(name == other) for other in names]


class SceneGenerator(nn.Module):
    """Maps codes (B, CODE_SIZE) to images (B, 3, 64, 64), normalised as inputs of the world's networks.

    Every object has its own coordinate frame, whose position on a 16 × 16 grid comes from the code. Convolutions render
    the image from the grid.

    Attributes:
        layer0: (B, 64, 16, 16).
        layer1: (B, 48, 32, 32).
        layer2: (B, 32, 32, 32).
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.frame = nn.Conv2d(_WAVES, width, 1)
        self.kind, self.look = (nn.Linear(_THING - _PLACE, width) for _ in range(2))
        self.shape = nn.Conv2d(width, width, 1)
        self.rows = nn.Conv2d(_WAVES, width, 1)
        self.behind = nn.Linear(_BACKGROUND, width)
        self.layer0 = convolution(2 * width, 64)
        self.layer1 = convolution(64, 48)
        self.layer2 = convolution(48, 32)
        self.paint = nn.Conv2d(32, 12, 1)

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        """Renders scenes from codes."""
        background, things = codes.split([_BACKGROUND, THINGS * _THING], dim=1)
        line = (torch.arange(16, device=codes.device) + 0.5) / 16
        down, across = torch.broadcast_tensors(line[:, None], line)
        below = down - background[:, :1, None]
        behind = F.relu(self.rows(_waves(across.expand_as(below), below)) + self.behind(background)[:, :, None, None])
        there = things.reshape(-1, _THING, 1, 1)
        x, y, size = (there[:, number] for number in (1, 2, 3))
        u, v = ((at - corner) / size.clamp(min=0.01) for at, corner in ((across, x), (down, y)))
        u = torch.where(there[:, _PLACE] > 0, 1 - u, u)  # mirrors the frame with the object
        covered = ((u > -0.1) & (u < 1.1) & (v > -0.1) & (v < 1.1))[:, None] * there[:, :1]
        attributes = there[:, _PLACE:, 0, 0]
        shapes = F.relu(self.frame(_waves(u, v)) + self.kind(attributes)[:, :, None, None])
        shapes = self.shape(shapes) * self.look(attributes)[:, :, None, None] * covered
        front = shapes.view(len(codes), THINGS, *shapes.shape[1:]).sum(dim=1)
        maps = self.layer0(torch.cat([behind, front], dim=1))
        maps = self.layer2(self.layer1(F.interpolate(maps, scale_factor=2.0)))
        return F.pixel_shuffle(self.paint(maps), 2)


def _waves(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Encodes coordinates (N, H, W) as waves (N, _WAVES, H, W), because networks learn edges faster from waves."""
    scaled = [torch.pi * 2.0**octave * axis for axis in (u, v) for octave in range(_OCTAVES)]
    both = [wave(axis) for axis in scaled for wave in (torch.sin, torch.cos)]
    return torch.stack([u, (8 * v).tanh(), *both], dim=1)


def as_they_are(outputs: torch.Tensor) -> torch.Tensor:
    """The generator's images among its outputs: all of them."""
    return outputs


@dataclass(frozen=True)
class CodeProbe:
    """A probe of the codes of the world's scenes, as a generator's latents.

    Attributes:
        scenes: The encoded scenes.
    """

    scenes: WorldProbe

    @property
    def name(self) -> str:
        """The probe's root and name, e.g. ``world:probe+codes``."""
        return f"{self.scenes.name}+codes"

    def manifest(self) -> pa.Table:
        """Lists the scenes; image id, path and scene index are the same number."""
        table = self.scenes.manifest()
        place = table.schema.get_field_index("root")
        return table.set_column(place, table.schema.field(place), pa.array([self.name] * len(table)))

    def latents(self, refs: Sequence[ImageRef]) -> tuple[torch.Tensor, ...]:
        """The codes of some scenes, float32 (len(refs), CODE_SIZE)."""
        return (torch.from_numpy(np.stack([scene_code(self.scenes.scene(int(ref.path))) for ref in refs])),)

    def concept_maps(self, ref: ImageRef) -> dict[str, np.ndarray]:
        """Ground truth of a code: concept name → bool (64, 64), only for visible concepts."""
        return self.scenes.concept_maps(ref)
