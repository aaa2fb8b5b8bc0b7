"""Maps of features of which few are on at a position, as TopK dictionaries make them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SparseMaps:
    """Maps of F features, of which k are stored at each position; the others are zero.

    Attributes:
        values: float32 (n, h, w, k), not below zero.
        features: int64 (n, h, w, k), the features that have these values, distinct at a position.
        count: F.
    """

    values: torch.Tensor
    features: torch.Tensor
    count: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of the same maps with all zeros: (n, F, h, w)."""
        images, height, width, _ = self.values.shape
        return images, self.count, height, width

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.values.device

    @property
    def is_cuda(self) -> bool:
        """Whether they are on a GPU."""
        return self.values.is_cuda

    def numel(self) -> int:
        """Number of stored values."""
        return self.values.numel()

    def maxima(self) -> torch.Tensor:
        """The largest finite activation of every feature on every image, (n, F)."""
        values, features = self.values.flatten(1), self.features.flatten(1)
        finite = values.masked_fill(~torch.isfinite(values), 0)
        return finite.new_zeros(len(values), self.count).scatter_reduce_(1, features, finite, "amax")

    def means(self) -> torch.Tensor:
        """The mean of the finite activations of every feature on every image, (n, F)."""
        values, features = self.values.flatten(1), self.features.flatten(1)
        broken = ~torch.isfinite(values)
        blank = values.new_zeros(len(values), self.count)
        sums = blank.scatter_add(1, features, values.masked_fill(broken, 0))
        lost = blank.scatter_add(1, features, broken.to(values.dtype))
        return sums / (self.values.shape[1] * self.values.shape[2] - lost)

    def dense_parts(self, most: int) -> Iterator[tuple[slice, torch.Tensor]]:
        """The maps with all zeros of some images at a time: at most so many bytes, where one image has not more."""
        images, count, height, width = self.shape
        size = max(1, most // (4 * count * height * width))
        for start in range(0, images, size):
            part = slice(start, min(start + size, images))
            yield part, SparseMaps(self.values[part], self.features[part], count).dense()

    def dense(self) -> torch.Tensor:
        """The maps with all zeros, (n, F, h, w), features last in memory."""
        images, count, height, width = self.shape
        zeros = self.values.new_zeros(images, height, width, count)
        return zeros.scatter_(3, self.features, self.values).permute(0, 3, 1, 2)
