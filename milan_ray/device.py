"""Which device torch computes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from milan_ray.errors import MilanError


def resolve_device(device: str = "auto") -> torch.device:
    """The torch device behind a name.

    Args:
        device: ``auto`` (CUDA where there is one, else CPU) or anything torch knows, e.g. ``cpu`` or ``cuda:1``.

    Raises:
        MilanError: CUDA was asked for and there is none.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = torch.device(device)
    if found.type == "cuda" and not torch.cuda.is_available():
        raise MilanError(f"device {device!r} was asked for but CUDA is not available here; use --device cpu or auto.")
    return found


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """So many threads for a while: another number may change the last bits of a result."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
