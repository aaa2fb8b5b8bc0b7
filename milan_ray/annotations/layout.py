"""Memory-mapped files of a published layer: a 4 GB ``images.npy`` is never loaded into memory as a whole."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np

from milan_ray.errors import MilanError, explained
from milan_ray.tensorfiles import check_sizes
from milan_ray.textfiles import clean, dict_reader, read_text

IMAGES, MASKS, UNITS = "images.npy", "masks.npy", "units.npy"
IDS, ACTIVATIONS = "ids.csv", "activations.csv"
ANNOTATIONS = "annotations.csv"
COLUMNS = ("layer", "unit", "summary")
"""Columns of ``annotations.csv`` that are read; others are ignored."""

_BYTE = np.float32(1 / 255)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder to write into, renamed to its final name on success and removed on failure.

    Args:
        folder: Folder to be made.

    Raises:
        MilanError: The folder exists already, or cannot be written.
    """
    if folder.exists():
        raise MilanError(f"{folder} exists already: choose another folder, or move it away.")
    part = folder.parent / f".{folder.name}.part"
    try:
        if part.exists():
            shutil.rmtree(part)
        part.mkdir(parents=True)
        yield part
        part.rename(folder)
    except OSError as error:
        raise MilanError(f"{folder} cannot be written ({error}): choose a folder that can.") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


@dataclass(frozen=True, eq=False)
class LayerFiles:
    """One layer of a published set: U units with k exemplars each, in rank order.

    Attributes:
        folder: The layer's folder; its name is the layer's name.
        images: (U, k, 3, H, W) RGB, uint8, or floats up to 1 or 255; None if they are still to be merged.
        masks: (U, k, 1, H, W), 0 or 1, of any type.
        units: int64 (U,), the channel of each position.
        has_units: Whether ``units`` comes from ``units.npy``; otherwise units equal positions.
        image_ids: int64 (U, k), rows of the source images in ImageFolder order; None without ``ids.csv``.
        activations: float32 (U, k); None without ``activations.csv``.
        white: The maximum channel value in ``images``: 255, or 1 for floats that never exceed 1.
    """

    folder: Path
    images: np.ndarray | None
    masks: np.ndarray
    units: np.ndarray
    has_units: bool
    image_ids: np.ndarray | None
    activations: np.ndarray | None
    white: int

    @property
    def name(self) -> str:
        """The layer's name."""
        return self.folder.name

    @property
    def k(self) -> int:
        """Exemplars per unit."""
        return int(self.masks.shape[1])

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of images and masks, pixels."""
        return self.masks.shape[3], self.masks.shape[4]

    def stored_images(self, position: int) -> np.ndarray:
        """One unit's images as they are stored.

        Raises:
            MilanError: The images are still to be merged.
        """
        if self.images is None:
            raise MilanError(
                f"{self.folder} has masks but no {IMAGES}: merge it with a local copy of its source images first "
                "(python -m jobs.annotations merge)."
            )
        return self.images[position]

    def unit_images(self, position: int) -> np.ndarray:
        """One unit's images, float32 (k, 3, H, W) in [0, 1], computed as in the reference."""
        images = self.stored_images(position).astype(np.float32)
        return images if self.white == 1 else images * _BYTE

    def unit_bytes(self, position: int) -> np.ndarray:
        """One unit's images, uint8 (k, 3, H, W)."""
        images = self.stored_images(position)
        if images.dtype == np.uint8:
            return np.asarray(images)
        return np.rint(images.astype(np.float64) * (255 / self.white)).astype(np.uint8)

    def unit_masks(self, position: int) -> np.ndarray:
        """One unit's masks, bool (k, H, W).

        Raises:
            MilanError: The masks hold values other than 0 and 1.
        """
        masks = self.masks[position, :, 0]
        marked = masks.astype(bool)
        if not np.array_equal(marked, masks):
            raise MilanError(
                f"{self.folder / MASKS} holds values other than 0 and 1 at position {position}: write masks as 0 and 1."
            )
        return marked


def layer_folders(root: Path) -> tuple[list[Path], list[Path]]:
    """Lists a set's layer folders, sorted by name, and its unexpected folders. Hidden folders are ignored.

    Raises:
        MilanError: There is no such set.
    """
    if not root.is_dir():
        raise MilanError(f"no folder {root}: give a published set's folder or zip.")
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    layers = [path for path in folders if (path / MASKS).exists() or (path / IMAGES).exists()]
    if not layers:
        raise MilanError(f"{root} holds no layers: each is a folder with {MASKS}, and {IMAGES} or {IDS}.")
    return layers, [path for path in folders if path not in layers]


def open_layer(folder: Path) -> LayerFiles:
    """Opens one layer. Reads array headers and CSV files, and images only if they are floats, to find their range.

    Raises:
        MilanError: A file is missing, damaged, or inconsistent with the others.
    """
    masks = _array(folder / MASKS)
    images = _array(folder / IMAGES) if (folder / IMAGES).exists() else None
    for file, array, channels in ((MASKS, masks, 1), (IMAGES, images, 3)):
        if array is not None and (array.ndim != 5 or array.shape[2] != channels or 0 in array.shape):
            raise MilanError(
                f"{folder / file} has shape {array.shape}: expected (units, exemplars, {channels}, height, width)."
            )
    if masks.dtype.kind not in "buif":
        raise MilanError(f"{folder / MASKS} holds {masks.dtype}: expected bool, integers or floats.")
    if images is not None and (images.shape[:2], images.shape[3:]) != (masks.shape[:2], masks.shape[3:]):
        raise MilanError(
            f"{folder / IMAGES} has shape {images.shape} and {MASKS} {masks.shape}: they must agree in units, "
            "exemplars, height and width."
        )
    units, has_units = np.arange(len(masks)), (folder / UNITS).exists()
    if has_units:
        units = np.array(_array(folder / UNITS))
        if units.shape != (len(masks),) or units.dtype.kind not in "iu":
            raise MilanError(
                f"{folder / UNITS} holds {units.dtype} {units.shape}: expected one channel number for each of the "
                f"{len(masks)} units."
            )
        units = units.astype(np.int64)
        if len(np.unique(units)) < len(units) or units.min() < 0:
            raise MilanError(f"{folder / UNITS} names a unit twice or a negative one: every unit must be there once.")
    ids = _numbers(folder / IDS, np.int64, masks.shape[:2])
    if ids is not None and ids.min() < 0:
        raise MilanError(f"{folder / IDS} holds the negative id {ids.min()}: ids are rows of the source images.")
    activations = _numbers(folder / ACTIVATIONS, np.float64, masks.shape[:2])
    return LayerFiles(
        folder,
        images,
        masks,
        units,
        has_units,
        ids,
        None if activations is None else activations.astype(np.float32),
        255 if images is None else _white(folder / IMAGES, images),
    )


def _array(path: Path) -> np.ndarray:
    if not path.exists():
        raise MilanError(f"{path} is missing: a layer needs {MASKS}, and {IMAGES} or {IDS} to merge them.")
    with explained(f"{path} is no complete .npy array", "fetch or write it again."):
        check_sizes(path)
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(array, np.ndarray):
        raise MilanError(f"{path} is an archive of arrays, not one .npy array: write it with numpy.save.")
    return array


def _numbers(path: Path, dtype: type, shape: tuple[int, int]) -> np.ndarray | None:
    """Reads a CSV of numbers without header; returns None if the file does not exist."""
    if not path.exists():
        return None
    expected = "expected rows of numbers, comma separated."
    with explained(f"{path} cannot be read", expected, OSError, ValueError):
        numbers: np.ndarray = np.loadtxt(path, dtype=dtype, delimiter=",", comments=None, ndmin=2)
    if numbers.shape != shape:
        raise MilanError(
            f"{path} has {numbers.shape[0]} rows of {numbers.shape[1]} numbers: expected {shape[0]} (units) of "
            f"{shape[1]} (exemplars)."
        )
    return numbers


def _white(path: Path, images: np.ndarray) -> int:
    """Returns the maximum channel value of the images: 255, or 1 for floats that never exceed 1.

    The reference treats all values as bytes, so images that its own earlier merges wrote as floats in [0, 1] turn
    black.
    """
    if images.dtype == np.uint8:
        return 255
    if images.dtype.kind != "f":
        raise MilanError(f"{path} holds {images.dtype}: expected uint8, or floats in [0, 1] or [0, 255].")
    low, high = min(float(unit.min()) for unit in images), max(float(unit.max()) for unit in images)
    if not 0 <= low <= high <= 255:
        raise MilanError(f"{path} holds values from {low:g} to {high:g}: expected floats in [0, 1] or [0, 255].")
    return 1 if high <= 1 else 255


def read_csv(path: Path, columns: Sequence[str], needs: str, remedy: str) -> list[tuple[int, dict[str, str]]]:
    """Reads a CSV file with a header.

    Args:
        path: The file.
        columns: Columns that it must have; others are kept, too.
        needs: The end of the message where it lacks one.
        remedy: The end of the message where it cannot be read.

    Returns:
        (number of its last line, column → cell) of each row.

    Raises:
        MilanError: The file cannot be read, is not UTF-8, lacks a column, or has one twice.
    """
    with explained(f"{path} cannot be read", remedy, OSError, csv.Error):
        reader = dict_reader(_text(path))
        names = reader.fieldnames or ()
        missing = [column for column in columns if column not in names]
        if missing:
            raise MilanError(f"{path} has no column {', '.join(missing)}: {needs}")
        twice = [column for column in columns if list(names).count(column) > 1]
        if twice:
            raise MilanError(f"{path}, line 1: has column {twice[0]} twice; rename or remove one of them.")
        return [(reader.line_num, row) for row in reader]


def _text(path: Path) -> str:
    """The text of a file.

    Raises:
        MilanError: It is neither UTF-8 nor begins with a byte-order mark.
        OSError: It cannot be read.
    """
    remedy = 'save it as UTF-8 (spreadsheets: "CSV UTF-8").'
    try:
        text = read_text(path)
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise MilanError(
            f"{path} cannot be read: line {line} holds byte 0x{error.object[error.start]:02x}, which is not "
            f"{error.encoding.upper()}; {remedy}"
        ) from error
    if "\0" in text:
        raise MilanError(f"{path} cannot be read: line 1 holds NUL, as UTF-16 without a byte-order mark does; {remedy}")
    return text


@dataclass(frozen=True)
class Annotation:
    """One row of ``annotations.csv``.

    Attributes:
        row: Its number, from 0.
        layer: The layer's name, stripped; kept as a string even if it looks like a number.
        unit: Channel.
        text: The annotation, as written; may be empty.
        line: The last line of the row in the file, from 1.
    """

    row: int
    layer: str
    unit: int
    text: str
    line: int


def read_annotations(path: Path, *, strict: bool = False) -> list[Annotation]:
    """Reads ``annotations.csv``. Columns may be in any order, and other columns are ignored.

    Args:
        path: The file.
        strict: Refuse rows with more cells than the header, whose text would be cut off at its comma.

    Raises:
        MilanError: The file is missing, is not text or lacks a column, or a row is incomplete or its unit is no whole
            number.
    """
    names = ", ".join(COLUMNS)
    annotations: list[Annotation] = []
    for line, row in read_csv(path, COLUMNS, f"it must have {names}.", f"give a CSV with columns {names}."):
        beyond = cast("dict[str | None, Sequence[str]]", row).get(None, ())
        if strict and any(map(str.strip, beyond)):
            raise MilanError(
                f"{path}, line {line}: has more cells than the header ({', '.join(beyond)!r} is beyond it); put texts "
                "with commas between double quotes."
            )
        layer, unit, text = (row[column] for column in COLUMNS)
        if layer is None or text is None or not (unit or "").strip().isdecimal():
            raise MilanError(
                f"{path}, line {line}: needs a layer, a whole number as unit and a summary, "
                f"got {layer!r}, {unit!r}, {text!r}."
            )
        annotations.append(Annotation(len(annotations), clean(layer), int(unit), text, line))
    return annotations


def write_annotations(path: Path, rows: Iterable[tuple[str, int | str, str]]) -> None:
    """Writes (layer, unit, text) rows as ``annotations.csv``."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(rows)
