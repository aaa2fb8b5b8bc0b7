"""Probes made of image files: folders of classes, flat folders, with or without a file of labels, local or remote."""

from __future__ import annotations

import csv
import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
from pyarrow import fs

from milan_ray.errors import MilanError, UnreadableImage
from milan_ray.probe.base import ImageRef, ProbeImage
from milan_ray.probe.decode import decode
from milan_ray.probe.manifest import Entry, build
from milan_ray.remote import is_uri, open_uri, split_query, why

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""File name endings taken for images, whatever their case: torchvision's."""

_PAUSES = (0.5, 2.0)
"""Seconds between the attempts to read an image from an object store that fails for a moment."""

_FILE_COLUMNS = ("file", "filename", "file_name", "path", "image", "name")
_LABEL_COLUMNS = ("label", "class_label", "class_name", "class", "category", "name", "wnid", "synset", "class_index")


class FolderProbe:
    """The images below one or several roots.

    An image's class is the name of the folder directly below the root that it lies in; images directly in the root
    have none. Ids follow torchvision's ``ImageFolder``: classes sorted, then folders, then files, root after root.
    Hidden files and folders are left out. A file of labels takes the folders' place.
    """

    def __init__(self, roots: Sequence[str | Path], labels: str | Path | None = None) -> None:
        """Nothing is read yet.

        Args:
            roots: Folders, or URIs that pyarrow's filesystems understand (``s3://…``, ``gs://…``).
            labels: A CSV file whose header has a column of files (``file``, ``path``, …) and one of labels
                (``label``, ``class``, ``name``, …), or lines of ``file label``. Files are names or paths below a root.
        """
        self._roots = tuple(str(root) if is_uri(root) else str(Path(root).expanduser().resolve()) for root in roots)
        self._labels = None if labels is None else str(Path(labels).expanduser().resolve())
        self.name = "+".join(PurePosixPath(split_query(root)[0]).name or root for root in self._roots)

    def manifest(self) -> pa.Table:
        """Lists the images by name, size and modification time, without reading them.

        Raises:
            MilanError: A root is missing, unreadable or without images; or the labels do not fit.
        """
        labels = None if self._labels is None else read_labels(self._labels)
        entries = []
        for root in self._roots:
            found = sorted(_list_remote(root) if is_uri(root) else _list_local(root), key=lambda item: _parts(item[0]))
            if not found:
                raise MilanError(f"no images in {root}: looked for files ending in {', '.join(EXTENSIONS)}.")
            for path, size, mtime_ns in found:
                folder = _parts(path)[0] or None
                label = folder if labels is None else labels.get(path, labels.get(PurePosixPath(path).name))
                entries.append(Entry(root, path, size, mtime_ns, class_label=label))
        if labels is not None and all(entry.class_label is None for entry in entries):
            raise MilanError(f"{self._labels} labels none of the images in {', '.join(self._roots)}: check its names.")
        return build(entries)

    def read(self, ref: ImageRef) -> ProbeImage:
        """Reads and decodes one image.

        Raises:
            UnreadableImage: It is missing, corrupt, empty or too large.
            MilanError: A remote filesystem failed, time after time.
        """
        data = _read_remote(ref) if is_uri(ref.root) else _read_local(ref)
        return ProbeImage(decode(data), hashlib.sha256(data).hexdigest())

    def concept_maps(self, ref: ImageRef) -> dict[str, np.ndarray] | None:
        """Unknown: None."""
        return None


@lru_cache
def filesystem(root: str) -> tuple[fs.FileSystem, str]:
    """The filesystem of a URI, and the path in it; one client per process.

    Raises:
        MilanError: No filesystem answers to it.
    """
    return open_uri(root)


def read_labels(path: str) -> dict[str, str]:
    """Reads a file of labels.

    Args:
        path: A CSV with header, or lines of ``file label``.

    Returns:
        File name (or path below the root) → label.

    Raises:
        MilanError: It cannot be read, or no line has a file and a label.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise MilanError(f"cannot read the labels in {path} ({error}): give a CSV or lines of `file label`.") from error
    rows = list(csv.reader(lines))
    header = [name.strip().lower() for name in rows[0]] if rows else []
    file_column = next((name for name in _FILE_COLUMNS if name in header), None)
    label_column = next((name for name in _LABEL_COLUMNS if name in header and name != file_column), None)
    if file_column and label_column:
        file, label = header.index(file_column), header.index(label_column)
        pairs = [(row[file], row[label]) for row in rows[1:] if len(row) > max(file, label)]
    else:
        split = [line.split(maxsplit=1) for line in lines]
        pairs = [(words[0], words[1].strip()) for words in split if len(words) == 2]
    if not pairs:
        raise MilanError(f"no labels in {path}: give a CSV with columns `file` and `label`, or lines of `file label`.")
    return dict(pairs)


def _parts(path: str) -> tuple[str, str, str]:
    """Class folder (empty in the root), whole folder and name of a path below a root: also the order of the ids."""
    folder, _, name = path.rpartition("/")
    return folder.partition("/")[0], folder, name


def _wanted(path: str) -> bool:
    return path.lower().endswith(EXTENSIONS) and not any(part.startswith(".") for part in path.split("/"))


_Found = Iterator[tuple[str, int | None, int | None]]


def _list_local(root: str) -> _Found:
    def fail(error: OSError) -> None:
        raise MilanError(
            f"cannot list {error.filename} ({error.strerror}): give an existing folder of images that you may read."
        ) from error

    for folder, folders, files in os.walk(root, onerror=fail, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = os.path.relpath(folder, root).replace(os.sep, "/")
        for name in files:
            path = name if below == "." else f"{below}/{name}"
            if not _wanted(path):
                continue
            try:
                status = os.stat(os.path.join(folder, name))
            except OSError:  # a broken link: listed here, then skipped with a reason when read
                yield path, None, None
            else:
                yield path, status.st_size, status.st_mtime_ns


def _list_remote(root: str) -> _Found:
    system, base = filesystem(root)
    try:
        infos = system.get_file_info(fs.FileSelector(base, recursive=True))
    except (OSError, pa.ArrowException) as error:
        raise MilanError(f"cannot list {root}: {why(error, root)}") from error
    for info in infos:
        path = info.path.removeprefix(base).lstrip("/")
        if info.type == fs.FileType.File and _wanted(path):
            yield path, info.size, info.mtime_ns


def _read_local(ref: ImageRef) -> bytes:
    try:
        return Path(ref.root, ref.path).read_bytes()
    except OSError as error:
        raise UnreadableImage(f"cannot be read ({error.strerror})") from error


def _read_remote(ref: ImageRef) -> bytes:
    system, base = filesystem(ref.root)
    for pause in (*_PAUSES, None):
        try:
            with system.open_input_file(f"{base.rstrip('/')}/{ref.path}") as file:
                return file.read()
        except (FileNotFoundError, PermissionError) as error:
            raise UnreadableImage(f"cannot be read ({type(error).__name__})") from error
        except OSError as error:  # the network's fault, not the image's: skipping it would change the result
            if pause is None:
                raise MilanError(f"cannot read {ref.location}: {why(error, ref.root)}") from error
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")
