"""Images to dissect a network with: paths, probes, arrays and lists of images as one probe."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from milan_ray.errors import MilanError
from milan_ray.models.registry import ModelSpec
from milan_ray.probe.base import ImageProbe, ImageRef, Probe, ProbeImage, Source
from milan_ray.probe.decode import from_array, settle
from milan_ray.probe.files import tell
from milan_ray.probe.manifest import Entry, build
from milan_ray.probe.registry import resolve_probe

ProbeImages = str | os.PathLike[str] | np.ndarray | Sequence[Any]
"""Images to show a model: whatever ``--probe`` takes, by name or path, or several of them; a probe
(:class:`milan_ray.probe.arrays.ParquetProbe` and its likes); a list of PIL images or of arrays uint8 (H, W, 3); or an
array uint8 (N, H, W, 3). Models with ``inputs=`` and ``bands=`` take arrays of as many bands."""


class ImagesInMemory:
    """A probe of images in memory, for this process only."""

    name = "images"

    def __init__(self, images: Sequence[Any]) -> None:
        self._images = images

    def manifest(self) -> pa.Table:
        """One row per image; the path is its number."""
        return build([Entry("memory:", str(number)) for number in range(len(self._images))])

    def read(self, ref: ImageRef) -> ProbeImage:
        """The image of a row.

        Raises:
            MilanError: It is neither a PIL image nor a uint8 array.
        """
        image = self._images[int(ref.path)]
        if isinstance(image, Image.Image):
            return settle(image)
        pixels = np.asarray(image)
        if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or not pixels.size:
            raise MilanError(
                f"image {ref.path} is {pixels.dtype} {pixels.shape}: give PIL images, or uint8 (height, width, bands)."
            )
        return from_array(pixels)

    def concept_maps(self, ref: ImageRef) -> dict[str, np.ndarray] | None:
        """None: nothing is labelled."""
        return None


def image_probe(images: ProbeImages | Probe, image_column: str | None = None) -> ImageProbe:
    """Makes a probe of what :func:`milan_ray.dissect` takes as images.

    Args:
        images: See :data:`ProbeImages`.
        image_column: Of Parquet, Arrow and tar files, where images are; None finds it.

    Raises:
        MilanError: They are no images, or can be read in two ways.
    """
    tell.cache_clear()  # what is left out is said in every cell
    _check_images(images)
    in_memory = isinstance(images, (Source, np.ndarray)) or not (
        isinstance(images, (str, os.PathLike)) or all(isinstance(image, (str, os.PathLike)) for image in images)
    )
    if in_memory and image_column is not None:
        raise MilanError("image_column= is for Parquet, Arrow and tar files: leave it out for images in memory.")
    if isinstance(images, Source):
        return images  # type: ignore[return-value]
    if isinstance(images, (str, os.PathLike)):
        images = [images]
    if not len(images):
        raise MilanError("no images given: give at least one.")
    if in_memory:
        return ImagesInMemory(list(images))
    sources = [path if "://" in path else str(Path(path).expanduser()) for path in map(os.fspath, images)]
    return resolve_probe(sources, image_column=image_column)  # type: ignore[return-value]


def _check_images(images: object) -> None:
    """Refuses what is no sequence of images, and what can be meant in two ways."""
    if isinstance(images, (str, os.PathLike, Source)):
        return
    if isinstance(images, (Image.Image, bytes, bytearray)):
        what = "one PIL image" if isinstance(images, Image.Image) else "bytes"
        remedy = "put it into a list, [image]" if isinstance(images, Image.Image) else "open them with PIL"
        raise MilanError(f"images are {what}: {remedy}.")
    if isinstance(images, (Mapping, set, frozenset)) or not (
        hasattr(images, "__len__") and hasattr(images, "__getitem__")
    ):
        remedy = "give a path, a probe, an array, or a list of images (list(…) makes one)"
        raise MilanError(f"images are {type(images).__name__}: {remedy}.")
    shape = tuple(getattr(images, "shape", ()))
    if isinstance(images, np.ndarray) and not shape:
        raise MilanError("images are an array without axes: give uint8 (N, height, width, 3).")
    if len(shape) == 3 and shape[-1] in (3, 4):
        raise MilanError(
            f"images have shape {shape}, which is one picture of {shape[-1]} bands or {shape[0]} grey ones: give "
            "x[None] for the one, x[..., None] for the others."
        )
    if len(shape) == 2:
        raise MilanError(f"images have shape {shape}: give x[None] for one grey picture.")
    several = [] if isinstance(images, np.ndarray) and not np.ma.isMaskedArray(images) else images
    if np.ma.isMaskedArray(images) or any(np.ma.isMaskedArray(image) for image in several):  # type: ignore[attr-defined]
        raise MilanError("images are masked arrays, whose masks would be lost: give x.filled(…) or x.data.")


def check_axes(images: object, spec: ModelSpec) -> None:
    """Refuses arrays whose bands come first, for models that take RGB.

    Raises:
        MilanError: The bands come first.
    """
    shape = tuple(getattr(images, "shape", ()))
    if len(shape) == 4 and spec.bands is None and shape[1] in (1, 3, 4) and shape[-1] not in (1, 2, 3, 4):
        raise MilanError(f"images have shape {shape}, bands first: give x.transpose(0, 2, 3, 1).")
