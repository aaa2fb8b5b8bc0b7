"""Probes of folders with images and label maps, in the layouts of CamVid, Broden and ADE20K (docs/labelers.md).

Each image's version tag in the manifest covers its label maps, so a changed map gives the probe another fingerprint.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw

from milan_ray.errors import MilanError, explained
from milan_ray.probe.base import ImageRef, ProbeImage
from milan_ray.probe.decode import EXTENSIONS, FORMATS, MAX_PIXELS
from milan_ray.probe.folder import FolderProbe
from milan_ray.probe.manifest import Entry, build
from milan_ray.textfiles import clean, csv_in, delimiter, dict_reader, read_text, unquoted

LABEL_FOLDERS = ("labels", "annotations", "masks")
"""Possible names of the folder of label maps, a sibling of ``images``."""

LEGENDS = ("classes.csv", "classes.txt", "labels.csv", "names.txt", "objectInfo150.txt")
"""Possible names of the legend, a sibling of ``images``: it maps the numbers in label maps to names."""

VOID = {"", "void", "ignore", "unlabelled", "unlabeled", "other"}
"""Names of label map values that are not concepts."""

_DIGITS = 9
"""Maximum number of digits of a number in a label map."""

_BRODEN = ("color", "object", "part", "material", "scene", "texture")
"""Broden's categories; an entry is the file of a label map, or the number of a label of the whole image."""


def is_labelled(folder: Path) -> bool:
    """Whether a folder has one of the layouts that :func:`labelled_folder` reads, with all required files.

    A folder with ``images`` and ``annotations`` also needs a legend, because COCO uses the same folder names.
    """
    numbered = _label_folder(folder) is not None and _legend_of(folder) is not None
    return numbered or _is_broden(folder) or _is_ade20k(folder)


def labelled_folder(folder: str | Path, legend: str | Path | None = None) -> LabelledFolder:
    """The probe of a folder with label maps.

    Args:
        folder: A folder in the layout of Broden (``index.csv``, ``label.csv``, ``images/``), CamVid (``images/`` and
            ``labels/``, files of the same stem), or ADE20K (``NAME.jpg``, ``NAME_seg.png``, ``NAME.json``).
        legend: Names of the numbers in CamVid's label maps: lines or CSV rows of number and name.

    Raises:
        MilanError: The folder has none of these layouts, or a required legend is missing.
    """
    path = Path(folder).expanduser().resolve()
    if _is_broden(path):
        return BrodenFolder(path)
    if _label_folder(path) is not None:
        return NumberedFolder(path, legend)
    if _is_ade20k(path):
        return Ade20kFolder(path)
    raise MilanError(
        f"{path} has no label maps: give a folder with images/ and labels/, Broden's index.csv and label.csv, or "
        "ADE20K's NAME.jpg with NAME_seg.png."
    )


def read_legend(path: Path) -> dict[int, str]:
    """Reads the names of numbers in label maps: lines of ``number name``, a CSV, or ADE20K's ``objectInfo150.txt``.

    Lines without a number, such as a header, are skipped. Only the first of several names (``car, auto``) is used.

    Raises:
        MilanError: The file cannot be read, or has no line with a number and a name.
    """
    remedy = "give lines of `number name`."
    with explained(f"cannot read the legend {path}", remedy, OSError, UnicodeDecodeError):
        lines = read_text(path).splitlines()
    names = {}
    for line in map(clean, lines):
        between = "\t" if "\t" in line else delimiter(line)
        with csv_in(path):
            cells = next(csv.reader([line], delimiter=between), []) if between in line else []
        cells = [cell.strip() for cell in cells] if len(cells) > 1 else line.split(maxsplit=1)
        if len(cells) > 1 and _is_number(cells[0]):
            # In a tab-separated table, the name is the last cell; in comma-separated lines, it is the second.
            name = cells[-1] if between == "\t" else cells[1]
            names[int(cells[0])] = unquoted(name.split(",")[0])
        elif cells and _is_number(cells[0].partition(" ")[0]):  # `401 car, auto`
            number, _, name = cells[0].partition(" ")
            names[int(number)] = unquoted(name)
    if not names:
        raise MilanError(f"{path} is no legend of label maps: {remedy}")
    return names


def _is_number(text: str) -> bool:
    """Whether a text is a number that label maps can hold."""
    return text.isdecimal() and len(text) <= _DIGITS


class LabelledFolder:
    """Base class of the layouts: local files, and a manifest whose version tags cover the label maps."""

    def __init__(self, root: Path) -> None:
        """Stores the folder; reads no files.

        Args:
            root: The folder.
        """
        self._root = root
        self.name = root.name

    def manifest(self) -> pa.Table:
        """Lists the images by name, size and modification time, including those of their label maps.

        Raises:
            MilanError: The folder has no images.
        """
        entries = []
        for path, label in self._images():
            size, mtime_ns = _stat(self._root / path, "", "mend the index")
            tag = hashlib.sha256(repr(self._version()).encode())
            for file in self._label_files(path):
                tag.update(repr((file.name, *_stat(file, "the label map ", "put it there"))).encode())
            entries.append(Entry(str(self._root), path, size, mtime_ns, tag.hexdigest()[:16], label))
        if not entries:
            raise MilanError(f"no images with label maps in {self._root}: see docs/labelers.md for the layouts.")
        return build(entries)

    def read(self, ref: ImageRef) -> ProbeImage:
        """Reads and decodes one image.

        Raises:
            UnreadableImage: The image is missing, corrupt, empty or too large.
        """
        return FolderProbe([self._root]).read(ref)

    def concept_maps(self, ref: ImageRef) -> dict[str, np.ndarray] | None:
        """Concept → bool (H, W) for the concepts in an image; None for an image without label maps.

        Raises:
            MilanError: A label map is damaged.
        """
        raise NotImplementedError

    def _images(self) -> list[tuple[str, str | None]]:
        """(path below the root, class) of each image."""
        raise NotImplementedError

    def _label_files(self, path: str) -> list[Path]:
        """The files that an image's concept maps come from."""
        raise NotImplementedError

    def _version(self) -> object:
        """Everything else that determines the concept maps, for version tags."""
        return 1


class NumberedFolder(LabelledFolder):
    """CamVid's layout: ``images/A.jpg`` and ``labels/A.png``, whose pixels are numbers of a legend.

    Numbers without a name, and names such as void or unlabelled, are not concepts. Subfolders are read, too, as in
    ADE20K's scene parsing (``images/training/…``, ``annotations/training/…``).
    """

    def __init__(self, root: Path, legend: str | Path | None = None) -> None:
        """Reads the legend.

        Args:
            root: The folder.
            legend: File with the names of the numbers; None searches the folder for one of :data:`LEGENDS`.

        Raises:
            MilanError: There is no legend.
        """
        super().__init__(root)
        labels = _label_folder(root)
        assert labels is not None
        self._labels = labels
        place = Path(legend).expanduser() if legend else _legend_of(root)
        if place is None:
            raise MilanError(
                f"nothing says what the numbers of the label maps in {labels} mean: give --legend FILE with lines of "
                f"`number name`, or put such a file beside them as {LEGENDS[0]}."
            )
        self._legend = {n: name for n, name in read_legend(place).items() if name.lower() not in VOID}

    def concept_maps(self, ref: ImageRef) -> dict[str, np.ndarray] | None:
        """Concept → bool (H, W); None for an image without a label map."""
        files = self._label_files(ref.path)
        if not files:
            return None
        numbers = _numbers(files[0])
        return {self._legend[n]: numbers == n for n in np.unique(numbers).tolist() if n in self._legend}

    def _images(self) -> list[tuple[str, str | None]]:
        return [(path.relative_to(self._root).as_posix(), None) for path in _walk(self._root / "images")]

    def _label_files(self, path: str) -> list[Path]:
        file = (self._labels / Path(path).relative_to("images")).with_suffix(".png")
        return [file] if file.is_file() else []

    def _version(self) -> object:
        return sorted(self._legend.items())


class BrodenFolder(LabelledFolder):
    """Broden's layout (Bau et al. 2017).

    ``index.csv`` lists each image's label maps per category; ``label.csv`` maps their numbers to names. A map's value
    is red + 256 · green. Several maps, or several labels of a whole image, are separated by ``;``. The suffixes of
    colours and scenes (``-c``, ``-s``) are removed. An image's class is its scene, if it has one.
    """

    def __init__(self, root: Path) -> None:
        """Reads the index.

        Args:
            root: The folder.

        Raises:
            MilanError: The files are not in Broden's format.
        """
        super().__init__(root)
        self._names = {
            int(row["number"]): row["name"].removesuffix("-c").removesuffix("-s")
            for row in _rows(root / "label.csv", ("number", "name"))
        }
        self._index = {row["image"]: row for row in _rows(root / "index.csv", ("image", "sh", "sw"))}

    def concept_maps(self, ref: ImageRef) -> dict[str, np.ndarray] | None:
        """Concept → bool (H, W), at the resolution of the label maps."""
        names, row = self._names, self._index[ref.path.removeprefix("images/")]
        maps = [_numbers(file) for file in self._label_files(ref.path)]
        shape = maps[0].shape if maps else (int(row["sh"]), int(row["sw"]))
        concepts: dict[str, np.ndarray] = {}
        for numbers in maps:
            _add_regions(concepts, numbers, names)
        for entry in _entries(row):
            if entry.isdigit() and int(entry) in names:
                concepts[names[int(entry)]] = np.ones(shape, bool)
        return concepts

    def _images(self) -> list[tuple[str, str | None]]:
        scenes = ((image, (row.get("scene") or "").split(";")[0]) for image, row in self._index.items())
        return [
            (f"images/{image}", self._names.get(int(scene)) if scene.isdigit() else None) for image, scene in scenes
        ]

    def _label_files(self, path: str) -> list[Path]:
        entries = _entries(self._index[path.removeprefix("images/")])
        return [self._root / "images" / entry for entry in entries if entry and not entry.isdigit()]

    def _version(self) -> object:
        return sorted(self._names.items())


class Ade20kFolder(LabelledFolder):
    """ADE20K's layout: ``NAME.jpg``, ``NAME_seg.png`` and ``NAME.json``.

    An object's number is red // 10 · 256 + green of the map's pixels; the JSON file gives its name. Parts are polygons
    in the JSON file. The scene is true at every pixel. Only the first of several names (``car, auto``) is used.
    """

    def concept_maps(self, ref: ImageRef) -> dict[str, np.ndarray] | None:
        """Concept → bool (H, W)."""
        segmentation, about = self._label_files(ref.path)
        annotation = _ade20k(about)
        objects = annotation.get("object", [])
        numbers = _numbers(segmentation, ade20k=True)
        names = {int(thing["name_ndx"]): _first(thing["name"]) for thing in objects}
        concepts: dict[str, np.ndarray] = {}
        _add_regions(concepts, numbers, names)
        drawn: dict[str, Image.Image] = {}
        for thing in objects:
            corners = list(zip(thing["polygon"]["x"], thing["polygon"]["y"], strict=True))
            if thing.get("parts", {}).get("part_level", 0) and len(corners) > 2:
                canvas = drawn.setdefault(_first(thing["name"]), Image.new("1", numbers.shape[::-1]))
                ImageDraw.Draw(canvas).polygon(corners, fill=1)
        for name, canvas in drawn.items():
            concepts[name] = concepts.get(name, False) | np.asarray(canvas)
        if scene := self._scene(annotation):
            concepts[scene] = np.ones(numbers.shape, bool)
        return concepts

    @staticmethod
    def _scene(annotation: Mapping[str, Any]) -> str | None:
        named = [name for name in annotation.get("scene", []) if name]
        return named[-1] if named else None

    def _images(self) -> list[tuple[str, str | None]]:
        paths = [path.relative_to(self._root).as_posix() for path in _walk(self._root)]
        labelled = ((path, self._label_files(path)) for path in paths)
        return [
            (path, self._scene(_ade20k(files[1])))
            for path, files in labelled
            if all(file.is_file() for file in files)  # skips the label maps themselves
        ]

    def _label_files(self, path: str) -> list[Path]:
        whole = self._root / path
        return [whole.with_name(f"{whole.stem}_seg.png"), whole.with_suffix(".json")]


def _is_broden(folder: Path) -> bool:
    return all((folder / name).exists() for name in ("index.csv", "label.csv", "images"))


def _label_folder(folder: Path) -> Path | None:
    if not (folder / "images").is_dir():
        return None
    return next((folder / name for name in LABEL_FOLDERS if (folder / name).is_dir()), None)


def _legend_of(folder: Path) -> Path | None:
    return next((folder / name for name in LEGENDS if (folder / name).is_file()), None)


def _is_ade20k(folder: Path) -> bool:
    first = next(folder.glob("*_seg.png"), None)
    return first is not None and first.with_name(first.name.replace("_seg.png", ".json")).is_file()


def _walk(folder: Path) -> list[Path]:
    """The images below a folder, except hidden ones, sorted by path."""
    images = (path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS)
    return sorted(path for path in images if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def _stat(file: Path, kind: str, remedy: str) -> tuple[int, int]:
    """Size and modification time of a file."""
    try:
        status = file.stat()
    except OSError as error:
        raise MilanError(f"cannot read {kind}{file} ({error.strerror}): {remedy}.") from error
    return status.st_size, status.st_mtime_ns


def _numbers(file: Path, ade20k: bool = False) -> np.ndarray:
    """The numbers in a label map, int64 (H, W): grey or palette values, or red and green combined.

    Raises:
        MilanError: The map is missing, damaged or too large.
    """
    with (
        explained(f"cannot read the label map {file}", "put a sound one there."),
        Image.open(io.BytesIO(file.read_bytes()), formats=FORMATS) as image,
    ):
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width}×{image.height} pixels are too many")
        pixels = np.asarray(image).astype(np.int64)
    if pixels.ndim == 2:
        return pixels
    red, green = pixels[..., 0], pixels[..., 1]
    return red // 10 * 256 + green if ade20k else red + 256 * green


def _add_regions(concepts: dict[str, np.ndarray], numbers: np.ndarray, names: Mapping[int, str]) -> None:
    """Adds the region of each named number in a label map (H, W) to the maps of concepts."""
    for number in np.unique(numbers).tolist():
        if number in names:
            concepts[names[number]] = concepts.get(names[number], False) | (numbers == number)


def _first(name: str) -> str:
    return name.split(",")[0].strip()


def _rows(path: Path, needed: tuple[str, ...]) -> list[dict[str, str]]:
    with explained(f"cannot read {path}", "give Broden's own file.", OSError, UnicodeDecodeError), csv_in(path):
        rows = list(dict_reader(read_text(path)))
    if not rows or any(rows[0].get(name) is None for name in needed):
        raise MilanError(f"{path} is none of Broden's: it lacks rows or the columns {', '.join(needed)}.")
    return rows


def _entries(row: Mapping[str, str]) -> list[str]:
    return [entry for category in _BRODEN for entry in (row.get(category) or "").split(";")]


def _ade20k(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_bytes())["annotation"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MilanError(f"cannot read {file} ({error!r}): give ADE20K's own file.") from error
