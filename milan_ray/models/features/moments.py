"""Means and second moments of a layer's outputs, which merge."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch


class Moments:
    """Mergeable state: number, mean and scatter of outputs, and how far down they go, in float64.

    Batches are centred before they are multiplied (Chan, Golub and LeVeque 1979), so that a mean far from zero costs no
    digits. States merged in another order, or of other batches, agree to about twelve digits.

    Args:
        width: Units of the layer C.
        device: Device of the state: adding to it makes no host wait.

    Attributes:
        positions: Outputs that were added.
        mean: float64 (C,).
        scatter: float64 (C, C): Σ (x − mean)(x − mean)ᵀ.
        least: float64 (), the least value; NaN where a value is.
    """

    def __init__(self, width: int, device: str | torch.device = "cpu") -> None:
        self.positions = 0
        self.mean = torch.zeros(width, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.least = torch.full((), torch.inf, dtype=torch.float64, device=device)

    def add(self, x: torch.Tensor) -> None:
        """Adds outputs (N, C)."""
        if not len(x):
            return
        x = x.to(torch.float64)
        mean = x.mean(dim=0)
        centred = x - mean
        self._add(len(x), mean, centred.T @ centred, x.min())

    def merge(self, other: Moments) -> None:
        """Adds another state."""
        device = self.mean.device
        if other.positions:
            self._add(other.positions, other.mean.to(device), other.scatter.to(device), other.least.to(device))

    def _add(self, positions: int, mean: torch.Tensor, scatter: torch.Tensor, least: torch.Tensor) -> None:
        total = self.positions + positions
        apart = mean - self.mean
        self.mean = self.mean + apart * (positions / total)
        self.scatter = self.scatter + scatter + torch.outer(apart, apart) * (self.positions * positions / total)
        self.least = torch.minimum(self.least, least)
        self.positions = total

    @property
    def variance(self) -> float:
        """Mean of ‖x − mean‖²; 0 without outputs."""
        return float(self.scatter.trace()) / self.positions if self.positions else 0.0

    def state(self) -> dict[str, np.ndarray]:
        """The state as arrays, for :meth:`of_state`."""
        return {
            "positions": np.array([self.positions], np.int64),
            "mean": self.mean.cpu().numpy(),
            "scatter": self.scatter.cpu().numpy(),
            "least": self.least.cpu().numpy().reshape(1),
        }

    @classmethod
    def of_state(cls, state: Mapping[str, np.ndarray]) -> Moments:
        """The moments that :meth:`state` was called on, on the CPU."""
        moments = cls(len(state["mean"]))
        moments.positions = int(state["positions"][0])
        moments.mean, moments.scatter = (torch.from_numpy(state[name].copy()) for name in ("mean", "scatter"))
        moments.least = torch.tensor(float(state["least"][0]), dtype=torch.float64)
        return moments
