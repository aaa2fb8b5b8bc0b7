"""Adds images to masks-only sets, from a local ImageNet or Places folder, by the ids in ``ids.csv``."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import interpolate

from milan_ray.annotations.layout import IDS, IMAGES, MASKS, LayerFiles, layer_folders, open_layer
from milan_ray.annotations.quirks import NO_QUIRKS, Quirks
from milan_ray.errors import MilanError, UnreadableImage
from milan_ray.models.view import View
from milan_ray.probe.base import ImageProbe, ImageRef
from milan_ray.probe.manifest import digest, image_refs
from milan_ray.progress import Progress, say

_MARKER = ".merged.json"
"""Records the source and geometry of a merged ``images.npy``; absent if the images came with the set."""


@dataclass(frozen=True)
class SourceShape:
    """Size of the image collection that the sets' ids refer to.

    Attributes:
        classes: Number of class folders, or of distinct labels.
        images: Total number of images.
    """

    classes: int
    images: int


SOURCES = {"imagenet": SourceShape(1000, 50_000), "places365": SourceShape(365, 36_500)}
"""Dataset → its validation images, which the released ``ids.csv`` refer to."""


def merge(
    root: Path,
    probe: ImageProbe,
    *,
    expect: SourceShape | None = None,
    quirks: Quirks = NO_QUIRKS,
) -> list[str]:
    """Writes ``images.npy`` of every layer that has none, from ``ids.csv`` and the source images.

    The masks were computed on images resized to 256 and cropped to 224. Source images therefore get the same geometry,
    and are then resized to the masks' size by nearest neighbours, as the reference's exemplars are. The reference's own
    merge instead squashes whole images to the masks' size, which misaligns masks and images unless images are square
    (``quirks.merge_geometry``). A layer that was merged with another source or geometry is merged again.

    Args:
        root: The published set's folder.
        probe: The source images: folders of classes, or flat with a file of labels.
        expect: Required numbers of classes and images; None accepts any probe that has all the ids.
        quirks: Defects of the reference to reproduce.

    Returns:
        The layers merged.

    Raises:
        MilanError: The probe has another layout or lacks an id, an image cannot be read, or a layer is damaged.
    """
    manifest = probe.manifest()
    refs = in_class_order(image_refs(manifest), manifest["class_label"].to_pylist())
    if expect is not None:
        labels = len(set(manifest["class_label"].drop_null().to_pylist()))
        if (labels, len(refs)) != (expect.classes, expect.images):
            raise MilanError(
                f"{probe.name} has {len(refs):,} images in {labels:,} classes, but the ids of {root.name} speak of "
                f"{expect.images:,} in {expect.classes:,}: give the folder that holds the validation set's "
                f"{expect.classes:,} class folders, or a flat folder with a file of labels."
            )
    merged = []
    for folder in layer_folders(root)[0]:
        files = open_layer(folder)
        geometry = View(resize=files.size, crop=None) if quirks.merge_geometry else View()
        identity = {"probe": digest(manifest), "view": geometry.key}
        if _wanted(files, identity):
            _merge_layer(files, probe, refs, geometry, identity)
            merged.append(files.name)
    say(f"merge: {len(merged)} layers of {root} got their images")
    return merged


def in_class_order(refs: Sequence[ImageRef], labels: Sequence[str | None]) -> list[ImageRef]:
    """Sorts images as torchvision's ``ImageFolder`` does: by class, then by path. Images without a class are left out.

    Numeric classes from a file of labels are sorted as numbers, because they are indexes into the sorted classes.

    Args:
        refs: The images, by path.
        labels: The class of each image, or None.
    """
    known = [(label, ref) for ref, label in zip(refs, labels, strict=True) if label]
    if all(label.isdecimal() and not ref.path.startswith(f"{label}/") for label, ref in known):
        return [ref for _, ref in sorted(known, key=lambda item: int(item[0]))]
    return [ref for _, ref in sorted(known, key=lambda item: item[0])]  # stable: paths stay in order


def is_masks_only(folder: Path) -> bool:
    """Whether a layer was published without images: they are missing, or were merged later."""
    return not (folder / IMAGES).exists() or (folder / _MARKER).exists()


def _wanted(files: LayerFiles, identity: dict[str, str]) -> bool:
    if files.images is None:
        return True
    marker = files.folder / _MARKER
    with suppress(ValueError):  # a damaged marker: merge again
        return marker.exists() and json.loads(marker.read_text(encoding="utf-8")) != identity
    return True


def _merge_layer(
    files: LayerFiles, probe: ImageProbe, refs: Sequence[ImageRef], view: View, identity: dict[str, str]
) -> None:
    if files.image_ids is None:
        raise MilanError(f"{files.folder} has neither {IMAGES} nor {IDS}: nothing says which images its masks are of.")
    if files.image_ids.max() >= len(refs):
        raise MilanError(
            f"{files.folder / IDS} speaks of image {files.image_ids.max():,}, but {probe.name} has only {len(refs):,} "
            "images with a class: give the folder of images that the set was made from."
        )
    places: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for (position, rank), image_id in np.ndenumerate(files.image_ids):
        places[int(image_id)].append((position, rank))

    def read(image_id: int) -> tuple[int, np.ndarray]:
        try:
            pixels = view(probe.read(refs[image_id]).image)
        except UnreadableImage as error:
            raise MilanError(f"{refs[image_id].location} {error}: every source image is needed.") from error
        return image_id, nearest(pixels.transpose(2, 0, 1), files.size)

    part = files.folder / f".{IMAGES}.part"
    try:
        shape = (*files.masks.shape[:2], 3, *files.size)
        images = np.lib.format.open_memmap(part, mode="w+", dtype=np.uint8, shape=shape)
        ids = sorted(places)
        with (
            Progress(f"merge {files.name}", len(ids), "images") as progress,
            ThreadPoolExecutor(os.cpu_count()) as pool,
        ):
            for start in range(0, len(ids), 256):  # holds at most 256 images in memory
                for image_id, pixels in pool.map(read, ids[start : start + 256]):
                    for place in places[image_id]:
                        images[place] = pixels
                    progress.advance()
        images.flush()
        del images
        # In this order, a kill can leave a layer without images, but never images without a record of their source.
        (files.folder / IMAGES).unlink(missing_ok=True)
        (files.folder / _MARKER).write_text(json.dumps(identity))
        part.replace(files.folder / IMAGES)
    except OSError as error:
        raise MilanError(f"{files.folder / IMAGES} cannot be written ({error}): make room beside {MASKS}.") from error
    finally:
        part.unlink(missing_ok=True)


def nearest(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes by nearest neighbours, as the reference does for stored images: (C, h, w) → (C, H, W)."""
    if pixels.shape[1:] == size:
        return pixels
    return interpolate(torch.from_numpy(np.ascontiguousarray(pixels))[None], size=size, mode="nearest")[0].numpy()
