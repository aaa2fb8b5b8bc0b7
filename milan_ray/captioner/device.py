"""Where tensors live."""

from __future__ import annotations

import torch


def resolve_device(name: str = "auto") -> torch.device:
    """The device of a name; ``auto`` is CUDA when there is one, else the CPU."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
