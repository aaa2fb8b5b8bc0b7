"""Masks: the positions in its exemplars where a unit fires (paper §3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F

_TOGETHER = 64
"""Number of maps that are upsampled together."""


def upsample(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Upsamples activation maps bilinearly with half-pixel centres, fading to zero outside the outermost centres.

    The source coordinate of target t is (t + 0.5)·S/T − 0.5. Values outside the map are zero, unlike in
    ``interpolate(align_corners=False)``, which repeats the border.

    Args:
        maps: float32 (N, h, w).
        size: (H, W) of the result.

    Returns:
        float32 (N, H, W).
    """
    height, width = maps.shape[-2:]
    rows = _grid(height, size[0], maps.device)
    columns = _grid(width, size[1], maps.device)
    grid = torch.stack(torch.broadcast_tensors(columns[None, :], rows[:, None]), dim=-1)
    # The maps are passed as channels of one image, because they share the grid.
    return F.grid_sample(maps[None], grid[None], mode="bilinear", padding_mode="zeros", align_corners=True)[0]


def _grid(source: int, target: int, device: torch.device) -> torch.Tensor:
    """Sampling positions in grid_sample's [−1, 1] coordinates, (target,)."""
    step = target / source
    offset = 0.5 * step - 0.5
    return (torch.arange(target, dtype=torch.float32, device=device) - offset) * (2 / (step * max(1, source - 1))) - 1


def masks(maps: torch.Tensor, levels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Masks of the positions where a unit's upsampled activation is strictly above its level.

    Args:
        maps: float32 (N, h, w).
        levels: float32 (N,).
        size: (H, W) of the masks.

    Returns:
        bool (N, H, W).
    """
    large = upsample(maps, size)
    if large.is_cuda:
        return large > levels[:, None, None]
    return torch.from_numpy(large.numpy() > levels.numpy()[:, None, None])  # several times as fast as torch's


def pack(masks_: torch.Tensor) -> list[bytes]:
    """Packs each of the masks bool (N, H, W) into a bit string: row-major, first pixel in the highest bit."""
    flat = masks_.flatten(1).cpu().numpy()
    return [row.tobytes() for row in np.packbits(flat, axis=1)]


def packed_masks(
    maps: Callable[[torch.Tensor], torch.Tensor], levels: torch.Tensor, size: tuple[int, int]
) -> list[bytes]:
    """Computes the packed masks of N maps; upsamples at a time only as many maps as fit into the CPU cache.

    Args:
        maps: Function that returns maps float32 (n, h, w), given their indices int64 (n,).
        levels: float32 (N,), their units' levels.
        size: (H, W) of the masks.
    """
    packed: list[bytes] = []
    for part in torch.split(torch.arange(len(levels)), _TOGETHER):
        chosen = maps(part)
        packed += pack(masks(chosen, levels[part].to(chosen.device), size))
    return packed


def unpack(packed: list[bytes], size: tuple[int, int]) -> np.ndarray:
    """Unpacks bit strings into bool (N, H, W)."""
    height, width = size
    if not packed:
        return np.zeros((0, height, width), dtype=bool)
    bits = np.frombuffer(b"".join(packed), dtype=np.uint8).reshape(len(packed), -1)
    return np.unpackbits(bits, axis=1, count=height * width).reshape(-1, height, width).astype(bool)


def mask_size(metadata: Mapping[str, str]) -> tuple[int, int]:
    """Height and width of a layer's masks, from the metadata of its exemplars."""
    return int(metadata["mask_height"]), int(metadata["mask_width"])
