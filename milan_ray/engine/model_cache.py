"""Models that a worker keeps loaded between its rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Generic, TypeVar

from torch import nn

from milan_ray.engine import references
from milan_ray.models.registry import ModelSpec

MODELS_MEMORY = 2**30
"""Bytes of weights and states of the models that an actor keeps loaded to run all of them over a shard's images."""

MOST_TOGETHER = 16
"""Models that share a shard's images at most: a row of all of them is the unit of retry."""

T = TypeVar("T")


def together(sizes: Sequence[int]) -> list[list[int]]:
    """Groups models of the same inputs, so that an actor has room for those of a group; one that is larger is alone.

    Args:
        sizes: Bytes that an actor needs for each.

    Returns:
        The places of each group's models in ``sizes``.
    """
    groups: list[list[int]] = []
    used = 0
    for place, size in enumerate(sizes):
        if not groups or used + size > MODELS_MEMORY or len(groups[-1]) == MOST_TOGETHER:
            groups.append([])
            used = 0
        groups[-1].append(place)
        used += size
    return groups


class ModelCache(Generic[T]):
    """Caches up to two models, because rows may arrive out of order.

    An actor runs its two waiting rows in either order. The model before the current one is therefore kept until the
    current one is asked for twice in succession; no model is loaded twice.

    Args:
        build: Loads the model of an index.
    """

    def __init__(self, build: Callable[[int], T]) -> None:
        self._build = build
        self._loaded: dict[int, T] = {}
        self._last: int | None = None

    def __call__(self, index: int) -> T:
        """The model of this index."""
        is_new = index not in self._loaded
        if is_new or index == self._last == next(reversed(self._loaded)):
            while len(self._loaded) > 1:  # before the next one is built: never three at once
                del self._loaded[next(iter(self._loaded))]
        if is_new:
            self._loaded[index] = self._build(index)
        self._last = index
        return self._loaded[index]


class GroupCache(Generic[T]):
    """Keeps what belongs to each model of a group, while rows are for all models of the group in turn.

    Args:
        build: Makes it for the model of an index, when it is first asked for.
    """

    def __init__(self, build: Callable[[int], T]) -> None:
        self._build = build
        self._groups = ModelCache[dict[int, T]](lambda _: {})
        self._group: dict[int, T] = {}

    def turn_to(self, group: int) -> None:
        """Says once per row which group the row is for; the others but the one before may be dropped."""
        self._group = self._groups(group)

    def __call__(self, index: int) -> T:
        """What belongs to the model of this index."""
        if index not in self._group:
            self._group[index] = self._build(index)
        return self._group[index]


@lru_cache(maxsize=1)
def loaded_model(ref: references.ModelRef, device: str) -> tuple[ModelSpec, nn.Module]:
    """A model on a device. A process keeps the last one, because its tasks mostly ask for the same."""
    spec = references.model(ref)
    return spec, spec.load().to(device)
