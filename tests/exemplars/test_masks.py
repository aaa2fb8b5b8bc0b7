"""Masks: the reference's upsampling, and packing."""

from __future__ import annotations

import numpy as np
import torch

from milan_ray.exemplars import masks


def naive_upsample(map_: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The reference's masks pixel by pixel: half-pixel centres, zero outside."""
    h, w = map_.shape
    padded = np.zeros((h + 2, w + 2))
    padded[1:-1, 1:-1] = map_
    out = np.zeros(size)
    for y in range(size[0]):
        for x in range(size[1]):
            sy = (y + 0.5) * h / size[0] - 0.5 if h > 1 else 0.0
            sx = (x + 0.5) * w / size[1] - 0.5 if w > 1 else 0.0
            y0, x0 = int(np.floor(sy)), int(np.floor(sx))
            fy, fx = sy - y0, sx - x0
            block = padded[y0 + 1 : y0 + 3, x0 + 1 : x0 + 3]
            if block.shape != (2, 2):
                block = np.pad(block, ((0, 2 - block.shape[0]), (0, 2 - block.shape[1])))
            out[y, x] = (1 - fy) * ((1 - fx) * block[0, 0] + fx * block[0, 1]) + fy * (
                (1 - fx) * block[1, 0] + fx * block[1, 1]
            )
    return out


def test_upsample_equals_the_definition():
    rng = np.random.default_rng(0)
    for shape, size in [((3, 5), (12, 11)), ((7, 7), (28, 28)), ((4, 4), (4, 4))]:
        maps = rng.normal(size=(2, *shape)).astype(np.float32)
        ours = masks.upsample(torch.from_numpy(maps), size).numpy()
        expected = np.stack([naive_upsample(m, size) for m in maps])
        np.testing.assert_allclose(ours, expected, atol=2e-5)


def test_upsample_of_a_single_position_is_constant():
    ours = masks.upsample(torch.tensor([[[2.5]]]), (6, 4))
    assert (ours == 2.5).all() and ours.shape == (1, 6, 4)


def test_masks_are_strictly_above_the_level():
    maps = torch.tensor([[[1.0]], [[1.0]]])
    found = masks.masks(maps, torch.tensor([1.0, 0.9]), (3, 3))
    assert not found[0].any() and found[1].all()


def test_pack_and_unpack_round_trip_odd_sizes():
    original = torch.rand(5, 7, 9) > 0.5
    packed = masks.pack(original)
    assert len(packed[0]) == 8
    assert (masks.unpack(packed, (7, 9)) == original.numpy()).all()
    assert masks.unpack([], (7, 9)).shape == (0, 7, 9)
