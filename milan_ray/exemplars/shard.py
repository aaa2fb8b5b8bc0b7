"""What one shard of the probe contributes to one layer's exemplars, and how shards fold into the layer's answer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from milan_ray.errors import MilanError
from milan_ray.exemplars.levels import RunningLevel, positions_per_image, sample_positions
from milan_ray.exemplars.topk import NO_IMAGE, RunningTopK

KERNEL_VERSION = "exemplars-1"
"""Part of every configuration hash: raised when the arithmetic below changes its results."""


@dataclass(frozen=True)
class Plan:
    """What decides a layer's states, known before the first image.

    Attributes:
        images: Images in the whole probe.
        k: Exemplars per unit.
        quantile: q of the levels.
        samples: Positions per unit counted exactly (see :mod:`milan_ray.exemplars.levels`).
        map_budget: Bytes of maps a state may carry; beyond it maps are left to be recomputed.
    """

    images: int
    k: int
    quantile: float
    samples: int
    map_budget: int

    def carries_maps(self, units: int, map_shape: tuple[int, int]) -> bool:
        """Whether the maps of the top k ride along."""
        return 4 * units * self.k * map_shape[0] * map_shape[1] <= self.map_budget


@dataclass
class LayerState:
    """One layer's mergeable state: top-k images and levels.

    Attributes:
        plan: What decides its shape.
        map_shape: (h, w) of the layer's maps.
        topk: The images that excite each unit most.
        level: The activations that settle each unit's level.
    """

    plan: Plan
    map_shape: tuple[int, int]
    topk: RunningTopK
    level: RunningLevel

    @classmethod
    def empty(
        cls, plan: Plan, units: int, map_shape: tuple[int, int], device: str | torch.device = "cpu"
    ) -> LayerState:
        """The state before any image, for a layer with U units and maps of (h, w)."""
        carried = map_shape if plan.carries_maps(units, map_shape) else None
        per_image = positions_per_image(plan.images, map_shape[0] * map_shape[1], plan.samples)
        return cls(
            plan,
            map_shape,
            RunningTopK.empty(units, plan.k, carried, device),
            RunningLevel.empty(units, plan.quantile, plan.images * per_image, device),
        )

    @property
    def exact(self) -> bool:
        """Whether the level counts every position."""
        positions = self.map_shape[0] * self.map_shape[1]
        return positions_per_image(self.plan.images, positions, self.plan.samples) == positions

    def update(self, maps: torch.Tensor, image_ids: np.ndarray, bar: torch.Tensor | None = None) -> torch.Tensor:
        """Adds a batch of images, each id once per state.

        NaN and infinite activations are left out of everything and counted.

        Args:
            maps: float (B, U, h, w), the layer's activation maps.
            image_ids: int64 (B,).
            bar: (U,), activations below which an image need not enter.

        Returns:
            float32 (B, U): the images' activations, maxima over positions.

        Raises:
            MilanError: The maps have another size than the batches before.
        """
        if tuple(maps.shape[2:]) != self.map_shape or maps.shape[1] != len(self.topk.ids):
            raise MilanError(
                f"its output changed from {(len(self.topk.ids), *self.map_shape)} to {tuple(maps.shape[1:])} "
                "(units, height, width) between batches; dissect a layer whose shape is fixed."
            )
        maps = maps.to(torch.float32)
        flat = maps.flatten(2)
        pooled = flat.amax(dim=2)
        broken = ~torch.isfinite(pooled)
        if bool(broken.any()):
            bad = flat[broken]
            pooled[broken] = bad.masked_fill(~torch.isfinite(bad), -torch.inf).amax(dim=1)
        ids = torch.from_numpy(image_ids).to(pooled.device)
        self.topk.update(pooled, ids, maps if self.topk.maps is not None else None, bar)
        self.level.update(self._positions(flat, image_ids))
        return pooled

    def _positions(self, flat: torch.Tensor, image_ids: np.ndarray) -> torch.Tensor:
        """The activations (U, B·s) that count for the levels, from maps (B, U, P)."""
        units, positions = flat.shape[1:]
        count = positions_per_image(self.plan.images, positions, self.plan.samples)
        if count < positions:
            chosen = torch.from_numpy(sample_positions(image_ids, count, positions)).to(flat.device)
            flat = flat.gather(2, chosen[:, None, :].expand(-1, units, -1))
        # A copy in any case: what is counted may be reordered.
        return flat.transpose(0, 1).clone(memory_format=torch.contiguous_format).view(units, -1)

    def merge(self, other: LayerState) -> None:
        """Adds the images of another state of the same plan; each shard only once (levels count)."""
        self.topk.merge(other.topk)
        self.level.merge(other.level)


def _lists(values: np.ndarray, lengths: np.ndarray, type_: pa.DataType) -> pa.LargeListArray:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(values, type_))


def to_table(state: LayerState, emitted: RunningTopK) -> pa.Table:
    """A shard's contribution as a table, one row per unit.

    Args:
        state: The shard's state.
        emitted: Its candidates, thinned out by what was known already.

    Returns:
        Columns unit, image_ids, activations, maps (flattened), tail, counted, nonfinite; the rest in the metadata.
    """
    valid = (emitted.ids != NO_IMAGE).cpu()
    lengths = valid.sum(dim=1).numpy()
    h, w = state.map_shape
    carried = emitted.maps is not None
    maps = emitted.maps.cpu()[valid].flatten().numpy() if emitted.maps is not None else np.zeros(0, np.float32)
    tail = state.level.sorted_tail().cpu().numpy()
    units = len(valid)
    table = pa.table(
        {
            "unit": pa.array(np.arange(units), pa.int32()),
            "image_ids": _lists(emitted.ids.cpu()[valid].numpy(), lengths, pa.int64()),
            "activations": _lists(emitted.values.cpu()[valid].numpy(), lengths, pa.float32()),
            "maps": _lists(maps, lengths * h * w * carried, pa.float32()),
            "tail": _lists(tail.ravel(), np.full(units, tail.shape[1]), pa.float32()),
            "counted": pa.array(state.level.counted.cpu().numpy(), pa.int64()),
            "nonfinite": pa.array(state.level.nonfinite.cpu().numpy(), pa.int64()),
        }
    )
    return table.replace_schema_metadata({"height": str(h), "width": str(w)})


def from_table(table: pa.Table, plan: Plan) -> LayerState:
    """Rebuilds a state from a shard's contribution."""
    h, w = (int(table.schema.metadata[key]) for key in (b"height", b"width"))
    state = LayerState.empty(plan, len(table), (h, w))
    image_ids = table["image_ids"].combine_chunks()
    lengths = np.diff(image_ids.offsets.to_numpy())
    slots = torch.from_numpy(np.arange(plan.k)[None, :] < lengths[:, None])

    def values(name: str) -> torch.Tensor:
        flat = table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return torch.from_numpy(np.array(flat))

    state.topk.values[slots] = values("activations")
    state.topk.ids[slots] = values("image_ids")
    if state.topk.maps is not None:
        state.topk.maps[slots] = values("maps").reshape(-1, h, w)
    state.level.tail = values("tail").reshape(len(table), -1)
    state.level.counted = torch.from_numpy(np.array(table["counted"].to_numpy()))
    state.level.nonfinite = torch.from_numpy(np.array(table["nonfinite"].to_numpy()))
    return state


def fold(tables: Iterable[pa.Table], plan: Plan) -> LayerState:
    """Folds shards' contributions, each given once, in any order, into the layer's answer.

    Raises:
        ValueError: There are none.
    """
    total: LayerState | None = None
    for table in tables:
        state = from_table(table, plan)
        if total is None:
            total = state
        else:
            total.merge(state)
    if total is None:
        raise ValueError("nothing to fold")
    return total
