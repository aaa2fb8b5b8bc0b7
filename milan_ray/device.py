"""Torch devices and threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from milan_ray.errors import MilanError


def resolve_device(device: str = "auto") -> torch.device:
    """Resolves the name of a torch device.

    Args:
        device: ``auto`` (CUDA where there is one, else CPU) or anything torch knows, e.g. ``cpu`` or ``cuda:1``.

    Raises:
        MilanError: This machine has no such device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device="cpu" if resolved.type == "cuda" else resolved)
    except (RuntimeError, NotImplementedError, AssertionError, ValueError) as error:
        raise MilanError(f"there is no device {device!r} here; use --device cpu or auto.") from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise MilanError(f"device {device!r} was asked for but CUDA is not available here; use --device cpu or auto.")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise MilanError(f"there is no device {device!r}: {torch.cuda.device_count()} are here; use --device auto.")
    return resolved


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies a tensor of the host to a device; the host does not wait for what a GPU has yet to do.

    A copy from ordinary memory first waits until the GPU has finished everything that it was given before, so that the
    GPU idles until the host has prepared more. A copy from pinned memory takes its turn with the rest.

    Args:
        tensor: The tensor; one that is on the device already is returned as it is.
        device: The device.
    """
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Temporarily sets torch's number of threads; another number may change the last bits of a result."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Undrawn(TorchFunctionMode):
    """Leaves out the drawing of random weights."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if (
            func in (torch.Tensor.normal_, torch.Tensor.uniform_)
            or getattr(func, "__module__", "") == torch.nn.init.__name__
        ):
            return args[0] if args else named["tensor"]
        return func(*args, **named)


@contextmanager
def without_weights() -> Iterator[None]:
    """Builds networks without weights inside the context: their tensors have shapes, on torch's device ``meta``.

    Nothing is drawn for them: torch would load its compiler for that, at the cost of a second.
    """
    with torch.device("meta"), _Undrawn():
        yield
