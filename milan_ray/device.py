"""Which device torch computes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from milan_ray.errors import MilanError


def resolve_device(device: str = "auto") -> torch.device:
    """The torch device behind a name.

    Args:
        device: ``auto`` (CUDA where there is one, else CPU) or anything torch knows, e.g. ``cpu`` or ``cuda:1``.

    Raises:
        MilanError: There is no such device here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device="cpu" if found.type == "cuda" else found)
    except (RuntimeError, NotImplementedError, AssertionError, ValueError) as error:
        raise MilanError(f"there is no device {device!r} here; use --device cpu or auto.") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise MilanError(f"device {device!r} was asked for but CUDA is not available here; use --device cpu or auto.")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise MilanError(f"there is no device {device!r}: {torch.cuda.device_count()} are here; use --device auto.")
    return found


class _Unfilled(TorchFunctionMode):
    """Leaves out random numbers: on tensors without values they would import torch's compiler, which makes folders."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init" or func is torch.Tensor.normal_:
            return (kwargs or {}).get("tensor", args[0] if args else None)
        return func(*args, **(kwargs or {}))


@contextmanager
def without_values() -> Iterator[None]:
    """Modules that are made meanwhile have shapes, and no values."""
    with torch.device("meta"), _Unfilled():
        yield


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """So many threads for a while: another number may change the last bits of a result."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
