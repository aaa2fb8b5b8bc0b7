"""Attention crops: the regions of images that activate a unit, cropped to separate images (Bai et al., TMLR 2025)."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from torch.nn import functional as F

Box = tuple[int, int, int, int]
"""(top, left, bottom, right) in pixels; bottom and right are exclusive."""

MOST = 4
"""Maximum number of crops per image."""

OVERLAP = 0.5
"""A box is rejected if its intersection over union with an accepted box exceeds this."""

WHOLE = 0.8
"""A box is rejected if its intersection over union with the whole image reaches this."""

_LEVELS = 256


def otsu(values: np.ndarray) -> float:
    """The threshold that splits values into two groups with maximum between-group variance (Otsu, 1979).

    Args:
        values: Values in [0, 1], any shape.

    Returns:
        The threshold, a multiple of 1/255; values above it form the brighter group.
    """
    counts = np.bincount(np.rint(values.ravel() * (_LEVELS - 1)).astype(np.int64), minlength=_LEVELS)
    levels = np.arange(_LEVELS)
    below, sums = np.cumsum(counts), np.cumsum(counts * levels)
    above = below[-1] - below
    with np.errstate(invalid="ignore", divide="ignore"):
        apart = sums / below - (sums[-1] - sums) / above
        between = below.astype(np.float64) * above * apart**2
    return float(np.nanargmax(np.where(above * below > 0, between, -1.0))) / (_LEVELS - 1)


def attention_boxes(activations: torch.Tensor, size: tuple[int, int], most: int = MOST) -> list[Box]:
    """Bounding boxes of the bright regions of a unit's activation map on an image.

    The map is scaled from its minimum to its maximum, so that large activations neither wrap around nor saturate, and
    enlarged to the image's size. Holes inside a bright region belong to it.

    Args:
        activations: The unit's map, float (h, w).
        size: (H, W) of the image.
        most: Maximum number of boxes.

    Returns:
        Boxes, the largest first; none for a constant map.
    """
    values = torch.nan_to_num(activations.detach().float().cpu(), nan=0.0, posinf=0.0, neginf=0.0)
    least, greatest = values.min(), values.max()
    if not bool(greatest > least) or most < 1:
        return []
    scaled = (values - least) / (greatest - least)
    large = F.interpolate(scaled[None, None], size=size, mode="bilinear", align_corners=False)[0, 0].clamp(0, 1).numpy()
    # The areas inside the outermost contours, including holes.
    bright = ndimage.binary_fill_holes(np.rint(large * (_LEVELS - 1)) > np.rint(otsu(large) * (_LEVELS - 1)))
    regions, _ = ndimage.label(bright, structure=np.ones((3, 3)))
    boxes = [(rows.start, columns.start, rows.stop, columns.stop) for rows, columns in ndimage.find_objects(regions)]
    return choose(boxes, size, most)


def choose(boxes: list[Box], size: tuple[int, int], most: int = MOST) -> list[Box]:
    """Selects the largest boxes that differ from the whole image and from larger selected boxes."""
    whole = (0, 0, *size)
    accepted: list[Box] = []
    for box in sorted(boxes, key=_area, reverse=True):
        if len(accepted) == most:
            break
        if overlap(box, whole) < WHOLE and all(overlap(box, other) <= OVERLAP for other in accepted):
            accepted.append(box)
    return accepted


def overlap(one: Box, other: Box) -> float:
    """Intersection over union of two boxes."""
    height = min(one[2], other[2]) - max(one[0], other[0])
    width = min(one[3], other[3]) - max(one[1], other[1])
    both = max(0, height) * max(0, width)
    return both / (_area(one) + _area(other) - both)


def _area(box: Box) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


def crop(image: np.ndarray, box: Box) -> np.ndarray:
    """Crops an image, uint8 (H, W, 3), to a box and enlarges the crop to the image's size."""
    top, left, bottom, right = box
    height, width = image.shape[:2]
    part = Image.fromarray(np.ascontiguousarray(image[top:bottom, left:right]))
    return np.asarray(part.resize((width, height), Image.Resampling.BILINEAR))
