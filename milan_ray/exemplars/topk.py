"""The running top-k: which images excite each unit most."""

from __future__ import annotations

from dataclasses import dataclass

import torch

NO_IMAGE = -1


@dataclass
class RunningTopK:
    """Per unit, the k images with the highest activation, over distinct image ids.

    The order is total: activation descending, then image id ascending. The same id with two activations keeps the
    larger. So any split, order or repetition of the same images gives the identical state.

    Attributes:
        values: float32 (U, k), best first; −inf where there are fewer than k images.
        ids: int64 (U, k); −1 where there are fewer than k images.
        maps: float32 (U, k, h, w), the activation maps of these images, or None when they are not carried along.
    """

    values: torch.Tensor
    ids: torch.Tensor
    maps: torch.Tensor | None = None

    @classmethod
    def empty(
        cls, units: int, k: int, map_shape: tuple[int, int] | None = None, device: str | torch.device = "cpu"
    ) -> RunningTopK:
        """The state before any image.

        Args:
            units: Number of units U.
            k: Images to keep per unit.
            map_shape: (h, w) of the activation maps to carry along, or None.
            device: Where the state lives.
        """
        return cls(
            torch.full((units, k), -torch.inf, device=device),
            torch.full((units, k), NO_IMAGE, dtype=torch.int64, device=device),
            None if map_shape is None else torch.zeros((units, k, *map_shape), device=device),
        )

    @property
    def bar(self) -> torch.Tensor:
        """(U,): the activation below which an image cannot enter."""
        return self.values[:, -1]

    def update(
        self,
        values: torch.Tensor,
        ids: torch.Tensor,
        maps: torch.Tensor | None = None,
        bar: torch.Tensor | None = None,
    ) -> None:
        """Adds a batch of images.

        Args:
            values: float32 (B, U), the units' activations; −inf never enters.
            ids: int64 (B,), the images' ids.
            maps: float32 (B, U, h, w), needed when the state carries maps.
            bar: (U,), activations below which nothing needs to enter (another state's :attr:`bar`).
        """
        values = values.T
        if bar is not None:
            values = values.masked_fill(values < bar[:, None], -torch.inf)
        per_unit = None if maps is None else maps.transpose(0, 1)
        self._absorb(values, ids.expand(values.shape), per_unit)

    def merge(self, other: RunningTopK) -> None:
        """Adds another state's images."""
        self._absorb(other.values, other.ids, other.maps)

    def within(self, other: RunningTopK) -> RunningTopK:
        """The state with every image blanked out that is not among the same unit's images in ``other``."""
        keep = (self.ids[:, :, None] == other.ids[:, None, :]).any(dim=2)
        return RunningTopK(self.values.masked_fill(~keep, -torch.inf), self.ids.masked_fill(~keep, NO_IMAGE), self.maps)

    def without_maps(self) -> RunningTopK:
        """A copy of values and ids alone, sharing their memory."""
        return RunningTopK(self.values, self.ids)

    def _absorb(self, values: torch.Tensor, ids: torch.Tensor, maps: torch.Tensor | None) -> None:
        k = self.values.shape[1]
        all_values = torch.cat([self.values, values], dim=1)
        all_ids = torch.cat([self.ids, ids], dim=1)
        # Two stable sorts make the total order: by id ascending, then by activation descending.
        order = torch.argsort(all_ids, dim=1, stable=True)
        by_activation = torch.argsort(all_values.gather(1, order), dim=1, descending=True, stable=True)
        order = order.gather(1, by_activation)
        sorted_ids = all_ids.gather(1, order)
        sorted_values = all_values.gather(1, order)
        repeated = _later_duplicates(sorted_ids) & (sorted_values > -torch.inf)
        if repeated.any():
            last = torch.argsort(repeated.to(torch.uint8), dim=1, stable=True)
            order, repeated, sorted_values = (x.gather(1, last) for x in (order, repeated, sorted_values))
        blank = repeated | (sorted_values == -torch.inf)
        order, blank = order[:, :k], blank[:, :k]
        self.values = all_values.gather(1, order).masked_fill(blank, -torch.inf)
        self.ids = all_ids.gather(1, order).masked_fill(blank, NO_IMAGE)
        if self.maps is not None:
            if maps is None:
                raise ValueError("this state carries maps: give the batch's maps too")
            self.maps = _pick_maps(self.maps, maps, order)


def _later_duplicates(sorted_ids: torch.Tensor) -> torch.Tensor:
    """(U, n) bool: whether the same id occurs earlier in its row."""
    by_id = torch.argsort(sorted_ids, dim=1, stable=True)
    ids = sorted_ids.gather(1, by_id)
    repeated = torch.zeros_like(ids, dtype=torch.bool)
    repeated[:, 1:] = ids[:, 1:] == ids[:, :-1]
    return torch.zeros_like(repeated).scatter(1, by_id, repeated)


def _pick_maps(own: torch.Tensor, new: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Maps of the chosen images: index < k takes from ``own`` (U, k, h, w), the others from ``new`` (U, n, h, w)."""
    k = own.shape[1]
    if bool((order == torch.arange(k, device=order.device)).all()):
        return own  # nothing moved: the common case once the bar is high
    picked = own.gather(1, order.clamp(max=k - 1)[:, :, None, None].expand(own.shape))
    unit, slot = torch.nonzero(order >= k, as_tuple=True)
    picked[unit, slot] = new[unit, order[unit, slot] - k]
    return picked
