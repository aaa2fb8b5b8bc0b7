"""A network in superposition: more concepts than channels, as known directions, so that every single unit is mixed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save
from torch import nn
from torch.nn import functional as F

from milan_ray.errors import MilanError
from milan_ray.storage.atomic import replace_file
from milan_ray.world.lexicon import names_of
from milan_ray.world.networks import PlantedNet, planted_concepts

superposed_concepts: tuple[str, ...] = tuple(
    name for name in planted_concepts if name in names_of("object", "face", "colour", "texture", "relation")
)
"""Concepts of the directions: row ``i`` of :func:`directions` is the direction of concept ``i``.

Parts and backgrounds are left out. A roof is always a house, too, and a dusk is always purple: no method can tell the
direction of the one from the sum of both. Of the concepts that are left, none implies another.
"""

CHANNELS = 18
"""Width of layer ``superposed``: two channels for three concepts."""

_STEEPNESS = 4.0
_PASSES = 100


def directions(features: int = len(superposed_concepts), channels: int = CHANNELS, seed: int = 0) -> np.ndarray:
    """Constructs nearly orthogonal directions of unit length.

    All entries are ±1/√C, so that every channel is part of every direction, to the same amount. Signs are flipped, one
    at a time, as long as that lowers Σ ⟨a, b⟩⁶ over pairs. This is integer arithmetic, so all machines get the same.

    Args:
        features: Number of directions F.
        channels: Width of the layer C, at least 2.
        seed: Seed of the signs to begin with.

    Returns:
        float32 (F, C).

    Raises:
        ValueError: There are fewer than one direction or two channels.
    """
    if features < 1 or channels < 2:
        raise ValueError(f"{features} directions of {channels} channels: at least 1 of 2 are needed")
    signs = np.random.RandomState(seed).randint(0, 2, (features, channels)).astype(np.int64) * 2 - 1
    products = signs @ signs.T
    np.fill_diagonal(products, 0)
    for _ in range(_PASSES):
        if sum(_improve(signs, products, row) for row in range(features)) == 0:
            break
    matrix: np.ndarray = (signs / np.sqrt(channels)).astype(np.float32)
    return matrix


def _improve(signs: np.ndarray, products: np.ndarray, row: int) -> bool:
    """Flips signs of one direction in place while that brings it away from the others; returns whether it did."""
    changed = False
    while True:
        flipped = products[row] - 2 * signs[row][:, None] * signs.T  # (C, F): its products after each flip
        flipped[:, row] = 0
        costs = (flipped**6).sum(axis=1)
        best = int(costs.argmin())
        if costs[best] >= (products[row] ** 6).sum():
            return changed
        signs[row, best] *= -1
        products[row] = products[:, row] = flipped[best]
        changed = True


def write_directions(path: str | Path) -> None:
    """Writes the directions of ``world/superposed`` as a plain matrix, float32 (F, C).

    Args:
        path: File to write: ``.npy``, or ``.safetensors`` with the tensor ``directions`` and the concepts' names, one
            per line, as metadata ``names``.

    Raises:
        MilanError: The file's name ends otherwise.
    """
    path = Path(path)
    if path.suffix == ".npy":
        replace_file(path, lambda stream: np.save(stream, directions()))
    elif path.suffix == ".safetensors":
        data = save({"directions": directions()}, {"names": "\n".join(superposed_concepts)})
        replace_file(path, lambda stream: stream.write(data))
    else:
        raise MilanError(f"{path} would be a matrix of unknown format; let its name end with .npy or .safetensors.")


class SuperposedNet(PlantedNet):
    """A network whose concepts share a bottleneck that is narrower than their number.

    Attributes:
        planted: (B, len(superposed_concepts), 16, 16), logits of each concept's presence at each position.
        superposed: (B, CHANNELS, 16, 16), at each position the sum over concepts of :meth:`activations` × direction.
        readout: (B, len(superposed_concepts), 16, 16), the product of each direction with the layer before.
    """

    def __init__(self) -> None:
        super().__init__(superposed_concepts)
        matrix = torch.from_numpy(directions())
        features, channels = matrix.shape
        self.superposed = nn.Conv2d(features, channels, 1, bias=False)
        self.readout = nn.Conv2d(channels, features, 1, bias=False)
        self.superposed.weight = nn.Parameter(matrix.T.contiguous()[:, :, None, None], requires_grad=False)
        self.readout.weight = nn.Parameter(matrix[:, :, None, None].clone(), requires_grad=False)

    def activations(self, images: torch.Tensor) -> torch.Tensor:
        """How much each concept is on at each position, 0 to 1: (B, concepts, 16, 16) of images (B, 3, 64, 64)."""
        return active(self.maps(images))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The highest readout of each concept over all positions: (B, concepts)."""
        read: torch.Tensor = self.readout(self.superposed(self.activations(images)))
        return read.amax(dim=(2, 3))


def active(logits: torch.Tensor) -> torch.Tensor:
    """A concept's activation from its logit: exactly 0 below −2, 1 above 2, straight in between."""
    return F.hardtanh(logits / _STEEPNESS + 0.5, 0.0, 1.0)
