"""Candidates for the arrangement of a layer's positions; pictures show later which one is right."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from milan_ray.models.layouts import Layout, Reading, grids
from milan_ray.models.structure import Key, Units

MAX_PREFIX_TOKENS = 16
"""Maximum number of tokens besides the positions that is tried where the model does not declare their number."""


@dataclass(frozen=True)
class Candidate:
    """One way to read a layer's output; axes count with the images first.

    Attributes:
        units_axis: Axis of the units.
        grid: (height, width) of the positions.
        columns_first: Whether positions run down columns.
        prefix: Tokens before the positions.
        suffix: Tokens after them.
        certain: Whether the layer's modules alone determine it, even where the layer does not respond to pictures.
    """

    units_axis: int
    grid: tuple[int, int]
    columns_first: bool = False
    prefix: int = 0
    suffix: int = 0
    certain: bool = False

    def cells(self, responses: torch.Tensor) -> torch.Tensor:
        """Arranges responses (pictures, positions…) as (pictures, h, w)."""
        height, width = self.grid
        own = (width, height) if self.columns_first else (height, width)
        if responses.ndim == 3 and responses.shape[1:] != own:
            responses = responses.flatten(1)
        if responses.ndim == 2:
            responses = responses[:, self.prefix : responses.shape[1] - self.suffix]
            responses = responses.unflatten(1, (width, height) if self.columns_first else (height, width))
        return responses.transpose(1, 2) if self.columns_first else responses

    def among(self, tokens: torch.Tensor) -> bool:
        """Whether any of the marked tokens, bool (tokens,), is one of its positions."""
        return bool(tokens[self.prefix : len(tokens) - self.suffix].any())

    def reads_as(self, other: Candidate) -> bool:
        """Whether another candidate reads the same values at the same positions."""
        return replace(self, certain=other.certain) == other

    def lit(self, values: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
        """A layer's output with noise in some cells of its maps, three times as strong as its own values.

        Args:
            values: The output, images first, (n, …).
            cells: Which cells of each image, row by row, bool (n, h · w).

        Returns:
            A changed copy of ``values``.
        """
        units_last = values.movedim(self.units_axis, -1)
        changed = units_last.flatten(1, -2).clone()  # (n, positions, U)
        positions = units_last.shape[1:-1]
        places = self.cells(torch.arange(math.prod(positions)).view(1, *positions)).flatten()
        noise = torch.randn(changed.shape[1:], generator=torch.Generator().manual_seed(0)).to(changed)
        noise *= 3 * changed.float().std().to(changed.dtype)
        for image, lit in zip(changed, cells, strict=True):
            where = places[lit].to(changed.device)
            image[where] += noise[where]
        return changed.unflatten(1, positions).movedim(-1, self.units_axis)

    def layout(
        self, per_image: tuple[int, ...], batch: int, known: str, order: tuple[int, ...] | None = None
    ) -> Layout:
        """The layout of this candidate."""
        axis = self.units_axis if self.units_axis > batch else self.units_axis - 1
        return Layout(per_image, batch, axis, self.grid, self.columns_first, self.prefix, self.suffix, order, known)


@dataclass(frozen=True)
class LayerOutput:
    """A layer's output.

    Attributes:
        puts_out: The start of a message about it.
        key: The call that it comes from; None where that was not recorded.
        batch: The axis that counts images.
        per_image: Its other axes.
        units: The units' axis, according to the structure or the user.
    """

    puts_out: str
    key: Key | None
    batch: int
    per_image: tuple[int, ...]
    units: Units

    def layout(self, way: Candidate, known: str, order: tuple[int, ...] | None = None) -> Layout:
        """The layout of one way to read the output; ``known`` states how that way was determined."""
        return way.layout(self.per_image, self.batch, known, order)


def candidates(
    per_image: tuple[int, ...],
    units: Units,
    view: tuple[int, int],
    seen: Sequence[tuple[int, int]],
    declared: int | None,
    told: Reading,
) -> Iterator[Candidate]:
    """Yields ways to read tokens or maps, likeliest first, that agree with the user's declaration.

    Args:
        per_image: The output's axes but the images: two of tokens, three of maps.
        units: The units' axis, as far as the network's structure determines it.
        view: (height, width) of the model's view.
        seen: Sizes of maps that the model computes earlier.
        declared: The model's own number of prefix tokens; None where it declares none.
        told: The user's declaration.
    """
    axes = [axis for axis in ((1, 2) if len(per_image) == 2 else (1, 3, 2)) if axis != units.axis]
    if units.axis is not None:
        axes = [units.axis] if units.certain or told.units_axis is not None else [units.axis, *axes]
    for axis in axes:
        sizes = [size for number, size in enumerate(per_image) if number + 1 != axis]
        sure = units.certain and axis == units.axis
        if len(sizes) == 1:
            yield from _of_tokens(axis, sizes[0], sure, view, seen, declared, told)
            continue
        height, width = sizes
        if min(sizes) == 1 < max(sizes):  # tokens with an extra axis of size 1
            yield from _of_tokens(axis, max(sizes), False, view, seen, declared, told)
        if told.prefix_tokens:
            return
        for grid, columns_first in (((height, width), False), ((width, height), True)):
            # A strip is not a map of a square picture, unless a convolution puts it out.
            fits = (units.of_maps and axis == units.axis) or grid in grids(height * width, view, seen)
            if told.grid == grid or (told.grid is None and fits):
                yield Candidate(axis, grid, columns_first, certain=sure and fits and not columns_first)


def _of_tokens(
    axis: int,
    count: int,
    sure: bool,
    view: tuple[int, int],
    seen: Sequence[tuple[int, int]],
    declared: int | None,
    told: Reading,
) -> Iterator[Candidate]:
    if told.grid is not None:
        positions = told.grid[0] * told.grid[1]
        prefix = count - positions if told.prefix_tokens is None else told.prefix_tokens
        said = told.prefix_tokens is not None or prefix in (0, declared, *(count - h * w for h, w in seen))
        if said and prefix >= 0 and prefix + positions == count:
            yield Candidate(axis, told.grid, prefix=prefix)
        return
    prefixes = [told.prefix_tokens] if told.prefix_tokens is not None else list(dict.fromkeys([declared or 0, 0]))
    for prefix in prefixes:
        if count - prefix == 1:
            yield Candidate(axis, (1, 1), prefix=prefix, certain=sure and prefix == 0)
        for grid in grids(count - prefix, view, seen) if count - prefix > 1 else []:
            yield Candidate(axis, grid, prefix=prefix)
            if min(grid) > 1:
                yield Candidate(axis, grid, True, prefix)
            if told.prefix_tokens is None:
                yield from _apart(axis, grid, prefix)
    for grid in seen if told.prefix_tokens is None else []:  # tokens beyond the positions of the model's own maps
        more = count - grid[0] * grid[1]
        if grid[0] * grid[1] > 1 and 0 < more <= MAX_PREFIX_TOKENS and more not in prefixes:
            yield Candidate(axis, grid, prefix=more)
            yield from _apart(axis, grid, more)
    unsaid = declared is None and told.prefix_tokens is None and not any(h * w > 1 for h, w in seen)
    if unsaid and not grids(count, view):
        for more in range(1, MAX_PREFIX_TOKENS + 1):  # the number of other tokens is unknown
            for grid in grids(count - more, view) if count - more > 1 else []:
                yield Candidate(axis, grid, prefix=more)
                yield from _apart(axis, grid, more)


def _apart(axis: int, grid: tuple[int, int], more: int) -> Iterator[Candidate]:
    """Yields candidates whose other tokens are not all before the positions: after them, or on both sides (YOLOS)."""
    for prefix in range(min(more, MAX_PREFIX_TOKENS + 1)):
        yield Candidate(axis, grid, prefix=prefix, suffix=more - prefix)


def known_orders(model: nn.Module) -> Iterator[tuple[tuple[int, int], tuple[int, ...]]]:
    """Yields token orders that a model itself provides: Hiera's, in timm and transformers, can be undone.

    Yields:
        (height, width) of the grid, and each token's place in it, row by row.
    """
    for module in model.modules():
        schedule = getattr(module, "schedule", None)
        reroll = module if type(module).__name__ == "Reroll" else getattr(module, "reroll", None)
        if not isinstance(schedule, dict) or not callable(reroll):
            continue
        seen = set()
        for stage, (_, size) in schedule.items():
            if len(size) == 2 and tuple(size) not in seen:
                seen.add(tuple(size))
                cells = reroll(torch.arange(size[0] * size[1]).view(1, -1, 1), stage).flatten()
                yield (int(size[0]), int(size[1])), tuple(torch.argsort(cells).tolist())
