"""Layers that class scores are a linear function of: last convolution → mean over positions → linear map."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from milan_ray.models.tail import Tail

AMPLITUDE = 64.0
"""Value with which units are lit to read their weights: large against rounding of class scores."""

_LINEAR = {
    "mean.dim", "sum.dim_IntList", "view.default", "_unsafe_view.default", "reshape.default",
    "_reshape_alias.default", "t.default", "transpose.int", "permute.default", "addmm.default", "mm.default",
    "linear.default", "convolution.default", "avg_pool2d.default", "_adaptive_avg_pool2d.default",
    "adaptive_avg_pool2d.default", "flatten.using_ints", "squeeze.default", "squeeze.dim", "squeeze.dims",
    "unsqueeze.default", "select.int", "slice.Tensor", "clone.default", "contiguous.default", "alias.default",
    "detach.default", "expand.default", "add.Tensor", "sub.Tensor", "empty.memory_format",
}  # fmt: skip
"""Operations of torch that are linear in what they get, or add something to it."""


@dataclass(frozen=True)
class Readout:
    """Class scores as a linear function of a layer's values x: b + Σ_p w_p · W x_p over positions p.

    Attributes:
        weights: W, float32 (classes, C).
        positions: w, float32 (P,), whose sum is 1.
    """

    weights: torch.Tensor
    positions: torch.Tensor

    def changes(self, amounts: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        """Changes of class scores when amounts of directions are added.

        Args:
            amounts: (U, P), how much of each direction is added at each position.
            vectors: (U, C), the directions.

        Returns:
            float32 (U, classes).
        """
        return (amounts @ self.positions)[:, None] * (vectors @ self.weights.T)


class _Operations(TorchDispatchMode):
    """Notes which operations run once the layer is reached."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.listening = False
        self.names: set[str] = set()

    def listen(self) -> None:
        """Begins."""
        self.listening = True

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if self.listening:
            self.names.add(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def linear_readout(tail: Tail, values: torch.Tensor) -> Readout | None:
    """Reads the linear function that class scores are of a layer's values; None where they are none.

    It is one where only linear operations come after the layer, and where random values confirm what was read.

    Args:
        tail: The network behind the layer, which has recorded an image.
        values: The layer's values (C, …) for this image.
    """
    zero = torch.zeros_like(values)
    operations = _Operations()
    tail.on_reached = operations.listen
    try:
        with operations:
            base = tail.logits(zero[None])[0]
    finally:
        tail.on_reached = None
    if not tail.replayed or not operations.listening or not operations.names <= _LINEAR:
        return None
    flat = zero.reshape(len(values), -1)
    units, count = flat.shape
    step = max(1, 2**26 // max(1, flat.numel() * 4))

    def scores(rows: torch.Tensor) -> torch.Tensor:
        parts = [tail.logits(part.view(len(part), *values.shape)) for part in rows.split(step)]
        return torch.cat(parts) - base

    def lit(numbers: Sequence[int]) -> torch.Tensor:
        rows = flat.repeat(len(numbers), 1, 1)
        rows[range(len(numbers)), list(numbers)] = AMPLITUDE
        return rows

    weights = torch.cat([scores(lit(range(units)[start : start + step])) for start in range(0, units, step)]).T
    weights = weights / AMPLITUDE
    strongest = int(weights.norm(dim=0).argmax())
    own = weights[:, strongest]
    if not weights.isfinite().all() or not own.any():
        return None
    rows = flat.repeat(count, 1, 1)
    rows[range(count), strongest, range(count)] = AMPLITUDE
    positions = scores(rows) @ own / (own @ own) / AMPLITUDE
    readout = Readout(weights.contiguous(), positions)
    generator = torch.Generator().manual_seed(0)
    tried = torch.randn(4, *flat.shape, generator=generator).to(flat)
    wanted = scores(tried)
    said = (tried @ positions) @ weights.T
    return readout if torch.allclose(said, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max())) else None
