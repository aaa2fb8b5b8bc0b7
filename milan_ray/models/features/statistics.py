"""The customary figures of a dictionary: L0, dead share, explained variance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch

_ROWS = 4096
"""Positions that are reconstructed at a time where codes are dense."""


class FeatureStatistics:
    """Mergeable state: how often features fire, and how far reconstructions are from the outputs.

    Counts are exact for any split into batches and states. Sums of squares are float64, so that explained variances of
    different splits agree to about twelve digits.

    Args:
        count: Number of features F.
        width: Units of the layer C.
        device: Device of the state: adding to it makes no host wait, the figures do.
    """

    def __init__(self, count: int, width: int, device: str | torch.device = "cpu") -> None:
        self.count, self.width = count, width
        self._positions = 0
        self._compared = 0
        self._fired = torch.zeros(count, dtype=torch.int64, device=device)
        self._sum = torch.zeros(width, dtype=torch.float64, device=device)
        self._squares = torch.zeros((), dtype=torch.float64, device=device)
        self._errors = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, codes: torch.Tensor) -> None:
        """Counts the features that fire, of dense codes (N, F)."""
        self._positions += len(codes)
        self._fired += (codes != 0).sum(dim=0)

    def add_sparse(self, values: torch.Tensor, indices: torch.Tensor) -> None:
        """Counts the features that fire, of codes (N, k) and their features, int64 (N, k)."""
        self._positions += len(values)
        self._fired.scatter_add_(0, indices.flatten(), (values != 0).flatten().to(torch.int64))

    def add_reconstruction(self, x: torch.Tensor, reconstruction: torch.Tensor) -> None:
        """Compares reconstructions (N, C) with the outputs (N, C)."""
        x = x.to(torch.float64)
        self._compared += len(x)
        self._sum += x.sum(dim=0)
        self._squares += x.square().sum()
        self._errors += (x - reconstruction).square().sum()

    def merge(self, other: FeatureStatistics) -> None:
        """Adds another state of the same dictionary.

        Raises:
            ValueError: It is of another size.
        """
        if (self.count, self.width) != (other.count, other.width):
            raise ValueError("statistics of different dictionaries cannot be merged")
        self._positions += other._positions
        self._compared += other._compared
        for name in ("_fired", "_sum", "_squares", "_errors"):
            own = getattr(self, name)
            own += getattr(other, name).to(own.device)

    def state(self) -> dict[str, np.ndarray]:
        """The state as arrays, for :meth:`of_state`."""
        return {
            "positions": np.array([self._positions, self._compared], np.int64),
            "fired": self._fired.cpu().numpy(),
            "sum": self._sum.cpu().numpy(),
            "squares": torch.stack([self._squares, self._errors]).cpu().numpy(),
        }

    @classmethod
    def of_state(cls, state: Mapping[str, np.ndarray]) -> FeatureStatistics:
        """The statistics that :meth:`state` was called on, on the CPU."""
        statistics = cls(len(state["fired"]), len(state["sum"]))
        statistics._positions, statistics._compared = (int(number) for number in state["positions"])
        statistics._fired = torch.from_numpy(state["fired"].copy())
        statistics._sum = torch.from_numpy(state["sum"].copy())
        statistics._squares, statistics._errors = torch.from_numpy(state["squares"].copy()).unbind()
        return statistics

    @property
    def positions(self) -> int:
        """Positions whose codes were counted."""
        return self._positions

    @property
    def fired(self) -> torch.Tensor:
        """Positions at which each feature fires, int64 (F,)."""
        return self._fired

    @property
    def l0(self) -> float:
        """Mean number of features that fire at a position; NaN without positions."""
        return int(self._fired.sum()) / self._positions if self._positions else float("nan")

    @property
    def dead_share(self) -> float:
        """Share of features that fire nowhere; NaN without positions."""
        return int((self._fired == 0).sum()) / self.count if self._positions else float("nan")

    @property
    def explained_variance(self) -> float:
        """1 − Σ‖x − x̂‖² / Σ‖x − mean x‖²; NaN where all outputs are the same, or nothing was compared."""
        if not self._compared:
            return float("nan")
        squares, mean = float(self._squares), self._sum / self._compared
        variance = squares - self._compared * float(mean.square().sum())
        # What is left of outputs that are all the same is the rounding of their squares.
        if variance <= 1e-13 * squares:
            return float("nan")
        return 1 - float(self._errors) / variance


class Reconstructing(Protocol):
    """What has a reconstruction, such as a dictionary."""

    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        """Computes x̂ (N, C) of a layer's outputs (N, C)."""
        ...


def explained_variance(dictionary: Reconstructing, x: torch.Tensor) -> float:
    """Explained variance of a dictionary on a layer's outputs.

    Args:
        dictionary: The dictionary, on the device of ``x``.
        x: (N, C), outputs at N positions.

    Returns:
        1 − Σ‖x − x̂‖² / Σ‖x − mean x‖²: 1 for equal reconstructions, 0 for those no better than the mean, below 0 for a
        dictionary of another layer or with another normalisation. NaN where all outputs are the same.
    """
    statistics = FeatureStatistics(0, x.shape[1], x.device)
    with torch.inference_mode():
        for rows in x.split(_ROWS):
            statistics.add_reconstruction(rows, dictionary.reconstruct(rows))
    return statistics.explained_variance
