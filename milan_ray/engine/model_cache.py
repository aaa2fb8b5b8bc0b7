"""Models that a worker keeps loaded between its rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Generic, TypeVar

from torch import nn

from milan_ray.engine import references
from milan_ray.models.registry import ModelSpec

T = TypeVar("T")


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


@lru_cache(maxsize=1)
def loaded_model(ref: references.ModelRef, device: str) -> tuple[ModelSpec, nn.Module]:
    """A model on a device. A process keeps the last one, because its tasks mostly ask for the same."""
    spec = references.model(ref)
    return spec, spec.load().to(device)
