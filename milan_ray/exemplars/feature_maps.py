"""Maps of features: what a feature set makes of a layer's maps, position by position."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from milan_ray.errors import MilanError
from milan_ray.exemplars.sparse_maps import SparseMaps
from milan_ray.models.features.dictionary import Dictionary
from milan_ray.models.features.sets import FeatureSet
from milan_ray.models.features.statistics import explained_variance
from milan_ray.models.registry import blaming

PIECE_BYTES = 2**26
"""Bytes of features' maps that are made at a time, where an image's are not more."""

_FEW_BYTES = 2**24
"""Bytes of pre-activations that are made at a time where only their largest are kept: fewer rows than the matrix needs
cost more than reading them again."""

MOST_BYTES = 2**32
"""Bytes of one image's features up to which they are made at all."""


class FeatureMaps:
    """Reads a feature set from maps of its layer.

    The number of images per step is fixed, and a short step is filled up with zeros: kernels of a matrix product may
    depend on the number of rows, and with them the last bits of an image's codes.

    Args:
        features: The feature set.
        device: Where the layer's maps are.

    Raises:
        MilanError: It cannot be built.
    """

    def __init__(self, features: FeatureSet, device: torch.device) -> None:
        self._features = features
        with blaming(f"features {features.name!r} cannot be built"):
            self._encoder = features.build().to(device)
        self._few = features.rectified and isinstance(self._encoder, Dictionary) and self._encoder.sparse is not None

    def pieces(self, maps: torch.Tensor, batch_size: int) -> Iterator[tuple[slice, torch.Tensor | SparseMaps]]:
        """Reads features from maps, some images at a time.

        Args:
            maps: float32 (n, C, h, w), n ≤ ``batch_size``.
            batch_size: Images of a full batch.

        Yields:
            Rows, and float32 (rows, F, h, w), a view with features last in memory; on a CPU sparse maps where few
            features are on at a position.

        Raises:
            MilanError: The encoder fails, puts out something else than codes (N, F), or needs too much memory.
        """
        images, _, height, width = maps.shape
        few = self._few and not maps.is_cuda
        size = batch_size if few else self._images(height * width, batch_size)
        for start in range(0, images, size):
            part = maps[start : start + size]
            rows = part.permute(0, 2, 3, 1).flatten(0, 2)
            if len(part) < size:
                rows = torch.cat([rows, rows.new_zeros(((size - len(part)) * height * width, rows.shape[1]))])
            found = slice(start, start + len(part))
            if few:
                values, features = self._sparse_codes(rows)
                grid = (len(part), height, width, -1)
                kept = len(part) * height * width
                yield found, SparseMaps(values[:kept].view(grid), features[:kept].view(grid), self._features.count)
            else:
                codes = self._codes(rows)[: len(part) * height * width]
                yield found, codes.unflatten(0, (-1, height, width)).permute(0, 3, 1, 2)

    def check(self, maps: torch.Tensor) -> None:
        """Reads features from maps float32 (n, C, h, w) once.

        Raises:
            MilanError: As for :meth:`pieces`.
        """
        for _ in self.pieces(maps, len(maps)):
            pass

    def explained_variance(self, maps: torch.Tensor) -> float:
        """The share of a layer's variance over images and positions that the features' reconstruction explains.

        Args:
            maps: float32 (n, C, h, w).

        Raises:
            MilanError: The encoder fails.
        """
        with blaming(f"features {self._features.name!r} cannot be read from layer {self._features.layer!r}"):
            return explained_variance(self._encoder, maps.permute(0, 2, 3, 1).flatten(0, 2))

    def _images(self, positions: int, batch_size: int) -> int:
        """Images per step."""
        one = 4 * self._features.count * positions
        if one > MOST_BYTES:
            raise MilanError(
                f"{self._features.count:,} features at {positions} positions take {one / 2**30:.1f} GiB for one image, "
                f"more than the {MOST_BYTES / 2**30:.0f} GiB that a step may take: give a part of the features, or "
                "features of a layer with fewer positions."
            )
        return max(1, min(batch_size, PIECE_BYTES // one))

    def _sparse_codes(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Values and features (N, k) of the layer's output (N, C), where few are on at a position."""
        encoder = self._encoder
        assert isinstance(encoder, Dictionary)
        found = [encoder.encode_sparse(part) for part in rows.split(max(1, _FEW_BYTES // (4 * self._features.count)))]
        values, features = zip(*found, strict=True)
        return torch.cat(values), torch.cat(features)

    def _codes(self, rows: torch.Tensor) -> torch.Tensor:
        """Codes (N, F) of the layer's output (N, C)."""
        features = self._features
        with blaming(f"features {features.name!r} cannot be read from layer {features.layer!r}"):
            codes = self._encoder.encode(rows)
        if tuple(codes.shape) != (len(rows), features.count) or not codes.is_floating_point():
            raise MilanError(
                f"features {features.name!r}: encode= puts out {codes.dtype} of shape {tuple(codes.shape)} for "
                f"{len(rows)} positions, not floats ({len(rows)}, {features.count})."
            )
        # A GPU's host would wait for the answer; the first images are checked on a CPU.
        promised = features.rectified and not isinstance(self._encoder, Dictionary) and not codes.is_cuda
        if promised and bool((codes < 0).any()):
            raise MilanError(
                f"features {features.name!r} are registered with rectified=True, and encode= puts out codes below "
                "zero: leave that out, or rectify them."
            )
        return codes.float()
