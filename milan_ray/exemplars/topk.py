"""The running top-k: the images that activate each unit most."""

from __future__ import annotations

import torch

NO_IMAGE = -1


class RunningTopK:
    """Mergeable state: each unit's k images with the highest activation, with distinct image ids.

    The order is total: activation descending, then image id ascending. If an id occurs with two activations, the larger
    is kept. So any split, order or repetition of the same images gives the identical state.

    Attributes:
        values: float32 (U, k), best first; −inf in empty slots.
        ids: int64 (U, k); −1 in empty slots.
    """

    def __init__(self, values: torch.Tensor, ids: torch.Tensor, maps: torch.Tensor | None = None) -> None:
        """Creates a state of these images, with their maps (U, k, h, w) if the state carries maps."""
        self.values, self.ids, self.maps = values, ids, maps

    @property
    def maps(self) -> torch.Tensor | None:
        """The images' activation maps, float32 (U, k, h, w), or None if the state carries no maps.

        Maps of empty slots are undefined. On a CPU, the result is a sorted copy, because stored maps do not move when
        their images' ranks change.
        """
        if self._store is None or self._slots is None:
            return self._store
        units, k = self._slots.shape
        return self.maps_of(torch.arange(units)[:, None].expand(units, k), torch.arange(k).expand(units, k))

    @maps.setter
    def maps(self, maps: torch.Tensor | None) -> None:
        self._store, self._slots = maps, None
        if maps is not None and not maps.is_cuda:
            self._slots = torch.arange(maps.shape[1]).repeat(len(maps), 1)

    @classmethod
    def empty(
        cls, units: int, k: int, map_shape: tuple[int, int] | None = None, device: str | torch.device = "cpu"
    ) -> RunningTopK:
        """The state before any image.

        Args:
            units: Number of units U.
            k: Images to keep per unit.
            map_shape: (h, w) of the activation maps to carry, or None.
            device: Device of the state.
        """
        return cls(
            torch.full((units, k), -torch.inf, device=device),
            torch.full((units, k), NO_IMAGE, dtype=torch.int64, device=device),
            None if map_shape is None else torch.zeros((units, k, *map_shape), device=device),
        )

    @property
    def carries_maps(self) -> bool:
        """Whether the state has its images' maps."""
        return self._store is not None

    def maps_of(self, unit: torch.Tensor, rank: torch.Tensor) -> torch.Tensor:
        """The maps (…, h, w) of some images, by unit (…) and rank (…)."""
        assert self._store is not None
        return self._store[unit, rank if self._slots is None else self._slots[unit, rank]]

    @property
    def lower_bound(self) -> torch.Tensor:
        """(U,): the activation below which an image cannot enter the top k."""
        return self.values[:, -1]

    def update(
        self,
        values: torch.Tensor,
        ids: torch.Tensor,
        maps: torch.Tensor | None = None,
        lower_bound: torch.Tensor | None = None,
    ) -> None:
        """Adds a batch of images.

        Args:
            values: float32 (B, U), the units' activations; −inf never enters.
            ids: int64 (B,), the images' ids.
            maps: float32 (B, U, h, w), required if the state carries maps.
            lower_bound: (U,), another state's :attr:`lower_bound`; smaller activations are skipped.
        """
        values = values.T
        if lower_bound is not None:
            values = values.masked_fill(values < lower_bound[:, None], -torch.inf)
        self._absorb(values, ids.expand(values.shape), None if maps is None else maps.transpose(0, 1))

    def merge(self, other: RunningTopK) -> None:
        """Adds another state's images."""
        self._absorb(other.values, other.ids, other._store, other._slots)

    def within(self, other: RunningTopK) -> RunningTopK:
        """A state that keeps only the images that are among the same unit's images in ``other``."""
        keep = (self.ids[:, :, None] == other.ids[:, None, :]).any(dim=2)
        kept = RunningTopK(self.values.masked_fill(~keep, -torch.inf), self.ids.masked_fill(~keep, NO_IMAGE))
        kept._store, kept._slots = self._store, self._slots
        return kept

    def without_maps(self) -> RunningTopK:
        """A copy of the state without maps."""
        return RunningTopK(self.values.clone(), self.ids.clone())

    def _absorb(
        self, values: torch.Tensor, ids: torch.Tensor, maps: torch.Tensor | None, slots: torch.Tensor | None = None
    ) -> None:
        """Adds (U, n) candidates with maps (U, n, h, w), which are stored in order or at ``slots`` (U, n)."""
        if self._store is not None and maps is None:
            raise ValueError("this state carries maps: give the batch's maps too")
        k = self.values.shape[1]
        rows = self._rows(values, ids)
        all_values = torch.cat([self.values[rows], values[rows]], dim=1)
        all_ids = torch.cat([self.ids[rows], ids[rows]], dim=1)
        # Two stable sorts make the total order: by id ascending, then by activation descending.
        order = torch.argsort(all_ids, dim=1, stable=True)
        by_activation = torch.argsort(all_values.gather(1, order), dim=1, descending=True, stable=True)
        order = order.gather(1, by_activation)
        sorted_ids = all_ids.gather(1, order)
        sorted_values = all_values.gather(1, order)
        repeated = _later_duplicates(sorted_ids) & (sorted_values > -torch.inf)
        if repeated.is_cuda or repeated.any():
            last = torch.argsort(repeated.to(torch.uint8), dim=1, stable=True)
            order, repeated, sorted_values = (x.gather(1, last) for x in (order, repeated, sorted_values))
        blank = repeated | (sorted_values == -torch.inf)
        order, blank = order[:, :k], blank[:, :k]
        self.values[rows] = all_values.gather(1, order).masked_fill(blank, -torch.inf)
        self.ids[rows] = all_ids.gather(1, order).masked_fill(blank, NO_IMAGE)
        if self._store is not None and maps is not None:
            self._move_maps(maps, slots, rows, order)

    def _move_maps(
        self, new: torch.Tensor, places: torch.Tensor | None, rows: torch.Tensor, order: torch.Tensor
    ) -> None:
        """Reorders the maps of some units: index < k from the state itself, else from ``new`` (U, n, h, w)."""
        own, slots, k = self._store, self._slots, self.values.shape[1]
        assert own is not None
        if slots is None:  # on a GPU: avoid data-dependent sizes
            size = (*order.shape, *own.shape[2:])
            kept = own.gather(1, order.clamp(max=k - 1)[:, :, None, None].expand(size))
            came = new.gather(1, (order - k).clamp(min=0)[:, :, None, None].expand(size))
            torch.where((order < k)[:, :, None, None], kept, came, out=own)
            return
        stays = order < k
        place = slots[rows].gather(1, order.clamp(max=k - 1))
        taken = torch.zeros_like(place).scatter_add_(1, place, stays.to(place.dtype))
        free = torch.argsort(taken, dim=1, stable=True)  # free slots come first, one for each new map
        place = torch.where(stays, place, free.gather(1, (torch.cumsum(~stays, 1) - 1).clamp(min=0)))
        slots[rows] = place
        row, rank = torch.nonzero(~stays, as_tuple=True)
        unit, source = rows[row], order[row, rank] - k
        own[unit, place[row, rank]] = new[unit, source if places is None else places[unit, source]]

    def _rows(self, values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The units whose top k may change: few once the lower bound is high. On a GPU all, to avoid a sync."""
        if values.is_cuda:
            return torch.arange(len(values), device=values.device)
        ties = (values == self.lower_bound[:, None]) & (ids < self.ids[:, -1:])
        enters = (values > self.lower_bound[:, None]) | (ties & (values > -torch.inf))
        return enters.any(dim=1).nonzero()[:, 0]


def _later_duplicates(sorted_ids: torch.Tensor) -> torch.Tensor:
    """(U, n) bool: whether the same id occurs earlier in its row."""
    by_id = torch.argsort(sorted_ids, dim=1, stable=True)
    ids = sorted_ids.gather(1, by_id)
    repeated = torch.zeros_like(ids, dtype=torch.bool)
    repeated[:, 1:] = ids[:, 1:] == ids[:, :-1]
    return torch.zeros_like(repeated).scatter(1, by_id, repeated)
