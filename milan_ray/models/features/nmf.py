"""Non-negative matrix factorisation of a layer's outputs, with multiplicative updates (Lee and Seung 2001).

Outputs x ≥ 0 become non-negative sums of F non-negative parts: x ≈ z·D, z ≥ 0. Codes are not stored. Each pass computes
them anew for the parts so far, and keeps what they add up to, Σ zᵀz and Σ zᵀx, which is all that new parts need.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from milan_ray.models.features.dictionary import Dictionary, Weights

CODE_UPDATES = 100
"""Updates of the codes of a position."""

PART_UPDATES = 100
"""Updates of the parts after a pass."""

_LEAST = 1e-12
"""What is divided by at least."""


def codes(x: torch.Tensor, parts: torch.Tensor, updates: int = CODE_UPDATES) -> torch.Tensor:
    """Non-negative codes of outputs: z ← z · (x·Dᵀ) / (z·D·Dᵀ), from equal shares.

    Args:
        x: (N, C), at least 0.
        parts: (F, C), at least 0.
        updates: Number of updates; the error of no position grows in any.

    Returns:
        (N, F).
    """
    wanted, products = x @ parts.T, parts @ parts.T
    share = x.sum(dim=1, keepdim=True) / parts.sum().clamp_min(_LEAST)
    z = share.expand(len(x), len(parts)).clone()
    for _ in range(updates):
        z *= wanted / (z @ products).clamp_min(_LEAST)
    return z


class PartSums:
    """Mergeable state of a pass: Σ zᵀz, Σ zᵀx, and the error, in float64.

    Args:
        count: Number of parts F.
        width: Units of the layer C.
        device: Device of the state: adding to it makes no host wait.
    """

    def __init__(self, count: int, width: int, device: str | torch.device = "cpu") -> None:
        self.products = torch.zeros(count, count, dtype=torch.float64, device=device)
        self.wanted = torch.zeros(count, width, dtype=torch.float64, device=device)
        self.error = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, x: torch.Tensor, parts: torch.Tensor) -> None:
        """Adds outputs (N, C), coded with parts (F, C)."""
        z = codes(x, parts)
        self.error += (x - z @ parts).double().square().sum()
        z = z.double()
        self.products += z.T @ z
        self.wanted += z.T @ x.double()

    def merge(self, state: Mapping[str, np.ndarray]) -> None:
        """Adds another state."""
        for name, own in vars(self).items():
            own += torch.from_numpy(state[name].copy()).reshape(own.shape).to(own.device)

    def state(self) -> dict[str, np.ndarray]:
        """The state as arrays, for :meth:`merge`."""
        return {name: np.atleast_1d(own.cpu().numpy()) for name, own in vars(self).items()}

    def updated(self, parts: torch.Tensor, updates: int = PART_UPDATES) -> torch.Tensor:
        """New parts for the codes that were added: D ← D · Σzᵀx / (Σzᵀz·D); the error of these codes grows in none.

        Rows get unit length: codes take it up when they are computed anew.

        Args:
            parts: float32 (F, C), those that the outputs were coded with.
            updates: Number of updates.
        """
        new = parts.double()
        for _ in range(updates):
            new = new * (self.wanted / (self.products @ new).clamp_min(_LEAST))
        norms = new.norm(dim=1, keepdim=True)
        # A part that no position uses stays as it was.
        return torch.where(norms > _LEAST, new / norms.clamp_min(_LEAST), parts.double()).float()


def first_parts(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Parts to start from: outputs that are far from each other, and a little of every unit.

    Each is the output that is worst covered by the parts so far, by the angle between them.

    Args:
        rows: (N, C), outputs of which parts are taken, at least 0.
        count: Number of parts.

    Returns:
        float32 (F, C), unit rows, above 0.
    """
    rows = rows[rows.norm(dim=1) > 0].double()
    if not len(rows):
        rows = torch.ones(1, rows.shape[1], dtype=torch.float64)
    unit = rows / rows.norm(dim=1, keepdim=True)
    chosen = [int(rows.norm(dim=1).argmax())]
    near = unit @ unit[chosen[0]]
    for _ in range(count - 1):
        chosen.append(int(near.argmin()))
        near = torch.maximum(near, unit @ unit[chosen[-1]])
    parts = unit[chosen]
    # An entry of 0 would stay 0, whatever is added up.
    parts = parts + 0.1 * parts.mean(dim=1, keepdim=True)
    found: torch.Tensor = parts / parts.norm(dim=1, keepdim=True)
    return found.float()


def part_dictionary(parts: torch.Tensor) -> Dictionary:
    """Parts as a dictionary whose codes are max(x·D⁺, 0): the least-squares codes, without what is below zero.

    They are the codes of the factorisation where an output is a non-negative sum of independent parts, and near them
    elsewhere; a dictionary cannot repeat updates.

    Args:
        parts: (F, C).
    """
    inverse: torch.Tensor = torch.linalg.pinv(parts.double())
    return Dictionary(Weights(inverse.T.float(), parts.float()), "relu")
