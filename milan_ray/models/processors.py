"""Compares our preprocessing with a library's own on test pictures, and finds the view that reproduces it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image

from milan_ray.errors import MilanError, reason
from milan_ray.models.view import Preprocess, View

Process = Callable[[Image.Image], np.ndarray]
"""A library's own preprocessing: an RGB picture → float (3, H, W)."""

MOST = 2.1
"""Largest allowed difference of a value from the library's, in 8-bit steps. Processors that resize tensors round
differently from those that resize images, at most twice."""

MEAN = 0.5
"""Largest allowed mean difference, in 8-bit steps: some processors do not round at all. Another resizing method, or a
shift by half a pixel, gives a larger difference."""

_SIZES = ((150, 203), (301, 240), (60, 47))  # landscape, portrait, and smaller than what most models take
_FAR = ((360, 640), (240, 36), (30, 200), (40, 900), (1300, 900))  # elongated and large: some processors limit sides
_NUMBERS = (("image_mean", 0), ("image_std", 1))
_COLOURS = ((0, 0, 0), (255, 255, 255), (100, 100, 100), (255, 0, 0), (0, 0, 255))


@cache
def picture(height: int, width: int) -> Image.Image:
    """A test picture: smooth waves in three colours and fine grain, without values near black or white."""
    y, x = np.mgrid[0:height, 0:width] / np.array([height, width], float)[:, None, None]
    waves = [np.sin(2 * np.pi * (a * x + b * y)) for a, b in ((5, 2), (-1.5, 6), (3, 4))]
    grain = np.random.default_rng(0).normal(0, 9, (height, width, 3)).clip(-25, 25)
    return Image.fromarray((128 + 80 * np.stack(waves, -1) + grain).round().astype(np.uint8))


def pictures(view: View) -> list[Image.Image]:
    """Test pictures for a view; one has a size at which the crop cannot be centred, so that rounding matters."""
    sizes = [*_SIZES, *_FAR]
    if isinstance(view.resize, int) and view.crop is not None:
        side, (_, width) = view.resize, view.shape
        sizes += [(150, w) for w in range(150, 400) if (int(side * w / 150) - width) % 4 == 3][:1]
    return [picture(*size) for size in sizes]


def difference(process: Process, preprocess: Preprocess, swapped: bool = False) -> tuple[float, float]:
    """Largest and mean difference of our inputs from the library's over all test pictures, in 8-bit steps.

    Args:
        process: The library's preprocessing.
        preprocess: Ours.
        swapped: Whether the network expects channels in the order blue, green, red.
    """
    most, mean = 0.0, 0.0
    for image in pictures(preprocess.view):
        apart = _apart(process(image), image, preprocess, swapped)
        most, mean = max(most, float(apart.max())), max(mean, float(apart.mean()))
    return most, mean


def _apart(theirs: np.ndarray, image: Image.Image, preprocess: Preprocess, swapped: bool) -> np.ndarray:
    """Differences of a library's input from ours of the same picture, in 8-bit steps; infinite for other shapes."""
    ours = preprocess(torch.from_numpy(preprocess.view(image).copy())[None])[0].numpy()
    if theirs.shape != ours.shape:
        return np.array([math.inf])
    steps = 255 * np.array(preprocess.std)[:, None, None]
    apart: np.ndarray = np.abs((theirs[::-1] if swapped else theirs) - ours) * steps
    return apart


def agrees(process: Process, preprocess: Preprocess, swapped: bool = False) -> bool:
    """Whether our inputs equal the library's, up to rounding to 8 bits."""
    most, mean = difference(process, preprocess, swapped)
    return most <= MOST and mean <= MEAN


def fit(process: Process, settings: Mapping[str, Any]) -> tuple[Preprocess, bool]:
    """Finds the view and the normalisation that reproduce an image processor of transformers.

    The names of settings differ between processors, so candidates are checked on test pictures.

    Args:
        process: The processor.
        settings: Its settings, as it stores them.

    Returns:
        Our preprocessing, and whether the network expects channels in the order blue, green, red.

    Raises:
        MilanError: No view reproduces it; the message gives the reason, as the end of a sentence.
    """
    try:
        shapes = {np.shape(process(picture(*size))) for size in _SIZES}
        flat = np.stack([_flat(process, colour) for colour in _COLOURS])
    except Exception as error:  # processors of texts, videos, pairs and layouts may raise anything
        raise MilanError(
            f"its processor takes more than a picture ({type(error).__name__}: {reason(error)})"
        ) from error
    shape = next(iter(shapes))
    if len(shapes) > 1 or len(shape) != 3 or shape[0] != 3:
        raise MilanError(f"they have no fixed size or scale (of three pictures, {', '.join(map(str, sorted(shapes)))})")
    mean, std, swapped = _normalisation(flat, settings)
    first = picture(*_SIZES[0])
    goal = process(first)
    for view in _views(settings, shape[1], shape[2], _scale(process, flat)):
        preprocess = Preprocess(view, mean, std)
        # The first test picture is a cheap check before the full one.
        if _apart(goal, first, preprocess, swapped).mean() <= MEAN and agrees(process, preprocess, swapped):
            return preprocess, swapped
    raise MilanError("no resizing and cropping gives the same pictures")


def _flat(process: Process, colour: tuple[int, int, int]) -> np.ndarray:
    """The processor's output for one colour: the centre of a picture filled with it, (3,)."""
    made = process(Image.new("RGB", (200, 200), colour))
    return made[:, made.shape[1] // 2, made.shape[2] // 2].astype(np.float64)


def _normalisation(
    flat: np.ndarray, settings: Mapping[str, Any]
) -> tuple[tuple[float, float, float], tuple[float, float, float], bool]:
    """Derives mean and deviation (red, green, blue), and whether blue comes first, from the outputs for colours."""
    black, white, grey, red, blue = flat
    span = white - black
    if not (span > 0).all() or not np.allclose(grey, black + span * (100 / 255), atol=float(span.max()) / 510):
        raise MilanError("its processor does more with colours than a mean and a deviation do")
    swapped = bool(red[2] - black[2] > span[2] / 2)
    expected = (blue, red) if swapped else (red, blue)
    if not np.allclose(expected[0], [white[0], black[1], black[2]]) or not np.allclose(
        expected[1], [black[0], black[1], white[2]]
    ):
        raise MilanError("its processor mixes colours")
    std = 1 / span
    mean = -black * std
    # Takes the configuration's exact numbers where they agree with the measured ones.
    normalized = settings.get("do_normalize", True)
    given = [settings.get(name) or () if normalized else (value,) * 3 for name, value in _NUMBERS]
    if all(isinstance(values, list | tuple) and len(values) == 3 for values in given):
        numbers = np.array(given, np.float64)
        if np.allclose(numbers, [mean, std], rtol=1e-4, atol=1e-4):
            mean, std = numbers
    order = (2, 1, 0) if swapped else (0, 1, 2)
    return _three(mean[list(order)]), _three(std[list(order)]), swapped


def _three(values: np.ndarray) -> tuple[float, float, float]:
    first, second, third = values.tolist()
    return first, second, third


def _scale(process: Process, flat: np.ndarray) -> float:
    """Output pixels per input pixel of a picture of the first size, measured along a ramp; for unknown settings."""
    height, width = _SIZES[0]
    ramp = np.broadcast_to(np.linspace(0, 255, width).round().astype(np.uint8)[None, :, None], (height, width, 3))
    made = process(Image.fromarray(np.ascontiguousarray(ramp)))
    levels = ((made - flat[0][:, None, None]) / (flat[1] - flat[0])[:, None, None]).mean(0)[made.shape[1] // 2]
    inner = np.flatnonzero((levels > 0.1) & (levels < 0.9))
    if len(inner) < 3:
        return 0.0
    slope = float(np.polyfit(inner, levels[inner], 1)[0])
    return 1 / (slope * (width - 1)) if slope > 0 else 0.0


def _views(settings: Mapping[str, Any], height: int, width: int, scale: float) -> Iterator[View]:
    """Yields candidate views, those that the settings name first; all give pictures of the same size."""
    likely = list(dict.fromkeys(_likely(settings, height, width, scale)))
    yield from likely
    for view in likely:  # some crop as torchvision does, whatever their settings say
        if view.floor and view.crop is not None:
            yield replace(view, floor=False)


def _likely(settings: Mapping[str, Any], height: int, width: int, scale: float) -> Iterator[View]:
    """Yields the views that the settings name, then those of the measured scale, cropped as transformers does."""
    size, crop = settings.get("size"), (height, width)
    side = height if height == width else crop
    resample = settings.get("resample")
    name = Image.Resampling(2 if resample is None else resample).name.lower()
    view = View((height, width), None, name)
    if not settings.get("do_resize", True):
        yield View(None, side, name, floor=True)
        return
    size = size if isinstance(size, Mapping) else {"shortest_edge": size}
    shorter = size.get("shortest_edge")
    if size.get("height") and size.get("width"):
        whole = int(size["height"]), int(size["width"])
        yield view if whole == crop else View(whole, side, name)
        yield View(whole, side, name, floor=True)
    if isinstance(shorter, int):
        yield View(shorter, side, name, floor=True)
        if settings.get("crop_pct"):
            yield View(int(shorter / settings["crop_pct"]), side, name, floor=True)
        yield View(int(256 / 224 * shorter), side, name, floor=True)
    yield view
    measured = scale * min(_SIZES[0])
    for short in range(math.floor(measured * 0.99), math.ceil(measured * 1.01) + 1):
        if short >= min(crop) // 2:
            yield View(short, side, name, floor=True)
