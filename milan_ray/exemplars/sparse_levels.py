"""Levels of activations that are mostly zero: only what lies above zero is kept, in one list for all units."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch


@dataclass
class SparseLevel:
    """Mergeable state, as :class:`~milan_ray.exemplars.levels.RunningLevel`, for activations that are never below zero.

    Zeros are counted and not kept. What is kept takes memory by its number: a unit that is always on does not widen a
    table of all units.

    Attributes:
        quantile: q, e.g. 0.99.
        capacity: Largest values kept per unit.
        lower_bound: float32 (U,); values at or below it are not kept; zero until a unit has more than it may keep.
        counted: int64 (U,), number of finite activations.
        nonfinite: int64 (U,), number of NaN and infinite activations, which are left out.
    """

    quantile: float
    capacity: int
    lower_bound: torch.Tensor
    counted: torch.Tensor
    nonfinite: torch.Tensor
    _kept: np.ndarray
    """int64 (U,), number of values of each unit."""
    _units: list[np.ndarray] = field(default_factory=list)
    _values: list[np.ndarray] = field(default_factory=list)

    @classmethod
    def empty(cls, units: int, quantile: float, planned: int) -> SparseLevel:
        """The state before any activation.

        Args:
            units: Number of units U.
            quantile: q in (0, 1].
            planned: Upper bound of the positions that will be counted per unit, over all shards.
        """
        capacity = min(planned, math.ceil((1 - quantile) * planned) + 2)
        zeros = torch.zeros(units, dtype=torch.int64)
        return cls(quantile, capacity, torch.zeros(units), zeros, zeros.clone(), np.zeros(units, np.int64))

    def update(self, activations: torch.Tensor, known: torch.Tensor | None = None) -> None:
        """Counts activations.

        Args:
            activations: float32 (m, U, n), contiguous: m·n per unit.
            known: (U,), another state's :attr:`lower_bound`; smaller values are skipped. Values equal to it are kept.
        """
        values = activations.numpy()
        hits = np.flatnonzero(values > self._bound(known)[:, None])
        if not np.isfinite(values.sum()):
            hits = np.union1d(hits, np.flatnonzero(~np.isfinite(values)))
        units = hits // values.shape[2] % values.shape[1]
        self.update_found(units, values.reshape(-1)[hits], values.shape[0] * values.shape[2], known)

    def update_found(
        self, units: np.ndarray, values: np.ndarray, per_unit: int, known: torch.Tensor | None = None
    ) -> None:
        """Counts activations of which those that are not given are zero, or below the bounds.

        Args:
            units: int64 (n,).
            values: float32 (n,), their activations.
            per_unit: Number of positions that are counted, for each unit.
            known: As for :meth:`update`.
        """
        broken = ~np.isfinite(values)
        lost = np.bincount(units[broken], minlength=len(self._kept)) if broken.any() else np.zeros_like(self._kept)
        self.nonfinite = self.nonfinite + torch.from_numpy(lost)
        self.counted = self.counted + (per_unit - torch.from_numpy(lost))
        self._keep(units, values, self._bound(known), broken)

    def merge(self, other: SparseLevel) -> None:
        """Adds another state's activations (of the same quantile and capacity)."""
        if (self.quantile, self.capacity) != (other.quantile, other.capacity):
            raise ValueError("levels of different plans cannot be merged")
        self.counted = self.counted + other.counted
        self.nonfinite = self.nonfinite + other.nonfinite
        for units, values in zip(other._units, other._values, strict=True):
            self._keep(units, values, self._bound(None), np.zeros(len(values), bool))

    def trim(self) -> None:
        """Drops values beyond the capacity, and raises the lower bounds of the units that had more."""
        full = self._kept > self.capacity
        if not full.any():
            return
        units, values = np.concatenate(self._units), np.concatenate(self._values)
        of_full = full[units]
        rest = [units[~of_full]], [values[~of_full]]
        own, amounts = units[of_full], values[of_full]
        order = np.lexsort((-amounts, own))
        own, amounts = own[order], amounts[order]
        starts = np.concatenate([[0], np.cumsum(self._kept[full])])
        rank = np.arange(len(own)) - np.repeat(starts[:-1], self._kept[full])
        chosen = rank < self.capacity
        bound = self.lower_bound.numpy().copy()
        if self.capacity:
            last = rank == self.capacity - 1
            bound[own[last]] = np.maximum(bound[own[last]], amounts[last])
        self.lower_bound = torch.from_numpy(bound)
        self._units, self._values = [*rest[0], own[chosen]], [*rest[1], amounts[chosen]]
        self._kept = np.where(full, self.capacity, self._kept)

    def sorted_values(self) -> tuple[np.ndarray, np.ndarray]:
        """The kept activations, unit by unit and descending, float32, and each unit's number of them, int64 (U,)."""
        self.trim()
        if not self._units:
            return np.zeros(0, np.float32), self._kept
        units, values = np.concatenate(self._units), np.concatenate(self._values)
        return values[np.lexsort((-values, units))], self._kept

    def result(self) -> torch.Tensor:
        """The levels, float32 (U,): the Hazen quantile; NaN for units without a finite activation."""
        values, lengths = self.sorted_values()
        counted = self.counted.numpy()
        place = np.clip(self.quantile * counted - 0.5, 0, np.maximum(counted - 1, 0))
        low = np.floor(place).astype(np.int64)
        high = np.minimum(low + 1, np.maximum(counted - 1, 0))
        starts = np.cumsum(lengths) - lengths
        padded = np.append(values, np.float32(0)).astype(np.float64)

        def at(places: np.ndarray) -> np.ndarray:  # the i-th smallest of n is the (n−1−i)-th largest; zeros come last
            rank = counted - 1 - places
            return padded[np.where((rank >= 0) & (rank < lengths), starts + rank, len(values))]

        weight = place - low
        lower, upper = at(low), at(high)
        levels = np.where(weight > 0, lower + (upper - lower) * weight, lower)
        return torch.from_numpy(np.where(counted == 0, np.nan, levels).astype(np.float32))

    def _bound(self, known: torch.Tensor | None) -> np.ndarray:
        bound = self.lower_bound
        if known is not None:  # values equal to it are kept: all states that share their bounds might drop a tie
            bound = torch.maximum(bound, torch.nextafter(known, torch.full_like(known, -torch.inf)))
        return bound.numpy()

    def _keep(self, units: np.ndarray, values: np.ndarray, bound: np.ndarray, broken: np.ndarray) -> None:
        above = (values > bound[units]) & ~broken
        if not above.any():
            return
        units, values = units[above].astype(np.int32), values[above]
        self._units.append(units)
        self._values.append(values)
        self._kept = self._kept + np.bincount(units, minlength=len(self._kept))
        if self._kept.max() > 2 * self.capacity:
            self.trim()
        elif len(self._units) > 64:
            self._units, self._values = [np.concatenate(self._units)], [np.concatenate(self._values)]
