"""Loads published sets by name: downloads, unpacks, merges with local images, and opens them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from milan_ray.annotations.groups import RELEASED, SetLocation, locate
from milan_ray.annotations.layout import IMAGES, layer_folders
from milan_ray.annotations.merge import SOURCES, is_masks_only, merge
from milan_ray.annotations.published import PublishedSet
from milan_ray.annotations.quirks import NO_QUIRKS, Quirks
from milan_ray.config import data_dir
from milan_ray.errors import MilanError
from milan_ray.probe.decode import IMAGE_FOLDER
from milan_ray.probe.folder import FolderProbe


def load(
    text: str = "base",
    *,
    images: Sequence[str | Path] = (),
    labels: str | Path | None = None,
    download: bool = False,
    layers: Iterable[str | int] | None = None,
    annotation_count: int | None = None,
    quirks: Quirks = NO_QUIRKS,
) -> list[PublishedSet]:
    """Opens a published set, or all sets of a group, in the reference's order.

    Args:
        text: A group (``base``, ``cls``, …), a set (``alexnet/imagenet``), a folder, or a zip.
        images: Folders of source images for layers published without; empty uses ``$MILAN_DATA_DIR/<dataset>/val``.
        labels: File of labels for source images in a flat folder.
        download: Fetch released sets that are absent.
        layers: Layers to open; None opens all.
        annotation_count: Keep only units with at least this many annotations, and only the first this many of each.
            0 keeps every unit; None uses 3 for the released sets, as the reference does, and 0 for others.
        quirks: Defects of the reference to reproduce.

    Raises:
        MilanError: A set is unknown, absent or damaged, or lacks images and the source images are missing.
    """
    wanted = None if layers is None else [str(layer) for layer in layers]
    sets = []
    for location in locate(text, download=download):
        merge_images(location, images, labels, quirks)
        count = location.annotation_count if annotation_count is None else annotation_count or None
        sets.append(PublishedSet(location.root, location.name, layers=wanted, annotation_count=count, quirks=quirks))
    return sets


def bare_layers(location: SetLocation) -> list[Path]:
    """Returns the folders of layers that were published without images, whether or not these were merged later."""
    return [folder for folder in layer_folders(location.root)[0] if is_masks_only(folder)]


def merge_images(
    location: SetLocation,
    images: Sequence[str | Path] = (),
    labels: str | Path | None = None,
    quirks: Quirks = NO_QUIRKS,
) -> list[str]:
    """Merges images into the layers of a set that were published without them, unless this was done before.

    Args:
        location: The set.
        images: Folders of source images; empty uses ``$MILAN_DATA_DIR/<dataset>/val``, as the reference does.
        labels: File of labels for source images in a flat folder.
        quirks: Defects of the reference to reproduce.

    Returns:
        The layers merged.

    Raises:
        MilanError: The source images are missing, or do not match the set's ids.
    """
    bare = bare_layers(location)
    dataset = location.name.rpartition("/")[2]
    usual = data_dir() / dataset / "val"
    if bare and not images and not usual.is_dir():
        if all((folder / IMAGES).exists() for folder in bare):
            return []  # merged earlier; the source images are gone
        raise MilanError(
            f"{location.name} came without images ({bare[0]} has only masks): name the folder of its source images "
            f"(--images), or put it in {usual} (see $MILAN_DATA_DIR)."
        )
    if not bare:
        return []
    probe = FolderProbe(images or [usual], labels, endings=IMAGE_FOLDER)
    expect = SOURCES.get(dataset) if location.name in RELEASED else None
    return merge(location.root, probe, expect=expect, quirks=quirks)
