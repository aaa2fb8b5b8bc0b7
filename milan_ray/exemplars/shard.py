"""Mergeable state of one layer: the contribution of a shard of the probe, and the merging of shards."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch

from milan_ray.device import to_device
from milan_ray.errors import MilanError
from milan_ray.exemplars.levels import RunningLevel, positions_per_image, sample_positions
from milan_ray.exemplars.pooled import maxima
from milan_ray.exemplars.sparse_levels import SparseLevel
from milan_ray.exemplars.sparse_maps import SparseMaps
from milan_ray.exemplars.topk import NO_IMAGE, RunningTopK
from milan_ray.storage import WorkRemovedError

KERNEL_VERSION = "exemplars-2"
"""Part of every fingerprint; increased when the arithmetic below changes its results."""


@dataclass(frozen=True)
class StateConfig:
    """Parameters of a layer's states, known before the first image.

    Attributes:
        images: Images in the whole probe.
        k: Exemplars per unit.
        quantile: q of the levels.
        samples: Positions per unit counted exactly (see :mod:`milan_ray.exemplars.levels`).
        map_budget: Maximum size of the maps in a state, bytes; larger maps are recomputed later instead.
    """

    images: int
    k: int
    quantile: float
    samples: int
    map_budget: int

    def carries_maps(self, units: int, map_shape: tuple[int, int]) -> bool:
        """Whether the state stores the maps of its top-k images."""
        return 4 * units * self.k * map_shape[0] * map_shape[1] <= self.map_budget

    def committed_bytes(self, units: int, map_shape: tuple[int, int]) -> int:
        """Bytes at most of a layer's :class:`Committed` results: of the activations that decide its level."""
        positions = self.images * positions_per_image(self.images, map_shape[0] * map_shape[1], self.samples)
        return 4 * units * (math.ceil((1 - self.quantile) * positions) + 2)


@dataclass
class LayerState:
    """One layer's mergeable state: top-k images and levels.

    Attributes:
        plan: The state's parameters.
        map_shape: (h, w) of the layer's maps.
        topk: The images that activate each unit most.
        level: The activations that determine each unit's level.
        rectified: Whether activations are never below zero and zero means absent, so that no image without any is an
            exemplar.
    """

    plan: StateConfig
    map_shape: tuple[int, int]
    topk: RunningTopK
    level: RunningLevel | SparseLevel
    rectified: bool = False

    @classmethod
    def empty(
        cls,
        plan: StateConfig,
        units: int,
        map_shape: tuple[int, int],
        device: str | torch.device = "cpu",
        rectified: bool = False,
    ) -> LayerState:
        """The state before any image, for a layer with U units and maps of (h, w)."""
        carried = map_shape if plan.carries_maps(units, map_shape) else None
        per_image = positions_per_image(plan.images, map_shape[0] * map_shape[1], plan.samples)
        planned = plan.images * per_image
        level: RunningLevel | SparseLevel
        if rectified and torch.device(device).type == "cpu":
            level = SparseLevel.empty(units, plan.quantile, planned)
        else:
            level = RunningLevel.empty(units, plan.quantile, planned, device)
        return cls(plan, map_shape, RunningTopK.empty(units, plan.k, carried, device), level, rectified)

    @property
    def exact(self) -> bool:
        """Whether the level counts every position."""
        positions = self.map_shape[0] * self.map_shape[1]
        return positions_per_image(self.plan.images, positions, self.plan.samples) == positions

    def update(
        self, maps: torch.Tensor | SparseMaps, image_ids: np.ndarray, known: Committed | None = None
    ) -> torch.Tensor:
        """Adds a batch of images, each id once per state.

        NaN and infinite activations are ignored, and counted.

        Args:
            maps: float32 (B, U, h, w), the layer's activation maps, in either memory format.
            image_ids: int64 (B,).
            known: The actor's committed results; values below their lower bounds are skipped.

        Returns:
            float32 (B, U): the images' activations, maxima over positions.

        Raises:
            MilanError: The maps have another size than earlier batches.
        """
        self._check(tuple(maps.shape[1:]))
        topk_bound, level_bound = (None, None) if known is None else known.lower_bounds
        pooled = maxima(maps)
        if isinstance(maps, SparseMaps):
            assert isinstance(self.level, SparseLevel)
            units, values, per_unit = self._found(maps, image_ids)
            self.level.update_found(units, values, per_unit, level_bound)
            carried = maps.dense() if self.topk.carries_maps else None
        else:
            carried = maps
            self.level.update(self._positions(maps, image_ids), level_bound)
        ids = to_device(torch.from_numpy(image_ids), pooled.device)
        entering = pooled.masked_fill(pooled <= 0, -torch.inf) if self.rectified else pooled
        self.topk.update(entering, ids, carried if self.topk.carries_maps else None, topk_bound)
        return pooled

    def _found(self, maps: SparseMaps, image_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        """Units and activations that are stored for the positions that count, and the number of these positions."""
        positions = self.map_shape[0] * self.map_shape[1]
        count = positions_per_image(self.plan.images, positions, self.plan.samples)
        units, values = maps.features.flatten(1, 2), maps.values.flatten(1, 2)
        if count < positions:
            chosen = torch.from_numpy(sample_positions(image_ids, count, positions))[:, :, None]
            chosen = chosen.expand(-1, -1, units.shape[2])
            units, values = units.gather(1, chosen), values.gather(1, chosen)
        return units.numpy().ravel(), values.numpy().ravel(), len(image_ids) * count

    def _positions(self, maps: torch.Tensor, image_ids: np.ndarray) -> torch.Tensor:
        """The activations that count for the levels, (m, U, n), from maps (B, U, h, w); a view if possible."""
        images, units = maps.shape[:2]
        positions = self.map_shape[0] * self.map_shape[1]
        count = positions_per_image(self.plan.images, positions, self.plan.samples)
        chosen = torch.empty(0, dtype=torch.int64)
        if count < positions:
            chosen = to_device(torch.from_numpy(sample_positions(image_ids, count, positions)), maps.device)
        if maps.stride(1) == 1:  # units last in memory, as in channels_last convolutions and transformers
            rows = maps.permute(0, 2, 3, 1).reshape(-1, units)
            if count < positions:
                first = torch.arange(images, device=maps.device)[:, None] * positions
                rows = rows.index_select(0, (first + chosen).flatten())
            return rows[:, :, None]
        flat = maps.flatten(2)
        if count < positions:
            flat = flat.gather(2, chosen[:, None, :].expand(-1, units, -1))
        return flat.contiguous()

    def _check(self, shape: tuple[int, ...]) -> None:
        """Rejects maps whose shape (U, h, w) differs from earlier maps."""
        own = (len(self.topk.ids), *self.map_shape)
        if shape != own:
            raise MilanError(
                f"its output changed from {own} to {shape} (units, height, width) between batches; "
                "dissect a layer whose shape is fixed."
            )

    def merge(self, other: LayerState) -> None:
        """Adds the images of another state of the same plan.

        Merge each shard only once, because levels count positions.

        Raises:
            MilanError: The other state's maps have another size.
        """
        self._check((len(other.topk.ids), *other.map_shape))
        self.topk.merge(other.topk)
        if isinstance(self.level, SparseLevel):
            assert isinstance(other.level, SparseLevel)
            self.level.merge(other.level)
        else:
            assert isinstance(other.level, RunningLevel)
            self.level.merge(other.level)


class LayerStates:
    """The states of all layers of a model, created when a layer's first maps arrive.

    Layers are independent, so on a CPU several threads update them at the same time. The numpy kernels use one thread
    each, and the forward pass, which uses all threads, has finished by then.

    Attributes:
        states: Layer → its state.
    """

    def __init__(self, plan: StateConfig, threads: int = 1, rectified: Collection[str] = ()) -> None:
        """Starts empty.

        Args:
            plan: The states' parameters.
            threads: Number of layers that are updated at the same time; results do not depend on it.
            rectified: Layers whose activations are never below zero and absent at zero.
        """
        self.states: dict[str, LayerState] = {}
        self._plan, self._rectified = plan, frozenset(rectified)
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def update(
        self,
        maps: Mapping[str, torch.Tensor | SparseMaps],
        image_ids: np.ndarray,
        known: dict[str, Committed] | None = None,
    ) -> None:
        """Adds a batch of images to every layer.

        Args:
            maps: Layer → float32 (B, U, h, w).
            image_ids: int64 (B,).
            known: Layer → the actor's committed results; layers that are not in it are added.

        Raises:
            MilanError: A layer's maps have another size than earlier batches; the message names the layer.
        """
        for layer, batch in maps.items():
            if layer not in self.states:
                shape = batch.shape[2], batch.shape[3]
                self.states[layer] = LayerState.empty(
                    self._plan, batch.shape[1], shape, batch.device, layer in self._rectified
                )
            if known is not None and layer not in known:
                known[layer] = Committed(self.states[layer])

        def update_layer(layer: str) -> None:
            with layer_in_errors(layer):
                self.states[layer].update(maps[layer], image_ids, None if known is None else known[layer])

        if self._pool is None or any(batch.is_cuda for batch in maps.values()):
            for layer in maps:
                update_layer(layer)
        else:
            largest_first = sorted(maps, key=lambda layer: -maps[layer].numel())
            list(self._pool.map(update_layer, largest_first))


@contextmanager
def layer_in_errors(layer: str) -> Iterator[None]:
    """Prefixes errors with the layer's name."""
    try:
        yield
    except WorkRemovedError:
        raise
    except MilanError as error:
        raise MilanError(f"layer {layer!r}: {error}") from error


class Committed:
    """Results of one layer that this actor has already written; used to skip values that cannot matter any more.

    Only committed shards raise the lower bounds, each shard once. So every value left out of a shard is exceeded by
    values of other committed shards, even if another actor runs the shard again or the order changes.
    """

    def __init__(self, state: LayerState) -> None:
        """Starts with no committed shards, for states of the same shape as ``state``."""
        plan = replace(state.plan, map_budget=0)
        self._state = LayerState.empty(
            plan, len(state.topk.ids), state.map_shape, state.topk.ids.device, state.rectified
        )
        self._shards: set[int] = set()

    @property
    def lower_bounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Activations below which an image cannot enter the top k, and a position cannot matter for the level: (U,)."""
        return self._state.topk.lower_bound, self._state.level.lower_bound

    def delta(self, state: LayerState) -> RunningTopK:
        """The entries of a shard's top k that remain after merging with the committed top k."""
        union = state.topk.without_maps()
        union.merge(self._state.topk)
        return state.topk.within(union)

    def commit(self, shard: int, state: LayerState) -> None:
        """Merges a shard whose result is stored; raises the lower bounds."""
        if shard not in self._shards:
            self._shards.add(shard)
            self._state.merge(state)
            self._state.level.trim()


def _lists(values: np.ndarray, lengths: np.ndarray, type_: pa.DataType) -> pa.LargeListArray:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(values, type_))


def to_table(state: LayerState, emitted: RunningTopK) -> pa.Table:
    """Converts a shard's contribution to a table, one row per unit.

    Args:
        state: The shard's state.
        emitted: The shard's top k without the images that the committed top k excludes.

    Returns:
        Columns unit, image_ids, activations, maps (flattened), tail, counted, nonfinite; the rest in the metadata.
    """
    valid = (emitted.ids != NO_IMAGE).cpu()
    lengths = valid.sum(dim=1).numpy()
    h, w = state.map_shape
    carried = emitted.carries_maps
    maps = np.zeros(0, np.float32)
    if carried:
        unit, rank = torch.nonzero(emitted.ids != NO_IMAGE, as_tuple=True)
        maps = emitted.maps_of(unit, rank).flatten().cpu().numpy()
    tail, kept = state.level.sorted_values()
    units = len(valid)
    table = pa.table(
        {
            "unit": pa.array(np.arange(units), pa.int32()),
            "image_ids": _lists(emitted.ids.cpu()[valid].numpy(), lengths, pa.int64()),
            "activations": _lists(emitted.values.cpu()[valid].numpy(), lengths, pa.float32()),
            "maps": _lists(maps, lengths * h * w * carried, pa.float32()),
            "tail": _lists(tail, kept, pa.float32()),
            "counted": pa.array(state.level.counted.cpu().numpy(), pa.int64()),
            "nonfinite": pa.array(state.level.nonfinite.cpu().numpy(), pa.int64()),
        }
    )
    rectified = {"rectified": "true"} if state.rectified else {}
    return table.replace_schema_metadata({"height": str(h), "width": str(w), **rectified})


def from_table(table: pa.Table, plan: StateConfig) -> LayerState:
    """Rebuilds a shard's contribution as a state that can be merged; its k is the length of its longest list."""
    h, w = (int(table.schema.metadata[key]) for key in (b"height", b"width"))
    rectified = b"rectified" in table.schema.metadata
    state = LayerState.empty(replace(plan, k=0), len(table), (h, w), rectified=rectified)

    def values(name: str) -> torch.Tensor:
        return torch.from_numpy(np.array(table[name].combine_chunks().flatten()))

    def dense(name: str, slots: torch.Tensor, blank: float) -> torch.Tensor:
        flat = values(name)
        return torch.full(slots.shape, blank, dtype=flat.dtype).masked_scatter_(slots, flat)

    def slots(name: str) -> torch.Tensor:
        lengths = np.diff(table[name].combine_chunks().offsets.to_numpy())
        return torch.from_numpy(np.arange(lengths.max(initial=0))[None, :] < lengths[:, None])

    images = slots("image_ids")
    maps = None
    if plan.carries_maps(len(table), (h, w)):
        maps = torch.zeros((*images.shape, h, w))
        maps[images] = values("maps").reshape(-1, h, w)
    state.topk = RunningTopK(dense("activations", images, -torch.inf), dense("image_ids", images, NO_IMAGE), maps)
    if isinstance(state.level, SparseLevel):
        lengths = np.diff(table["tail"].combine_chunks().offsets.to_numpy())
        state.level.update_found(np.repeat(np.arange(len(table)), lengths), values("tail").numpy(), 0)
    else:
        state.level.merge(replace(state.level, tail=dense("tail", slots("tail"), -torch.inf)))
    state.level.counted = torch.from_numpy(np.array(table["counted"].to_numpy()))
    state.level.nonfinite = torch.from_numpy(np.array(table["nonfinite"].to_numpy()))
    return state


def fold(tables: Iterable[pa.Table], plan: StateConfig) -> LayerState:
    """Merges the contributions of all shards, each once and in any order, into the layer's result.

    Raises:
        MilanError: The shards have maps of different sizes.
        ValueError: There are no shards.
    """
    total: LayerState | None = None
    for table in tables:
        state = from_table(table, plan)
        if total is None:
            total = LayerState.empty(plan, len(table), state.map_shape, rectified=state.rectified)
        total.merge(state)
    if total is None:
        raise ValueError("nothing to fold")
    return total
