"""Attention crops: threshold, regions and boxes against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from milan_ray.labelers.dnd.crops import attention_boxes, choose, crop, otsu, overlap


def otsu_by_loops(values: np.ndarray) -> float:
    best, found = -1.0, 0
    numbers = np.rint(values.ravel() * 255)
    for level in range(255):
        low, high = numbers[numbers <= level], numbers[numbers > level]
        if len(low) and len(high):
            between = len(low) * len(high) * (low.mean() - high.mean()) ** 2
            if between > best * (1 + 1e-12):
                best, found = between, level
    return found / 255


@pytest.mark.parametrize("seed", range(4))
def test_otsu_parts_two_groups_as_a_loop_over_thresholds_does(seed):
    rng = np.random.default_rng(seed)
    values = np.clip(np.concatenate([rng.normal(0.2, 0.1, 300), rng.normal(0.7, 0.1, 100 + 50 * seed)]), 0, 1)
    assert otsu(values) == otsu_by_loops(values)
    assert 0.3 < otsu(values) < 0.6


def spots(*places: tuple[int, int, int, int]) -> torch.Tensor:
    """A map 0 but in some boxes."""
    found = torch.zeros(32, 32)
    for number, (top, left, bottom, right) in enumerate(places):
        found[top:bottom, left:right] = 10 + number
    return found


def test_bright_regions_are_boxed_the_largest_first():
    boxes = attention_boxes(spots((2, 3, 8, 9), (12, 14, 28, 30)), (32, 32))
    assert boxes == [(12, 14, 28, 30), (2, 3, 8, 9)]


def test_activations_of_any_size_and_sign_give_the_same_boxes():
    where = spots((2, 3, 8, 9), (12, 14, 28, 30))
    expected = attention_boxes(where, (64, 64))
    assert len(expected) == 2
    for scale, shift in ((1e-4, 0.0), (1e6, 3.0), (100.0, -5000.0)):
        assert attention_boxes(where * scale + shift, (64, 64)) == expected


def test_what_lies_inside_a_region_belongs_to_it_and_corners_touch():
    ring = spots((4, 4, 28, 28))
    ring[8:24, 8:24] = 0
    ring[14:18, 14:18] = 10  # a spot inside the hole
    assert attention_boxes(ring, (32, 32)) == [(4, 4, 28, 28)]
    assert attention_boxes(spots((2, 2, 10, 10), (10, 10, 18, 18)), (32, 32)) == [(2, 2, 18, 18)]


def test_nothing_stands_out_of_a_map_that_is_the_same_everywhere_or_one_position():
    for flat in (torch.full((7, 7), 3.0), torch.ones(1, 1), torch.full((4, 4), torch.nan)):
        assert attention_boxes(flat, (32, 32)) == []
    assert attention_boxes(spots((2, 3, 8, 9)), (32, 32), most=0) == []


def test_boxes_are_chosen_greedily_by_size_and_overlap():
    size = (100, 100)
    big, same, part, whole = (0, 0, 60, 60), (0, 0, 60, 50), (0, 0, 30, 60), (0, 0, 95, 95)
    assert overlap(big, same) == pytest.approx(50 / 60) and overlap(big, (60, 60, 90, 90)) == 0
    assert overlap(whole, (0, 0, *size)) == pytest.approx(0.9025)
    # As large as the image: out. More than half of a larger one: out. Exactly half: in.
    assert choose([part, same, whole, big], size) == [big, part]
    many = [(10 * n, 0, 10 * n + 9 - n, 20) for n in range(7)]
    assert choose(many, size) == many[:4]


def test_a_crop_has_the_images_size():
    image = np.zeros((20, 30, 3), np.uint8)
    image[5:10, 10:20] = 200
    found = crop(image, (5, 10, 10, 20))
    assert found.shape == image.shape and (found == 200).all()
