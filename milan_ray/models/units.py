"""From a layer's output to one activation map per unit."""

from __future__ import annotations

import math

import torch

from milan_ray.errors import MilanError

MAX_PREFIX_TOKENS = 8
"""The most tokens before the patches (CLS, registers) that are looked for when their number is not given."""


def unit_maps(
    output: torch.Tensor, prefix_tokens: int | None = None, *, channels_last: bool = False, layer: str = "the layer"
) -> torch.Tensor:
    """Arranges a layer's output as maps over image positions, one per unit.

    Args:
        output: Maps (B, U, H, W), tokens (B, T, U) or vectors (B, U).
        prefix_tokens: Tokens before the patches (CLS, registers), which are dropped; None drops the smallest number
            from 0 to 8 that leaves a square grid. Only tokens are concerned.
        channels_last: Whether 4-d outputs are (B, H, W, U), as Swin's are.
        layer: The layer's name, for messages.

    Returns:
        (B, U, H, W); a vector is a map of one position.

    Raises:
        MilanError: The output is none of these, or its patches are no square grid.
    """
    if output.ndim == 4:
        return output.permute(0, 3, 1, 2) if channels_last else output
    if output.ndim == 2:
        return output[:, :, None, None]
    if output.ndim != 3:
        raise MilanError(
            f"{layer} puts out a tensor of shape {tuple(output.shape)}; units are read from maps (B, U, H, W), "
            "tokens (B, T, U) or vectors (B, U): choose another layer."
        )
    batch, tokens, units = output.shape
    counts = range(min(MAX_PREFIX_TOKENS + 1, tokens)) if prefix_tokens is None else (prefix_tokens,)
    prefix = next((n for n in counts if tokens > n and math.isqrt(tokens - n) ** 2 == tokens - n), None)
    if prefix is None:
        dropped = f"0 to {MAX_PREFIX_TOKENS}" if prefix_tokens is None else str(prefix_tokens)
        raise MilanError(
            f"{layer} puts out {tokens} tokens, which are no square grid of patches after dropping {dropped} prefix "
            "tokens: register the model with its own prefix_tokens or choose another layer."
        )
    side = math.isqrt(tokens - prefix)
    return output[:, prefix:].transpose(1, 2).reshape(batch, units, side, side)
