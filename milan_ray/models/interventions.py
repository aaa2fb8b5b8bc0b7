"""Changes of a layer's values: a unit or direction ablated, amplified, and, as a baseline, a random direction."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

ABLATED, AMPLIFIED, RANDOM = CHANGES = ("ablated", "amplified", "random")
"""What is done: the component along the direction is removed; it is multiplied; as much is taken off elsewhere."""


class Interventions:
    """Changes of some units of a layer, or of directions in the place of units.

    A value x at a position has the component (x·d) d along a unit vector d; a unit's d is its axis. With a = x·d, the
    changes are x − a d (ablated), x + (f − 1) a d (amplified by f), and x − a r for a random unit vector r (random),
    which is as long as the ablation at every position.

    Args:
        layer: The layer, or feature set: with the unit, the seed of r.
        units: Numbers of the units or features.
        width: Units of the layer.
        factor: f.
        directions: float32 (F, C), the directions of all features; None for units. A direction of length 0 changes
            nothing.
        device: Where to compute.
    """

    def __init__(
        self,
        layer: str,
        units: Sequence[int],
        width: int,
        factor: float,
        directions: torch.Tensor | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._units, self._are_axes = list(units), directions is None
        own = torch.eye(width)[self._units] if directions is None else _unit_vectors(directions[self._units].float())
        seed = int.from_bytes(hashlib.sha256(layer.encode()).digest()[:8], "little")
        drawn = np.array([np.random.default_rng([seed, unit]).standard_normal(width) for unit in self._units])
        other = _unit_vectors(torch.from_numpy(drawn.reshape(-1, width)).float())
        # (change, unit, C): what is added is scale · a · vector
        self.vectors: torch.Tensor = torch.stack([own, own, other]).to(device or torch.device("cpu"))
        self.scales = torch.tensor([-1.0, factor - 1, -1.0], device=self.vectors.device)

    def amounts(self, values: torch.Tensor) -> torch.Tensor:
        """How much of each direction is in a layer's values.

        Args:
            values: (C, …), for one image.

        Returns:
            float32 (U, P), P positions.
        """
        flat = values.flatten(1) if values.ndim > 1 else values[:, None]
        amounts: torch.Tensor = flat[self._units] if self._are_axes else self.vectors[0] @ flat.float()
        return amounts.to(torch.float32)

    def rows(self, values: torch.Tensor, amounts: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
        """Versions of a layer's values.

        Args:
            values: (C, …), for one image.
            amounts: From :meth:`amounts`.
            pairs: int64 (R, 2): which change of which unit, by its place.

        Returns:
            (R, C, …).
        """
        changes, units = pairs.unbind(1)
        flat = values.flatten(1) if values.ndim > 1 else values[:, None]
        vectors = self.vectors[changes, units]
        added = self.scales[changes, None] * amounts[units]
        rows = flat + (vectors[:, :, None] * added[:, None, :]).to(flat.dtype)
        return rows.view(len(pairs), *values.shape)


def _unit_vectors(vectors: torch.Tensor) -> torch.Tensor:
    lengths = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    scaled: torch.Tensor = vectors / lengths.clamp_min(torch.finfo(torch.float32).tiny)
    return scaled
