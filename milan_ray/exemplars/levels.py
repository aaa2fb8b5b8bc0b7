"""Levels: the activation quantile above which a position belongs to a unit's mask (paper §3).

A level lies near the top of a unit's activations, so a state needs to keep only the highest ones: of N planned
positions, the largest ⌈(1−q)·N⌉ + 2 determine the q-quantile exactly. Keeping a multiset's largest values commutes
with splitting and merging it, so the result is exact for the counted positions and any sharding. There is no sketch
error, only the sampling error of very large probes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch


def positions_per_image(images: int, positions: int, samples: int) -> int:
    """The number of a map's positions to count on each image.

    Args:
        images: Images in the probe.
        positions: Positions of one map, h·w.
        samples: Requested number of positions per unit over the whole probe.

    Returns:
        ``positions`` if the whole probe has at most ``samples`` positions, else as many as are needed to reach it.
    """
    return min(positions, max(1, math.ceil(samples / max(1, images))))


def sample_positions(image_ids: np.ndarray, count: int, positions: int) -> np.ndarray:
    """A fixed pseudo-random choice of positions for each image: one from each of ``count`` equal strata.

    Args:
        image_ids: int64 (B,). The choice depends only on the id, never on shard, batch or order.
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
    """The finaliser of SplitMix64 (Steele et al. 2014): a bijective hash of 64-bit integers."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass
class RunningLevel:
    """Mergeable state: each unit's largest activations, and the number of activations counted.

    The smallest value of a full tail is a lower bound: values that do not exceed it cannot change the result. So nearly
    all activations cost only one comparison, and only larger values are copied.

    Attributes:
        quantile: q, e.g. 0.99.
        capacity: Largest values kept per unit.
        tail: float32 (U, n), unordered, −inf in empty columns; n may exceed the capacity until the tail is trimmed.
        lower_bound: float32 (U,); values at or below it are not kept; −inf until the tail is full.
        counted: int64 (U,), number of finite activations.
        nonfinite: int64 (U,), number of NaN and infinite activations, which are left out.
    """

    quantile: float
    capacity: int
    tail: torch.Tensor
    lower_bound: torch.Tensor
    counted: torch.Tensor
    nonfinite: torch.Tensor
    _used: np.ndarray
    """int64 (U,), number of used columns of the tail."""

    @classmethod
    def empty(cls, units: int, quantile: float, planned: int, device: str | torch.device = "cpu") -> RunningLevel:
        """The state before any activation.

        Args:
            units: Number of units U.
            quantile: q in (0, 1].
            planned: Upper bound of the positions that will be counted per unit, over all shards.
            device: Device of the state.
        """
        capacity = min(planned, math.ceil((1 - quantile) * planned) + 2)
        tail = torch.empty((units, 0), device=device)
        lower_bound = torch.full((units,), -torch.inf, device=device)
        zeros = torch.zeros(units, dtype=torch.int64, device=device)
        return cls(quantile, capacity, tail, lower_bound, zeros, zeros.clone(), np.zeros(units, np.int64))

    def update(self, activations: torch.Tensor, known: torch.Tensor | None = None) -> None:
        """Counts activations.

        Args:
            activations: float32 (m, U, n), contiguous: m·n per unit.
            known: (U,), another state's :attr:`lower_bound`; smaller values are skipped. Values equal to it are
                kept, because a tie would be lost if all states that share their bounds dropped it.
        """
        per_unit = activations.shape[0] * activations.shape[2]
        counted = torch.full_like(self.counted, per_unit)
        # On a CPU, a finite sum proves in one cheap pass that all values are finite; a sum that overflows only costs
        # the full check. On a GPU, the full check is cheap, and reading the sum would make the host wait.
        if activations.is_cuda or not bool(torch.isfinite(activations.sum())):
            finite = torch.isfinite(activations)
            counted = finite.sum(dim=(0, 2))
            activations = activations.masked_fill(~finite, -torch.inf)
            self.nonfinite = self.nonfinite + per_unit - counted
        self.counted = self.counted + counted
        self._keep(activations, known)

    def merge(self, other: RunningLevel) -> None:
        """Adds another state's activations (of the same quantile and capacity)."""
        if (self.quantile, self.capacity) != (other.quantile, other.capacity):
            raise ValueError("levels of different plans cannot be merged")
        self.counted = self.counted + other.counted
        self.nonfinite = self.nonfinite + other.nonfinite
        self._keep(other.tail[None], None)

    def trim(self) -> None:
        """Drops values beyond the capacity, and raises the lower bound."""
        if self.tail.shape[1] < self.capacity:
            return
        self.tail = _largest(self.tail, self.capacity)
        self._used[:] = self.capacity
        self.lower_bound = torch.maximum(self.lower_bound, self.tail.amin(dim=1))

    def _keep(self, values: torch.Tensor, known: torch.Tensor | None) -> None:
        lower_bound = self.lower_bound
        if known is not None:
            lower_bound = torch.maximum(lower_bound, torch.nextafter(known, torch.full_like(known, -torch.inf)))
        if self.capacity == 0 or values.numel() == 0:
            return
        if values.is_cuda:  # no data-dependent sizes: the host would have to wait for them
            self._append(values.masked_fill(values <= lower_bound[:, None], -torch.inf))
            return
        array = values.numpy()
        above = array > lower_bound.numpy()[:, None]  # four times as fast as torch's
        if 8 * np.count_nonzero(above) > above.size:
            self._append(values.masked_fill(~torch.from_numpy(above), -torch.inf))
            return
        hits = np.flatnonzero(above)
        units = hits // values.shape[2]
        units -= units // values.shape[1] * values.shape[1]  # several times as fast as numpy's %
        order = np.argsort(units.astype(np.min_scalar_type(values.shape[1])), kind="stable")  # radix sort of 16 bits
        units = units[order]
        counts = np.bincount(units, minlength=values.shape[1])
        columns = np.arange(len(units)) + (self._used - np.cumsum(counts) + counts)[units]
        self._used += counts
        self._widen(int(self._used.max()))
        self.tail.numpy()[units, columns] = array.reshape(-1)[hits[order]]
        if self._used.max() > self._limit:
            self.trim()

    def _append(self, values: torch.Tensor) -> None:
        """Appends all values (m, U, n) to the tail."""
        self.tail = torch.cat([self.tail, values.transpose(0, 1).flatten(1)], dim=1)
        self._used[:] = self.tail.shape[1]
        self.trim()

    @property
    def _limit(self) -> int:
        """Number of columns that triggers a trim: slightly above the capacity, because a high bound saves work."""
        return self.capacity + self.capacity // 8

    def _widen(self, columns: int) -> None:
        """Grows the tail to at least this many columns; reserves extra columns, because each growth copies the tail."""
        units, width = self.tail.shape
        if columns > width:
            room = max(columns, min(2 * columns, self._limit)) - width
            self.tail = torch.cat([self.tail, torch.full((units, room), -torch.inf)], dim=1)

    def sorted_tail(self) -> torch.Tensor:
        """The kept activations, descending (U, ≤ capacity), padded with −inf; independent of the order of updates."""
        return torch.sort(_largest(self.tail.clone(), self.capacity), dim=1, descending=True).values

    def sorted_values(self) -> tuple[np.ndarray, np.ndarray]:
        """The kept activations, unit by unit and descending, float32, and each unit's number of them, int64 (U,)."""
        tail = self.sorted_tail().cpu().numpy()
        kept = tail > -np.inf
        return tail[kept], kept.sum(axis=1)

    def result(self) -> torch.Tensor:
        """The levels, float32 (U,): the Hazen quantile, which the reference's sketch also uses while it is exact.

        Returns:
            The levels; NaN for units without a finite activation.
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
        with np.errstate(invalid="ignore"):  # units without activations have −inf
            levels = np.where(weight > 0, lower + (upper - lower) * weight, lower)
        return torch.from_numpy(np.where(empty, np.nan, levels).astype(np.float32))


def _largest(values: torch.Tensor, count: int) -> torch.Tensor:
    """The ``count`` largest values of each row, or all if there are fewer, in any order; may reorder ``values``."""
    surplus = values.shape[1] - count
    if surplus <= 0:
        return values
    if values.device.type == "cpu":
        # numpy's vectorised selection is several times faster than torch.topk on long rows.
        values.numpy().partition(surplus, axis=1)
        return values[:, surplus:]
    return torch.topk(values, count, dim=1, sorted=False).values


def in_words(nonfinite: torch.Tensor) -> str:
    """The end of a warning about non-finite activations; empty if there are none.

    Args:
        nonfinite: int (U,), NaN and infinite activations of each unit.
    """
    units = int((nonfinite > 0).sum())
    if not units:
        return ""
    return (
        f"has {int(nonfinite.sum())} activations that are NaN or infinite, in {units} of {len(nonfinite)} units: they "
        "are left out; see that its weights are whole, and that its number type is wide enough (bfloat16 or float32 "
        "in place of float16)"
    )
