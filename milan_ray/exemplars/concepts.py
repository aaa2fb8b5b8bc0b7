"""Counts the positions that unit masks and concept maps share (network dissection; docs/labelers.md).

Masks are packed into 64-bit words, row-major, so that the intersection of thousands of positions takes a few dozen
bitwise operations and every count is an exact integer.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F

from milan_ray.models.view import View

TARGET_SIDE = 56
"""Positions along the shorter side of a large view: 224 pixels / 4, as in the 2020 version of network dissection."""

_WORDS = 1 << 21
"""Maximum number of words in an intermediate product: 16 MiB."""

_SCHEMA = pa.schema([("concept", pa.string()), ("size", pa.int64()), ("both", pa.large_list(pa.int64()))])


def grid_size(shape: tuple[int, int]) -> tuple[int, int]:
    """Size of the grid on which positions are counted: the view divided by an integer, about 56 on the shorter side.

    Args:
        shape: (height, width) of the view, pixels.
    """
    step = max(1, round(min(shape) / TARGET_SIDE))
    return max(1, shape[0] // step), max(1, shape[1] // step)


def sample(maps: Mapping[str, np.ndarray], view: View, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Samples concept maps on a grid over a model's view, with its resizing and cropping, by nearest neighbour.

    Args:
        maps: Concept → bool (H, W) of the whole image, at any resolution.
        view: The model's view.
        size: (h, w) of the grid over the view.

    Returns:
        Concept → bool (h, w), only for concepts that occur in the view.
    """
    sampled = {}
    places: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
    for concept, whole in maps.items():
        height, width = whole.shape
        if (height, width) not in places:
            places[height, width] = _places(view, (height, width), size)
        rows, columns = places[height, width]
        seen = whole[np.ix_(rows.clip(0), columns.clip(0))] & (rows >= 0)[:, None] & (columns >= 0)
        if seen.any():
            sampled[concept] = seen
    return sampled


def _places(view: View, source: tuple[int, int], size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The source row of each grid row and the source column of each grid column; −1 outside the source."""
    resized = source
    if isinstance(view.resize, tuple):
        resized = view.resize
    elif view.resize is not None:  # resizes the shorter side, with torchvision's rounding
        short = min(source)
        height, width = (view.resize if side == short else int(view.resize * side / short) for side in source)
        resized = height, width
    places = []
    for axis in range(2):
        shown, whole = view.shape[axis], resized[axis]
        offset = 0 if view.crop is None else view.offset(whole, shown)
        at = (np.arange(size[axis]) + 0.5) * (shown / size[axis]) + offset
        place = np.floor(at * (source[axis] / whole)).astype(np.int64)
        places.append(np.where((at >= 0) & (at < whole), place.clip(0, source[axis] - 1), -1))
    return places[0], places[1]


def pack_words(masks: np.ndarray) -> np.ndarray:
    """Packs masks bool (N, …) into uint64 (N, W), row-major; pads the last word with zeros."""
    flat = np.packbits(masks.reshape(len(masks), math.prod(masks.shape[1:])), axis=1)
    return np.pad(flat, ((0, 0), (0, -flat.shape[1] % 8))).view(np.uint64)


def fires(maps: torch.Tensor, levels: torch.Tensor, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The units that fire on an image, and their masks: the bilinearly upsampled map is above the level.

    The map's border is repeated outward, as in Mu and Andreas (2020). The exemplars' masks fade to zero outward
    instead, which is above the level of a unit with a negative level.

    Args:
        maps: float (U, h, w).
        levels: float32 (U,), on the same device.
        size: (h, w) of the grid.

    Returns:
        The units, int64 (a,), ascending; their masks, uint64 (a, W).
    """
    # Bilinear values never exceed the values that they are interpolated from.
    units = torch.nonzero((maps > levels[:, None, None]).flatten(1).any(1))[:, 0]
    chosen = maps[units].float()
    above = F.interpolate(chosen[None], size=size, mode="bilinear")[0] if len(units) else chosen.new_zeros((0, *size))
    on = (above > levels[units, None, None]).cpu().numpy()
    some = on.any(axis=(1, 2))
    return units.cpu().numpy()[some], pack_words(on[some])


def _swar(words: np.ndarray) -> np.ndarray:
    """The number of bits set in each word, by parallel addition of bit fields; for numpy before 2.0."""
    ones, twos, fours = (np.uint64(x) for x in (0x5555555555555555, 0x3333333333333333, 0x0F0F0F0F0F0F0F0F))
    words = words - ((words >> np.uint64(1)) & ones)
    words = (words & twos) + ((words >> np.uint64(2)) & twos)
    words = (words + (words >> np.uint64(4))) & fours
    return (words * np.uint64(0x0101010101010101)) >> np.uint64(56)


popcount = getattr(np, "bitwise_count", _swar)
"""The number of bits set in each word of an array."""


def shared(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Counts the positions that each pair of masks shares.

    Args:
        left: uint64 (N, W).
        right: uint64 (M, W).

    Returns:
        int64 (N, M).
    """
    counts = np.zeros((len(left), len(right)), np.int64)
    step = max(1, _WORDS // max(1, right.size))
    for start in range(0, len(left), step):
        both = left[start : start + step, None] & right[None]
        counts[start : start + step] = popcount(both).sum(axis=-1, dtype=np.int64)
    return counts


def areas(masks: np.ndarray) -> np.ndarray:
    """Counts the positions of masks uint64 (…, W): int64 (…)."""
    return popcount(masks).sum(axis=-1, dtype=np.int64)


@dataclass(frozen=True)
class ImageMasks:
    """Packed concept maps of one image, and packed masks of the units that fire on it.

    Attributes:
        names: Its c concepts.
        concepts: Their maps, uint64 (c, W).
        units: The a units that fire.
        masks: Their masks, uint64 (a, W).
        positions: Positions of the grid.
    """

    names: Sequence[str]
    concepts: np.ndarray
    units: np.ndarray
    masks: np.ndarray
    positions: int


class ConceptCounts:
    """Separate and joint counts of units and concepts, as integers, so any split, order and merge is exact.

    Add every image once. Concepts need not be known in advance.

    Attributes:
        positions: Positions counted.
        images: Images counted.
        unit: int64 (U,), positions where each unit is on: |M|.
        size: Concept → positions where it occurs: |L|.
        both: Concept → int64 (U,), positions where it occurs and the unit is on: |M ∧ L|.
    """

    def __init__(self, units: int) -> None:
        """Starts empty, for U units."""
        self.positions = self.images = 0
        self.unit = np.zeros(units, np.int64)
        self.size: Counter[str] = Counter()
        self.both: defaultdict[str, np.ndarray] = defaultdict(partial(np.zeros, units, np.int64))

    def update(self, seen: ImageMasks) -> None:
        """Counts one image."""
        self.positions += seen.positions
        self.images += 1
        self.unit[seen.units] += areas(seen.masks)
        together = shared(seen.masks, seen.concepts)
        self.size.update(dict(zip(seen.names, areas(seen.concepts).tolist(), strict=True)))
        for column, name in enumerate(seen.names):
            self.both[name][seen.units] += together[:, column]

    def merge(self, other: ConceptCounts) -> None:
        """Adds the counts of another state.

        Raises:
            ValueError: The other state has another number of units.
        """
        if len(self.unit) != len(other.unit):
            raise ValueError(f"counts of {len(self.unit)} and of {len(other.unit)} units cannot be merged")
        self.positions += other.positions
        self.images += other.images
        self.unit += other.unit
        self.size.update(other.size)
        for name, counts in other.both.items():
            self.both[name] += counts

    def result(self) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
        """The counted concepts, sorted; |L|, int64 (C,); |M ∧ L|, int64 (U, C)."""
        names = tuple(sorted(self.size))
        sizes = np.array([self.size[name] for name in names], np.int64)
        both = np.zeros((len(self.unit), len(names)), np.int64)
        for column, name in enumerate(names):
            both[:, column] = self.both[name]
        return names, sizes, both

    def to_table(self) -> pa.Table:
        """The state as a table: a row without a concept, with positions and |M|, then a row per concept, sorted."""
        names, sizes, both = self.result()
        rows = np.concatenate([self.unit[None], both.T])
        offsets = np.arange(len(rows) + 1, dtype=np.int64) * len(self.unit)
        lists = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(rows.ravel()))
        columns = [pa.array([None, *names], pa.string()), pa.array([self.positions, *sizes.tolist()]), lists]
        return pa.table(columns, schema=_SCHEMA.with_metadata({"images": str(self.images)}))

    @classmethod
    def from_table(cls, table: pa.Table) -> ConceptCounts:
        """Rebuilds the state from the result of :meth:`to_table`."""
        table = table.combine_chunks()
        rows = table["both"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
        state = cls(rows.shape[1])
        state.unit += rows[0]
        names, sizes = table["concept"].to_pylist(), table["size"].to_pylist()
        state.positions, state.images = sizes[0], int((table.schema.metadata or {})[b"images"])
        state.size.update(dict(zip(names[1:], sizes[1:], strict=True)))
        state.both.update({name: rows[place].copy() for place, name in enumerate(names) if place})
        return state


def iou(both: np.ndarray, unit: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Intersection over union from counts: |M ∧ L| / (|M| + |L| − |M ∧ L|), float64; 0 if neither is ever on."""
    union = unit + size - both
    return both / np.maximum(union, 1)
