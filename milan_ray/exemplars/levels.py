"""Levels: the activation quantile above which a position belongs to a unit's mask (paper §3; REFERENCE §1.2).

A level lies near the top of a unit's activations, so a state needs to keep only the highest ones: with N positions
planned in all, the largest ⌈(1−q)·N⌉ + 2 settle the q-quantile exactly. Keeping a multiset's largest values commutes
with splitting and merging it, so the result is exact for the counted positions, whatever the shards; there is no
sketch error, only the sampling error of very large probes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch


def positions_per_image(images: int, positions: int, samples: int) -> int:
    """How many of a map's positions to count on each image.

    Args:
        images: Images in the probe.
        positions: Positions of one map, h·w.
        samples: Positions per unit wanted in all.

    Returns:
        ``positions`` when all of them together are no more than ``samples``, else enough to reach it.
    """
    return min(positions, max(1, math.ceil(samples / max(1, images))))


def sample_positions(image_ids: np.ndarray, count: int, positions: int) -> np.ndarray:
    """A fixed pseudo-random choice of positions for each image: one from each of ``count`` equal strata.

    Args:
        image_ids: int64 (B,). The choice depends on the id alone, never on shard, batch or order.
        count: Positions to choose, at most ``positions``.
        positions: Positions to choose from.

    Returns:
        int64 (B, count), ascending and distinct within a row.
    """
    strata = np.arange(count, dtype=np.uint64)
    with np.errstate(over="ignore"):
        mixed = _splitmix64(image_ids.astype(np.uint64)[:, None] * np.uint64(0x9E3779B97F4A7C15) + strata)
    uniform = (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53
    low = np.arange(count) * positions // count
    width = (np.arange(count) + 1) * positions // count - low
    return (low + np.floor(uniform * width)).astype(np.int64)


def _splitmix64(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al. 2014): a bijection of 64-bit integers that scrambles well."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass
class RunningLevel:
    """Per unit, the largest activations seen and how many were counted.

    Attributes:
        quantile: q, e.g. 0.99.
        capacity: Largest values kept per unit.
        tail: float32 (U, ≤ capacity), unordered; −inf where fewer were finite.
        counted: int64 (U,), finite activations seen.
        nonfinite: int64 (U,), NaN and infinite activations left out.
    """

    quantile: float
    capacity: int
    tail: torch.Tensor
    counted: torch.Tensor
    nonfinite: torch.Tensor

    @classmethod
    def empty(cls, units: int, quantile: float, planned: int, device: str | torch.device = "cpu") -> RunningLevel:
        """The state before any activation.

        Args:
            units: Number of units U.
            quantile: q in (0, 1].
            planned: Upper bound of the positions that will be counted per unit, over all shards.
            device: Where the state lives.
        """
        capacity = min(planned, math.ceil((1 - quantile) * planned) + 2)
        zeros = torch.zeros(units, dtype=torch.int64, device=device)
        return cls(quantile, capacity, torch.empty((units, 0), device=device), zeros, zeros.clone())

    def update(self, activations: torch.Tensor) -> None:
        """Counts activations float32 (U, n), contiguous; they may be reordered in place."""
        counted = torch.full_like(self.counted, activations.shape[1])
        # A finite sum proves all finite in one cheap pass; an overflowing one only costs the closer look.
        if not bool(torch.isfinite(activations.sum())):
            finite = torch.isfinite(activations)
            counted = finite.sum(dim=1)
            activations = activations.masked_fill(~finite, -torch.inf)
            self.nonfinite = self.nonfinite + activations.shape[1] - counted
        self.counted = self.counted + counted
        self._keep(activations)

    def merge(self, other: RunningLevel) -> None:
        """Adds another state's activations (of the same quantile and capacity)."""
        if (self.quantile, self.capacity) != (other.quantile, other.capacity):
            raise ValueError("levels of different plans cannot be merged")
        self.counted = self.counted + other.counted
        self.nonfinite = self.nonfinite + other.nonfinite
        self._keep(other.tail)

    def _keep(self, values: torch.Tensor) -> None:
        values = torch.cat([self.tail, _largest(values, self.capacity)], dim=1)
        self.tail = _largest(values, self.capacity)

    def sorted_tail(self) -> torch.Tensor:
        """The kept activations, descending (U, ≤ capacity): the same for every order of the updates."""
        return torch.sort(self.tail, dim=1, descending=True).values

    def result(self) -> torch.Tensor:
        """The levels, float32 (U,): the Hazen quantile, as the reference's sketch has it while it is exact.

        Returns:
            NaN for units without a finite activation.
        """
        tail = self.sorted_tail().to("cpu", torch.float64).numpy()
        counted = self.counted.cpu().numpy()
        place = np.clip(self.quantile * counted - 0.5, 0, np.maximum(counted - 1, 0))
        low = np.floor(place).astype(np.int64)
        high = np.minimum(low + 1, np.maximum(counted - 1, 0))
        rows = np.arange(len(tail))
        empty = counted == 0
        if tail.shape[1] == 0:
            return torch.full((len(tail),), torch.nan)
        # The i-th smallest of n is the (n−1−i)-th largest.
        lower, upper = (tail[rows, np.where(empty, 0, counted - 1 - place_)] for place_ in (low, high))
        weight = place - low
        with np.errstate(invalid="ignore"):  # −inf of empty units
            levels = np.where(weight > 0, lower + (upper - lower) * weight, lower)
        return torch.from_numpy(np.where(empty, np.nan, levels).astype(np.float32))


def _largest(values: torch.Tensor, count: int) -> torch.Tensor:
    """The ``count`` largest of each row, or all when there are fewer, in any order; may reorder ``values``."""
    surplus = values.shape[1] - count
    if surplus <= 0:
        return values
    if values.device.type == "cpu":
        # numpy's vectorised selection is several times faster than torch.topk on long rows.
        values.numpy().partition(surplus, axis=1)
        return values[:, surplus:]
    return torch.topk(values, count, dim=1, sorted=False).values
