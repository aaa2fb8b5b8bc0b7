"""Detects changes of a layer's output by later parts of the network that write into it in place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

RESHAPED = "its output is turned in place by what follows, so that its axes are others afterwards"
OVERWRITTEN = "its output is overwritten in place by what follows, and nothing of it is left afterwards"
CHANGED = (
    "is changed in place by what follows it, as an addition, and shows as it is then; activations='pre' shows its own"
)

_FUNCTIONS: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    F.relu,
    F.relu6,
    F.silu,
    F.hardswish,
    F.leaky_relu,
    partial(F.leaky_relu, negative_slope=0.1),
    partial(F.leaky_relu, negative_slope=0.2),
    F.elu,
    F.selu,
    F.hardtanh,
    F.hardsigmoid,
    F.mish,
    torch.sigmoid,
    torch.tanh,
)
"""Activation functions that can work in place and need no module."""


@dataclass
class _Seen:
    tensor: torch.Tensor
    copy: torch.Tensor
    shape: torch.Size
    stride: tuple[int, ...]


class Watch:
    """Copies layers' outputs, and reports how the outputs were changed by the end of the pass.

    A change by an in-place activation function is not reported: as in the reference, its result counts as the layer's
    output.
    """

    def __init__(self) -> None:
        self._seen: dict[str, _Seen] = {}

    def see(self, layer: str, tensor: torch.Tensor) -> None:
        """Records a layer's output, and replaces an earlier one."""
        copy = tensor.detach().clone()
        self._seen[layer] = _Seen(tensor, copy, tensor.shape, tensor.stride() if not tensor.is_quantized else ())

    def activated(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        """Hook for activation modules: their in-place result counts as the layer's output."""
        for layer, seen in list(self._seen.items()):
            if args and args[0] is seen.tensor and output is seen.tensor:
                self.see(layer, seen.tensor)

    def forget(self) -> None:
        """Discards all copies."""
        self._seen.clear()

    def changed(self) -> dict[str, str]:
        """Layer → how its output was changed: :data:`RESHAPED`, :data:`OVERWRITTEN` or :data:`CHANGED`."""
        changes = {layer: _change(seen) for layer, seen in self._seen.items()}
        return {layer: change for layer, change in changes.items() if change is not None}


def _change(seen: _Seen) -> str | None:
    now, before = seen.tensor.detach(), seen.copy
    if now.shape != seen.shape or (not now.is_quantized and now.stride() != seen.stride):
        return RESHAPED
    if _same(now, before):
        return None
    if now.is_quantized:
        return CHANGED
    if any(_same(now, function(before)) for function in _FUNCTIONS):
        return None
    return OVERWRITTEN if bool((now == now.flatten()[0]).all()) else CHANGED


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.is_quantized:
        return torch.equal(one, other)
    return torch.equal(one.nan_to_num(), other.nan_to_num())
