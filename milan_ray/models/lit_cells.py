"""Grey test pictures with one lit patch each: a layer's output responds at the patch's position."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from milan_ray.models.unseen import MARGIN, SIDES

_SIDE = 7
_PATCHES = ((1, 4), (5, 2), (3, 6), (6, 0), (0, 2), (4, 5))
"""Positions of the lit patches on a 7 × 7 grid over the view. They have no symmetry, which reveals a rotated or flipped
grid."""


@dataclass(frozen=True)
class Evidence:
    """Evidence of lit pictures for one way to read a layer's positions.

    Attributes:
        hit: Share of the response that lies where the pictures are lit.
        peak: Share of the response in the same number of strongest positions: the maximum of ``hit``.
        chance: Share of positions that are lit.
        hits: ``hit`` of each picture.
    """

    hit: float
    peak: float
    chance: float
    hits: tuple[float, ...]

    @property
    def confirms(self) -> bool:
        """Whether the layer responds at the lit patches.

        With the right reading, layers of untrained and trained networks have ``hit`` near ``peak``; with a wrong one,
        near ``chance`` (docs/layouts.md has the figures).
        """
        return self.hit >= max(3 * self.chance, self.chance + 0.05, self.peak / 2)

    @property
    def clear(self) -> bool:
        """Whether the response is so strong that a wrong reading is unlikely to have caused it."""
        return self.confirms and self.hit >= max(min(0.25, 8 * self.chance), 0.7 * self.peak)

    def beats(self, other: Evidence) -> bool:
        """Whether ``hit`` is higher than with another reading, in all pictures or all but one."""
        return sum(own > its for own, its in zip(self.hits, other.hits, strict=True)) >= len(self.hits) - 1

    @property
    def contradicts(self) -> bool:
        """Whether the layer clearly responds elsewhere."""
        elsewhere = self.hit < self.peak / (2 if self.peak >= 0.6 else 4)
        return self.peak >= max(0.5, 4 * self.chance) and elsewhere

    @property
    def vague(self) -> bool:
        """Whether the layer hardly responds at the lit patches; maps of convolutions reach twice ``chance`` or more."""
        return self.chance < 0.07 and self.hit < max(1.5 * self.chance, self.peak / 2)


class LitPictures:
    """Test pictures for models of one view.

    Args:
        view: (height, width), pixels.
        bands: Bands of the model's pictures.
        size: Height and width of the patches, in sevenths of the view.
    """

    def __init__(self, view: tuple[int, int], bands: int = 3, size: int = 1) -> None:
        self.view, self._bands = view, bands
        height, width = view
        corners = [(min(y, _SIDE - size), min(x, _SIDE - size)) for y, x in _PATCHES]
        self._boxes = [
            (y * height // _SIDE, (y + size) * height // _SIDE, x * width // _SIDE, (x + size) * width // _SIDE)
            for y, x in corners
        ]

    def random(self, count: int) -> np.ndarray:
        """Random pictures with coarse and fine structure, uint8 (count, H, W, bands)."""
        height, width = self.view
        random = np.random.default_rng(0)
        coarse = random.integers(0, 256, (count, -(-height // 8), -(-width // 8), self._bands))
        fine = random.integers(-40, 41, (count, height, width, self._bands))
        return (coarse.repeat(8, 1).repeat(8, 2)[:, :height, :width] + fine).clip(0, 255).astype(np.uint8)

    def grey(self, count: int) -> np.ndarray:
        """Plain grey pictures, uint8 (count, H, W, bands)."""
        return np.full((count, *self.view, self._bands), 128, np.uint8)

    def patches(self) -> np.ndarray:
        """Pictures with a lit patch each, uint8 (6, H, W, bands)."""
        pictures, noise = self.grey(len(self._boxes)), self._noise()
        for picture, (top, bottom, left, right) in zip(pictures, self._boxes, strict=True):
            picture[top:bottom, left:right] = noise[top:bottom, left:right]
        return pictures

    def margins(self, first: tuple[int, int] = (MARGIN, MARGIN)) -> np.ndarray:
        """A picture that is lit everywhere, then one for each lit margin, uint8 (5, H, W, bands).

        Args:
            first: Rows and columns of the network's first maps. The network's strides may leave out less than one row
                and column at the bottom and right, so that these margins are at least that wide.
        """
        (height, width), noise = self.view, self._noise()
        high, wide = -(-height // MARGIN), -(-width // MARGIN)
        low, right = max(high, -(-height // first[0])), max(wide, -(-width // first[1]))
        pictures = self.grey(1 + len(SIDES))
        pictures[0] = noise
        for picture, rows, columns in zip(
            pictures[1:],
            (slice(high), slice(height - low, None), slice(None), slice(None)),
            (slice(None), slice(None), slice(wide), slice(width - right, None)),
            strict=True,
        ):
            picture[rows, columns] = noise[rows, columns]
        return pictures

    def digits(self, grid: tuple[int, int]) -> np.ndarray:
        """Pictures that number the cells of a grid, uint8 (2 · digits, H, W, bands).

        For each binary digit of the cells' numbers, the lowest first, one picture lights the cells where the digit is 0
        and one those where it is 1. The grid must have no more rows and columns than the view has pixels.
        """
        height, width = grid
        y = np.arange(self.view[0]) * height // self.view[0]
        x = np.arange(self.view[1]) * width // self.view[1]
        cell = y[:, None] * width + x[None, :]
        count = (height * width - 1).bit_length()
        pictures, noise = self.grey(2 * count), self._noise()
        for digit in range(count):
            for value in (0, 1):
                lit = ((cell >> digit) & 1) == value
                pictures[2 * digit + value][lit] = noise[lit]
        return pictures

    def weigh(self, responses: torch.Tensor) -> Evidence | None:
        """Compares where a layer responds to :meth:`patches` with where they are lit.

        Args:
            responses: float64 (6, h, w), the strength of its response at each position.

        Returns:
            The evidence; None where the layer does not respond, or has too few positions.
        """
        pictures, height, width = responses.shape
        flat = responses.reshape(pictures, -1)
        total = flat.sum(1, keepdim=True)
        if height * width < 4 or not bool((total > 0).all()):
            return None
        # A picture's response beyond the mean of the others: positions that respond to all pictures carry no evidence.
        shares = flat / total
        own = (shares - (shares.sum(0, keepdim=True) - shares) / (pictures - 1)).clamp_min(0)
        sums = own.sum(1)
        if not bool((sums > 0).all()):
            return None
        lit = self.lit(height, width)
        counts = lit.sum(1)
        peak = torch.stack([row.topk(int(count)).values.sum() for row, count in zip(own, counts, strict=True)]) / sums
        hit = (own * lit).sum(1) / sums
        chance = float((counts / (height * width)).mean())
        return Evidence(float(hit.mean()), float(peak.mean()), chance, tuple(hit.tolist()))

    def lit(self, height: int, width: int) -> torch.Tensor:
        """Which cells of a grid overlap the lit patches, bool (6, height · width)."""
        y, x = torch.arange(height), torch.arange(width)
        rows = []
        for top, bottom, left, right in self._boxes:
            lit_y = ((y + 1) * self.view[0] > top * height) & (y * self.view[0] < bottom * height)
            lit_x = ((x + 1) * self.view[1] > left * width) & (x * self.view[1] < right * width)
            rows.append((lit_y[:, None] & lit_x[None, :]).flatten())
        return torch.stack(rows)

    def _noise(self) -> np.ndarray:
        return np.random.default_rng(1).integers(0, 2, (*self.view, self._bands)).astype(np.uint8) * 255
