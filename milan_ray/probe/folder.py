"""Probes of files: class folders or flat folders, with or without a file of labels, and shards of images."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa

from milan_ray.errors import MilanError, explained
from milan_ray.probe.archives import PACKED, TAR, archive_entries, archive_of, read_member
from milan_ray.probe.base import ImageRef, ProbeImage
from milan_ray.probe.decode import EXTENSIONS, image_endings, probe_image
from milan_ray.probe.files import (
    Found,
    absolute_root,
    ending,
    file_name,
    images_of,
    list_files,
    local_path,
    location,
    read_file,
    tell,
    tell_left_out,
)
from milan_ray.probe.manifest import Entry, build
from milan_ray.probe.tables import (
    ARROW,
    PARQUET,
    Columns,
    arrow_files,
    is_saved,
    read_row,
    sidecars,
    table_entries,
    table_of,
)
from milan_ray.remote import split_query
from milan_ray.textfiles import delimiter, read_rows, read_text, same_name, unquoted

_FILE_COLUMNS = ("file", "filename", "file_name", "path", "image", "name")
_LABEL_COLUMNS = ("label", "class_label", "class_name", "class", "category", "name", "wnid", "synset", "class_index")

_DESCRIPTIVE = ("state.json", "dataset_info.json", "dataset_dict.json")
"""Files that ``datasets`` writes alongside its shards."""


class FolderProbe:
    """The images below one or several roots: image files or, if a root has none, the rows and members of its shards.

    An image's class is the name of its top-level folder below the root; images directly in the root have no class. A
    file of labels replaces these classes. Ids follow torchvision's ``ImageFolder``: classes sorted, then folders, then
    files, root after root. Hidden and system files are ignored. Other files that are not images are left out and
    counted. A file that is reached by several links is listed once.

    Shards are Parquet files, Arrow files of ``datasets.save_to_disk``, and tar archives in WebDataset's layout. Ids
    follow the shards' names and the order inside each shard.
    """

    def __init__(
        self,
        roots: Sequence[str | Path],
        labels: str | Path | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        endings: tuple[str, ...] | None = None,
    ) -> None:
        """Stores the arguments; reads no files.

        Args:
            roots: Folders, single shards, or URIs that pyarrow's filesystems support (``s3://…``, ``gs://…``).
            labels: A CSV file whose header has a column of files (``file``, ``path``, …) and one of labels
                (``label``, ``class``, ``name``, …), or lines of ``file label``. Files are given by name or by path
                below a root.
            image_column: In shards, the column of images, or the part of a sample (``jpg``); None detects it.
            label_column: In shards, the column of classes, or the part of a sample (``cls``); None detects it.
            endings: The only endings, in lower case, of files that count as images, for probes whose image numbers
                must match another program's; None accepts all images.
        """
        self._endings = endings
        self._roots = tuple(map(absolute_root, roots))
        self._labels = None if labels is None else str(Path(labels).expanduser().resolve())
        self._columns = Columns(image_column, label_column)
        self.name = "+".join(PurePosixPath(split_query(root)[0]).name or root for root in self._roots)

    def manifest(self) -> pa.Table:
        """Lists the images by name, size and modification time, without reading them.

        Raises:
            MilanError: A root is missing, unreadable or without images, or labels or columns do not match.
        """
        labels = None if self._labels is None else _Labels(self._labels)
        entries: list[Entry] = []
        listed: set[str] = set()
        for root in self._roots:
            own = _entries_of(root, labels, self._columns, self._endings)
            if labels is None:
                tell_classes(root, own)
            if len(self._roots) > 1:
                fresh: dict[str, Entry] = {}
                for entry in own:
                    if (place := _real(entry)) not in listed:
                        fresh.setdefault(place, entry)
                if len(fresh) < len(own):
                    tell(f"probe: {len(own) - len(fresh)} of {len(own)} images in {root} are listed already")
                listed |= fresh.keys()
                own = list(fresh.values())
            entries += own
        if labels is not None:
            labels.tell(len(entries), self._roots)
        if self._columns != Columns() and all(_shard(entry) is None for entry in entries):
            raise MilanError(
                f"{', '.join(self._roots)} holds images as files: --image-column and --label-column are for Parquet, "
                "Arrow and tar files."
            )
        return build(entries)

    def read(self, ref: ImageRef) -> ProbeImage:
        """Reads and decodes one image.

        Raises:
            UnreadableImage: The image is missing, corrupt, empty or too large.
            MilanError: A remote filesystem failed on every attempt.
        """
        if table_of(ref) is not None:
            return read_row(ref, self._columns)
        if archive_of(ref) is not None:
            return read_member(ref)
        data = read_file(ref.root, ref.path)
        return probe_image(data, hashlib.sha256(data).hexdigest())

    def concept_maps(self, ref: ImageRef) -> dict[str, np.ndarray] | None:
        """None: this probe has no concept maps."""
        return None


class _Labels:
    """A file of labels, and a record of which of its names match images."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._labels = read_labels(path)
        self._used: dict[str, tuple[str, str]] = {}
        self._without: list[str] = []

    def of(self, root: str, path: str) -> str | None:
        """The label of an image, looked up by its path below the root, then by its name.

        Raises:
            MilanError: The label's name matches another image, too.
        """
        for name in (same_name(path), same_name(PurePosixPath(path).name)):
            if name in self._labels:
                place, other = self._used.setdefault(name, (_real(Entry(root, path)), path))
                if other != path and place != _real(Entry(root, path)):
                    raise MilanError(
                        f"{self._path} labels {name}, which may be {other} or {path}: write the paths below the root."
                    )
                return self._labels[name]
        self._without.append(path)
        return None

    def tell(self, images: int, roots: Sequence[str]) -> None:
        """Prints how many images have no label and how many labels have no image.

        Raises:
            MilanError: No label matches an image.
        """
        if not self._used:
            raise MilanError(f"{self._path} labels none of the images in {', '.join(roots)}: check its names.")
        if self._without:
            first = ", ".join(self._without[:3])
            tell(f"probe: {len(self._without)} of {images} images have no label in {self._path}, such as {first}")
        spare = [name for name in self._labels if name not in self._used]
        if spare:
            first = ", ".join(spare[:3])
            tell(f"probe: {len(spare)} of {len(self._labels)} names in {self._path} are no images, such as {first}")


def read_labels(path: str) -> dict[str, str]:
    """Reads a file of labels.

    Args:
        path: A CSV file with a header, or lines of ``file label``.

    Returns:
        File name (or path below the root) in composed Unicode (NFC) → label.

    Raises:
        MilanError: The file cannot be read, no line has a file and a label, or an image has two labels.
    """
    remedy = "give a CSV or lines of `file label`."
    with explained(f"cannot read the labels in {path}", remedy, OSError, UnicodeDecodeError, csv.Error):
        text = read_text(path)
        rows = read_rows(text)
    header = [name.lower() for name in rows[0]] if rows else []
    file_column = next((name for name in _FILE_COLUMNS if name in header), None)
    label_column = next((name for name in _LABEL_COLUMNS if name in header and name != file_column), None)
    if file_column and label_column:
        columns = header.index(file_column), header.index(label_column)
        _check_cells(path, text, len(header))
        pairs = [(row[columns[0]], row[columns[1]]) for row in rows[1:] if len(row) > max(columns)]
    elif rows and all(len(row) == 2 and row[0].lower().endswith(image_endings()) for row in rows):  # without a header
        _check_cells(path, text, 2)
        pairs = [(row[0], row[1]) for row in rows]
    else:
        split = [line.split(maxsplit=1) for line in text.splitlines()]
        pairs = [(unquoted(words[0]), unquoted(words[1])) for words in split if len(words) == 2]
    labels: dict[str, str] = {}
    for name, label in ((same_name(name), label) for name, label in pairs if name and label):
        if any(unicodedata.category(letter) == "Cc" for letter in name + label):
            raise MilanError(f"{path} has control characters in {name!r}, {label!r}: mend that line.")
        if labels.setdefault(name, label) != label:
            raise MilanError(f"{path} labels {name} twice, as {labels[name]!r} and as {label!r}: leave one.")
    if not labels:
        raise MilanError(f"no labels in {path}: give a CSV with columns `file` and `label`, or lines of `file label`.")
    return labels


def _check_cells(path: str, text: str, cells: int) -> None:
    """Rejects a CSV file with an unclosed quote or with rows longer than its first row.

    Raises:
        MilanError: The file is invalid.
    """
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter(text), skipinitialspace=True, strict=True)
    try:
        for row in rows:
            if len(row) > cells and any(map(str.strip, row[cells:])):
                raise MilanError(
                    f"line {rows.line_num} of {path} has {len(row)} cells, more than the first line's {cells}: put "
                    f"what has a {delimiter(text)!r} in it into double quotes."
                )
    except csv.Error as error:
        raise MilanError(f"line {rows.line_num} of {path} is no CSV ({error}): mend its quotes.") from error


def tell_classes(where: str, entries: Sequence[Entry]) -> None:
    """Prints how many images have no class, if other images have one or if the images come from shards."""
    without = [entry for entry in entries if entry.class_label is None]
    shards = bool(entries) and _shard(entries[0]) is not None
    if without and (shards or len(without) < len(entries)):
        why = "the shards do not say it" if shards else "they lie in no folder below it"
        first = without[0].path or where
        tell(f"probe: {len(without)} of {len(entries)} images in {where} have no class ({why}), such as {first}")


def _entries_of(root: str, labels: _Labels | None, columns: Columns, endings: tuple[str, ...] | None) -> list[Entry]:
    """Lists the images below one root as manifest entries."""
    listing = list_files(root)
    images, left_out = images_of(root, listing, endings)
    if images and not is_saved(listing.files):  # a saved data set may come with image files that its rows refer to
        tell_left_out(root, left_out, listing.links)
        entries = []
        for path, size, mtime_ns in sorted(images, key=lambda found: _parts(found.path)):
            label = (_parts(path)[0] or None) if labels is None else labels.of(root, path)
            entries.append(Entry(root, path, size, mtime_ns, class_label=label))
        return entries
    kinds = {kind: _ending_in(root, listing.files, kind) for kind in (PARQUET, ARROW, TAR)}
    described = {found.path for found in sidecars(kinds[PARQUET], kinds[TAR])}
    kinds[PARQUET] = [found for found in kinds[PARQUET] if found.path not in described]
    present = [kind for kind, files in kinds.items() if files]
    if not present:
        packed = next((found for found in listing.files if file_name(root, found.path).endswith(PACKED)), None)
        if packed is not None:
            raise MilanError(
                f"no images in {root}, but packed archives ({packed.path or root}): unpack them, or write plain .tar."
            )
        tell_left_out(root, left_out, listing.links)
        raise MilanError(
            f"no images in {root}: looked for files ending in {', '.join(EXTENSIONS)}, for others that begin as images "
            "do, and for .parquet, .arrow and .tar files."
        )
    if len(present) > 1:
        names = " and ".join(kind[0] for kind in present)
        raise MilanError(f"{root} holds {names} files: give a folder of one kind, or the files by name.")
    if labels is not None:
        raise MilanError(f"{root} brings its own labels: a file of labels is for folders of images.")
    (kind,) = present
    files = kinds[kind]
    if kind is ARROW:
        files = arrow_files(root, files, listing.files)
    used = {found.path for found in files}
    rest = (found.path for found in listing.files if found.path not in used)
    left_out = Counter(ending(path) for path in rest if PurePosixPath(path).name not in _DESCRIPTIVE)
    if kind is TAR:
        entries, others = archive_entries(root, files, columns)
        left_out += others
    else:
        entries = table_entries(root, files, columns)
    tell_left_out(root, left_out, listing.links)
    if not entries:
        raise MilanError(f"no images in {root}: its {kind[0]} files hold none.")
    return entries


def _ending_in(root: str, files: Sequence[Found], endings: tuple[str, ...]) -> list[Found]:
    return sorted(file for file in files if file_name(root, file.path).endswith(endings))


def _shard(entry: Entry) -> str | None:
    """The path below the root of the table or archive that holds an image; None for an image that is a file."""
    ref = ImageRef(0, entry.root, entry.path)
    table = table_of(ref)
    return archive_of(ref) if table is None else table


@lru_cache(maxsize=8192)
def _real_path(path: str) -> str:
    return os.path.realpath(path)


def _real(entry: Entry) -> str:
    """The image's location with all links resolved, for detecting images that two roots share."""
    local, shard = local_path(entry.root), _shard(entry)
    if shard is not None:  # the shard's real path, then the position in the shard
        file = location(entry.root, shard) if local is None else _real_path(location(local, shard))
        return file + entry.path[len(shard) :]
    if local is None:
        return location(entry.root, entry.path)
    file = os.path.join(local, entry.path)
    if os.path.islink(file):
        return os.path.realpath(file)
    return os.path.join(_real_path(os.path.dirname(file)), os.path.basename(file))


def _parts(path: str) -> tuple[str, str, str]:
    """Splits a path below a root into class folder (empty in the root), full folder and name: the sort key of ids."""
    folder, _, name = path.rpartition("/")
    return folder.partition("/")[0], folder, name
