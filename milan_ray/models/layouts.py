"""How a layer's output is read: which axis is the batch, which the units, which the positions.

A :class:`Layout` is established by :mod:`milan_ray.models.establish` and holds for every batch of the same model and
view. Nothing is guessed from a tensor's rank.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace

import torch

from milan_ray.device import to_device
from milan_ray.errors import MilanError


@dataclass(frozen=True)
class Layout:
    """How one layer's output is read as one activation map per unit.

    Attributes:
        shape: The output's shape for one image: all axes but the batch.
        batch_axis: Axis of the output that counts images.
        units_axis: Axis of the output that counts units.
        grid: (height, width) of the units' maps; (1, 1) where there are no positions.
        columns_first: Whether positions run down columns: their axes are (x, y), or tokens go column by column.
        prefix_tokens: Tokens before the positions (CLS, registers), which are dropped.
        suffix_tokens: Tokens after the positions, which are dropped.
        order: Index of each token's cell in the grid, counted row by row, where tokens come in another order; else
            None.
        known: How the layout was determined.
        remark: Further notes for users, such as that the module runs several times; may be empty.
        calls: How often the module runs in a forward pass, where its last call counts; 0 where that does not matter.
        features: Number of features that are read from the units, and take their place; 0 where units are read.
        rectified: Whether values are never below zero and zero means absent: of features that say so.
    """

    shape: tuple[int, ...]
    batch_axis: int
    units_axis: int
    grid: tuple[int, int]
    columns_first: bool = False
    prefix_tokens: int = 0
    suffix_tokens: int = 0
    order: tuple[int, ...] | None = None
    known: str = ""
    remark: str = ""
    calls: int = field(default=0, compare=False)
    features: int = 0
    rectified: bool = False

    @property
    def units(self) -> int:
        """Number of units, or of the features in their place."""
        return self.features or self.width

    @property
    def width(self) -> int:
        """Number of units of the output itself."""
        return self.shape[self.units_axis - (self.units_axis > self.batch_axis)]

    def maps(self, output: torch.Tensor, layer: str = "the layer", images: int | None = None) -> torch.Tensor:
        """Arranges the layer's output as one map per unit.

        Args:
            output: The layer's output for B images.
            layer: The layer's name, for messages.
            images: How many images were shown; None where that is not known.

        Returns:
            (B, U, h, w), where possible a view of the output.

        Raises:
            MilanError: The output's shape differs from the established one, or there is not one row per image.
        """
        if output.ndim != len(self.shape) + 1 or self._per_image(output) != self.shape:
            raise MilanError(
                f"{layer} puts out a tensor of shape {tuple(output.shape)}, where it had {self.shape} per image and "
                f"the images on axis {self.batch_axis} before: dissect a layer whose shape is fixed."
            )
        if images is not None and output.shape[self.batch_axis] != images:
            raise MilanError(
                f"{layer} puts out {output.shape[self.batch_axis]} rows for {images} images: it gets a part of them "
                "(the batch in pieces, or the images that a router, an early exit or a detector picks), so that rows "
                "cannot be told apart; choose a layer around it."
            )
        first = output if self.batch_axis == 0 else output.movedim(self.batch_axis, 0)
        axis = self.units_axis + (self.units_axis < self.batch_axis)
        maps = first if axis == 1 else first.movedim(axis, 1)
        height, width = self.grid
        if maps.ndim == 2:
            return maps[:, :, None, None]
        if maps.ndim == 4:
            if maps.shape[2:] == ((width, height) if self.columns_first else (height, width)):
                return maps.transpose(2, 3) if self.columns_first else maps
            maps = maps.flatten(2)  # tokens with an extra axis of size 1
        tokens = maps[:, :, self.prefix_tokens : maps.shape[2] - self.suffix_tokens]
        if self.order is not None:
            tokens = tokens[:, :, to_device(torch.tensor(self.order).argsort(), tokens.device)]
        if self.columns_first:
            return tokens.unflatten(2, (width, height)).transpose(2, 3)
        return tokens.unflatten(2, (height, width))

    def _per_image(self, output: torch.Tensor) -> tuple[int, ...]:
        return tuple(size for axis, size in enumerate(output.shape) if axis != self.batch_axis)

    def identity(self) -> dict[str, object]:
        """The fields that determine results, for configuration hashes."""
        dropped = ("known", "remark", "shape", "calls", "features", "rectified")  # features have a digest of their own
        return {key: value for key, value in asdict(self).items() if key not in dropped}

    def is_conventional(self, prefix_tokens: int | None, channels_last: bool) -> bool:
        """Whether this is the layout that earlier versions assumed without establishing it.

        Tables of those versions are still right, and keep their configuration hashes.

        Args:
            prefix_tokens: The model's declared number of prefix tokens; None where it declares none.
            channels_last: Whether the model declares that this layer's maps are (B, H, W, U).
        """
        if self.batch_axis != 0 or self.columns_first or self.suffix_tokens or self.order is not None:
            return False
        rank = len(self.shape)
        if rank != 2:
            return self.units_axis == (3 if rank == 3 and channels_last else 1)
        if self.units_axis != 2 or self.grid[0] != self.grid[1]:
            return False
        counts = range(9) if prefix_tokens is None else (prefix_tokens,)
        squares = [n for n in counts if self.shape[0] > n and math.isqrt(self.shape[0] - n) ** 2 == self.shape[0] - n]
        return squares[:1] == [self.prefix_tokens]

    def to_json(self) -> str:
        """The layout as text, for a table's metadata."""
        unsaid = () if self.features else ("features", "rectified")
        return json.dumps({key: value for key, value in asdict(self).items() if key not in ("calls", *unsaid)})

    def __str__(self) -> str:
        """Readable text, e.g. ``units on axis 2, 14×14 tokens, after 1 prefix tokens; known from lit patches``."""
        parts = [f"units on axis {self.units_axis}"]
        if self.batch_axis:
            parts.insert(0, f"images on axis {self.batch_axis}")
        if len(self.shape) > 1:
            parts.append(f"{self.grid[0]}×{self.grid[1]} " + ("tokens" if len(self.shape) == 2 else "positions"))
        if self.prefix_tokens:
            parts.append(f"after {self.prefix_tokens} prefix tokens")
        if self.suffix_tokens:
            parts.append(f"before {self.suffix_tokens} suffix tokens")
        if self.columns_first:
            parts.append("column by column")
        if self.order is not None:
            parts.append("in an order of its own")
        if self.features:
            parts.append(f"{self.features} features of {self.width} units")
        return f"{', '.join(parts)}; known from {self.known}{'; ' + self.remark if self.remark else ''}"


@dataclass(frozen=True)
class Reading:
    """What a user declares about a model's layers; None leaves a value to be determined (docs/layouts.md).

    Attributes:
        batch_axis: Axis of a layer's output that counts images.
        units_axis: Axis of a layer's output that counts units; negative ones count from the end.
        grid: (height, width) of the positions.
        prefix_tokens: Tokens before the positions.
    """

    batch_axis: int | None = None
    units_axis: int | None = None
    grid: tuple[int, int] | None = None
    prefix_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch_axis", "units_axis", "prefix_tokens"):
            value: object = getattr(self, name)
            if value is not None and (not isinstance(value, int) or (name == "prefix_tokens" and value < 0)):
                kind = "a number of at least 0" if name == "prefix_tokens" else "a whole number"
                raise MilanError(f"{name}={value!r} is said of the layers: give {kind}.")
        grid: object = self.grid
        good = isinstance(grid, tuple | list) and len(grid) == 2 and all(isinstance(n, int) and n > 0 for n in grid)
        if grid is not None and not good:
            raise MilanError(f"grid={grid!r} is said of the layers: give (height, width), two numbers of at least 1.")
        if isinstance(grid, list):
            object.__setattr__(self, "grid", tuple(grid))

    def over(self, other: Reading) -> Reading:
        """This reading, with undeclared values taken from another one."""
        own = {name: value for name, value in vars(self).items() if value is not None}
        return replace(other, **own)


UNSAID = Reading()
"""Declares nothing: everything is determined from the network."""


def grids(count: int, view: tuple[int, int], seen: Sequence[tuple[int, int]] = ()) -> list[tuple[int, int]]:
    """Possible (height, width) of a grid with a given number of positions, likeliest first.

    Args:
        count: Number of positions.
        view: (height, width) of the model's view: a grid has its proportions, within rounding.
        seen: Sizes of maps that the model computes earlier; these come first, whatever their proportions.
    """
    sizes = [grid for grid in dict.fromkeys(seen) if grid[0] * grid[1] == count]
    height, width = view
    fitting = []
    for h in range(1, count + 1):
        if count % h:
            continue
        w = count // h
        # One stride s must give both h = H/s and w = W/s, each rounded up or down.
        low, high = max(height / (h + 1), width / (w + 1)), min(height / max(h - 1, 0.5), width / max(w - 1, 0.5))
        if low < high:
            fitting.append((abs(math.log((height / h) / (width / w))), (h, w)))
    sizes += [grid for _, grid in sorted(fitting)]
    return list(dict.fromkeys(sizes))
