"""Detects side effects of a forward pass: drawing random numbers, and changing the network."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

_SMALL = 2**16
"""Largest size of a parameter that is restored after a pass changed it; changes to larger ones are only reported."""


class Watched:
    """Snapshot of a network's tensors and of the random generators before some forward passes.

    Args:
        model: The network.
        device: Its device.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._model, self._device = model, device
        self._tensors = dict(self._named())
        self._sums = {name: _sum(tensor) for name, (tensor, _) in self._tensors.items()}
        self._copies = {
            name: tensor.detach().clone()
            for name, (tensor, is_buffer) in self._tensors.items()
            if is_buffer or tensor.numel() <= _SMALL
        }
        self._torch, self._others = self._torch_state(), _other_states()

    def _named(self) -> Iterator[tuple[str, tuple[torch.Tensor, bool]]]:
        for named, is_buffer in ((self._model.named_parameters, False), (self._model.named_buffers, True)):
            for name, tensor in named():
                if not nn.parameter.is_lazy(tensor) and not tensor.is_meta:
                    yield name, (tensor, is_buffer)

    def _torch_state(self) -> list[torch.Tensor]:
        states = [torch.get_rng_state()]
        return [*states, torch.cuda.get_rng_state(self._device)] if self._device.type == "cuda" else states

    @property
    def drew(self) -> bool:
        """Whether torch's random numbers were drawn since the snapshot."""
        return any(not torch.equal(one, other) for one, other in zip(self._torch, self._torch_state(), strict=True))

    @property
    def drew_elsewhere(self) -> str | None:
        """Which other generator was used since the snapshot: numpy's or Python's; None for neither."""
        return next((name for name, state in _other_states().items() if state != self._others[name]), None)

    def changed(self) -> list[str]:
        """Parameters and buffers whose values changed since the snapshot, without counters and changes of size."""
        now = dict(self._named())
        return [
            name
            for name, (tensor, _) in self._tensors.items()
            if name in now
            and now[name][0].shape == tensor.shape
            and (tensor.numel() > 1 or tensor.is_floating_point())
            and _sum(now[name][0]) != self._sums[name]
        ]

    @torch.no_grad()
    def put_back(self) -> None:
        """Restores the values of tensors that passes have changed, counters included."""
        now = dict(self._named())
        for name, copy in self._copies.items():
            if name in now and now[name][0].shape == copy.shape and _sum(now[name][0]) != self._sums[name]:
                now[name][0].copy_(copy)


def _sum(tensor: torch.Tensor) -> int | None:
    """Checksum of a tensor's bytes; None for tensors without plain storage."""
    if (
        tensor.layout != torch.strided
        or tensor.is_quantized
        or type(tensor) not in (torch.Tensor, nn.Parameter, nn.Buffer)
    ):
        return None
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    whole = len(flat) // 4 * 4
    words = flat[:whole].view(torch.int32) if flat.storage_offset() % 4 == 0 else flat[:whole].clone().view(torch.int32)
    return int(words.sum(dtype=torch.int64)) * 65521 + int(flat[whole:].sum(dtype=torch.int64))


def _other_states() -> dict[str, Any]:
    kind, keys, place, *rest = np.random.get_state(legacy=True)
    return {"numpy's": (kind, bytes(np.asarray(keys).data), place, *rest), "Python's": random.getstate()}


class _Drawn(TorchDispatchMode):
    """Replaces random numbers by one end of their range, where they have one; others come from a seed."""

    def __init__(self, highest: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch declares no types here
        self._highest = highest

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return result
        name, given = func.overloadpacket.__name__.rstrip("_"), {**dict(enumerate(args)), **(kwargs or {})}
        if name in ("rand", "rand_like"):
            return result.fill_(1 - torch.finfo(result.dtype).eps if self._highest else 0)
        if name == "uniform":
            low, high = given.get("from", given.get(1, 0.0)), given.get("to", given.get(2, 1.0))
            return result.fill_(high - (high - low) * torch.finfo(result.dtype).eps if self._highest else low)
        if name == "bernoulli":
            chance = given.get("p", given.get(1, 0.5 if func.overloadpacket.__name__.endswith("_") else args[0]))
            return result.copy_(torch.as_tensor(chance > 0 if self._highest else chance >= 1))
        if name == "dropout" or name == "native_dropout":
            kept = args[0] if given.get("p", given.get(1)) == 0 or not given.get("train", given.get(2)) else None
            scaled = args[0] * float(self._highest) * 2 if kept is None else kept
            return (scaled, torch.ones_like(args[0], dtype=torch.bool)) if isinstance(result, tuple) else scaled
        return result


@contextmanager
def drawing(highest: bool) -> Iterator[None]:
    """Makes torch draw the highest, or the lowest, random numbers inside the context; restores its generators after.

    Two passes, one of each kind, differ wherever random numbers have an effect, however rare.
    """
    with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
        torch.manual_seed(highest)
        with _Drawn(highest):
            yield
