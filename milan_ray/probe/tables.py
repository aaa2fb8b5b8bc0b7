"""Images in tables: Parquet files and the Arrow files of Hugging Face's ``datasets.save_to_disk``."""

from __future__ import annotations

import json
import math
import os
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from milan_ray.errors import MilanError, UnreadableImage, explained
from milan_ray.probe.base import ImageRef, ProbeImage
from milan_ray.probe.decode import probe_image
from milan_ray.probe.files import Found, file_name, local_path, location, place, read_file, tell
from milan_ray.probe.manifest import Entry
from milan_ray.remote import is_uri
from milan_ray.tensorfiles import check_groups

PARQUET, ARROW = (".parquet",), (".arrow",)
"""File name endings of tables."""

_PLACE = re.compile(r"(?s)(.*)#(\d+):(\d+)")
"""Path of a row in a manifest: file, row group or record batch, row in this group."""

LIKE_LABELS = (
    "label",
    "labels",
    "class_label",
    "class_name",
    "class",
    "category",
    "target",
    "fine_label",
    "wnid",
    "synset",
)
"""Names, in lower case, of columns that probably hold classes."""

_NOT_A_PATH = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


@dataclass(frozen=True)
class Columns:
    """The columns of a table that hold images and classes.

    Attributes:
        image: Column of images. None selects ``image``, or the only column that can hold images.
        label: Column of classes. None selects ``label``, or the only column of class names.
    """

    image: str | None = None
    label: str | None = None


def table_of(ref: ImageRef) -> str | None:
    """The table's path below the root, empty if the root is the table; None for images that are in no table."""
    match = _PLACE.fullmatch(ref.path)
    return match[1] if match and file_name(ref.root, match[1]).endswith(PARQUET + ARROW) else None


def _readable(root: str, path: str) -> AbstractContextManager[None]:
    """Converts errors of Arrow's readers into one that names the table."""
    errors = (OSError, pa.ArrowException, IndexError)
    return explained(f"cannot read {location(root, path)}", "mend it, or write it again.", *errors)


def table_entries(root: str, files: Sequence[Found], columns: Columns) -> list[Entry]:
    """Lists the rows of tables as manifest entries; reads no images.

    Args:
        root: The root folder of the files.
        files: The files, in order.
        columns: The columns to read.

    Raises:
        MilanError: A file cannot be read or lacks a column.
    """
    entries = []
    named: dict[str, tuple[list[str] | None, str]] = {}
    for file in files:
        where = location(root, file.path)
        with _readable(root, file.path):
            table = _open(root, file.path)
            if file.size is not None and sum(table.rows) > 8 * file.size:  # a row takes at least one bit
                raise pa.ArrowInvalid(f"it claims {sum(table.rows):,} rows, and has {file.size:,} bytes")
            image, label, names = _chosen(table.schema, columns, where)
            if label is not None:
                first_names, first_where = named.setdefault(label, (names, where))
                if first_names != names:
                    raise MilanError(
                        f"column {label!r} has other classes in {where} than in {first_where} "
                        f"({_some(names)}; {_some(first_names)}): give them by themselves, or write them with the same."
                    )
            for group, rows in enumerate(table.rows):
                classes = table.column(group, label).to_pylist() if label is not None else [None] * rows
                tags = _tags(root, file, table, group, image)
                for row, name in enumerate(classes):
                    path = f"{file.path}#{group}:{row}"
                    entries.append(Entry(root, path, None, file.mtime_ns, tags[row], class_name(name, names, where)))
    return entries


def is_saved(files: Sequence[Found]) -> bool:
    """Whether a folder was written by ``save_to_disk``."""
    names = {PurePosixPath(file.path).name for file in files}
    return "state.json" in names and any(name.endswith(ARROW) for name in names)


def arrow_files(root: str, files: Sequence[Found], others: Sequence[Found]) -> list[Found]:
    """The Arrow files of one data set: those listed in its ``state.json``, in this order.

    Args:
        root: The root.
        files: The Arrow files below it.
        others: All other files below it.

    Raises:
        MilanError: There are several data sets, or an indices file selects the data set's rows.
    """
    states = [file for file in others if PurePosixPath(file.path).name == "state.json"]
    if len(states) > 1:
        folders = ", ".join(sorted(str(PurePosixPath(file.path).parent) for file in states))
        raise MilanError(f"{root} holds several data sets ({folders}): give one of these folders, or several, by name.")
    if not states:
        return list(files)
    path = states[0].path
    what = f"cannot read {location(root, path)}"
    with explained(what, "save the data set again.", ValueError, KeyError, TypeError):
        state = json.loads(read_file(root, path))
        names = [str(item["filename"]) for item in state["_data_files"]]
    if state.get("_indices_data_files"):
        raise MilanError(
            f"{root} is saved with a choice of rows beside its data: call flatten_indices() and save_to_disk again."
        )
    folder = path.rpartition("/")[0]
    below = {file.path: file for file in files}
    wanted = [f"{folder}/{name}" if folder else name for name in names]
    absent = next((name for name in wanted if name not in below), None)
    if absent is not None:
        raise MilanError(f"{location(root, absent)} is missing: {path} names it; copy or save the data set again.")
    return [below[name] for name in wanted]


def read_row(ref: ImageRef, columns: Columns) -> ProbeImage:
    """Reads and decodes one row's image.

    Raises:
        UnreadableImage: The image is null, missing, corrupt, empty or too large.
    """
    match = _PLACE.fullmatch(ref.path)
    assert match is not None  # table_of
    path, group, row = match[1], int(match[2]), int(match[3])
    mtime = _mtime(ref.root, path)
    with _reading, _readable(ref.root, path):
        image = _image_column(ref.root, path, mtime, columns)
        value = _images(ref.root, path, mtime, group, image)[row].as_py()
    data, target = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if data is None and target:
        data = _beside(ref.root, path, str(target))
    if data is None:
        raise UnreadableImage("is null")
    return probe_image(data)


def _beside(root: str, path: str, target: str) -> bytes:
    """Reads the image file that a row refers to instead of storing its bytes.

    Args:
        root: The root of the table.
        path: The table's path below the root.
        target: Path of the image file, absolute or relative to the table's folder.

    Raises:
        UnreadableImage: The target is a URL, or the file is missing or not readable.
    """
    if _NOT_A_PATH.match(target):
        raise UnreadableImage(f"lies at {target}: nothing is fetched; download the images, or embed them in the table")
    try:
        if os.path.isabs(target):
            return read_file("/", target)
        return read_file(_folder(root, path), target)
    except UnreadableImage as error:
        raise UnreadableImage(f"lies in the file {target}, which {error}") from error


def _folder(root: str, path: str) -> str:
    return location(root, path).rpartition("/")[0]


class _Parquet:
    """A Parquet file, read by row group."""

    def __init__(self, root: str, path: str) -> None:
        system, target = place(root, path)
        stream = system.open_input_file(target)
        self._file = pq.ParquetFile(stream)
        check_groups(self._file.metadata, stream.size())
        self.schema: pa.Schema = self._file.schema_arrow
        groups = range(self._file.num_row_groups)
        self.rows = [self._file.metadata.row_group(group).num_rows for group in groups]

    def column(self, group: int, name: str) -> pa.ChunkedArray:
        return self._file.read_row_group(group, columns=[name]).column(0)

    def holds_paths(self, group: int, name: str) -> bool:
        """Whether some images of a group may be stored as paths instead of bytes."""
        leaves = self._file.metadata.row_group(group)
        for leaf in map(leaves.column, range(leaves.num_columns)):
            if leaf.path_in_schema == f"{name}.bytes":
                return leaf.statistics is None or not leaf.statistics.has_null_count or leaf.statistics.null_count > 0
        return False

    def paths(self, group: int, name: str) -> list[Any]:
        return (
            self._file.read_row_group(group, columns=[f"{name}.path"]).column(0).combine_chunks().field(0).to_pylist()
        )


class _Arrow:
    """An Arrow file in the stream or file format, read by record batch; local files are memory-mapped."""

    def __init__(self, root: str, path: str) -> None:
        local = local_path(root)
        system, target = place(root, path)
        source = pa.memory_map(target) if local is not None else system.open_input_file(target).read_buffer()
        try:
            reader = pa.ipc.open_stream(source)
        except pa.ArrowInvalid:
            reader = pa.ipc.open_file(source)
        self._batches = reader.read_all().to_batches()
        self.schema: pa.Schema = reader.schema
        self.rows = [batch.num_rows for batch in self._batches]

    def column(self, group: int, name: str) -> pa.ChunkedArray:
        column = self._batches[group].column(name)
        column.validate(full=True)  # the offsets in a damaged file may point outside its buffers
        return pa.chunked_array([column])

    def holds_paths(self, group: int, name: str) -> bool:
        column = self._batches[group].column(name)
        return pa.types.is_struct(column.type) and column.field("bytes").null_count > 0

    def paths(self, group: int, name: str) -> list[Any]:
        return self.column(group, name).combine_chunks().field("path").to_pylist()


def _open(root: str, path: str) -> _Parquet | _Arrow:
    return _Arrow(root, path) if file_name(root, path).endswith(ARROW) else _Parquet(root, path)


_reading = threading.Lock()
"""Held while a table is read: only one thread at a time may use an open file, and threads often read the same group."""


@lru_cache(maxsize=2)
def _opened(root: str, path: str, mtime: int | None) -> _Parquet | _Arrow:
    """Opens a table; a changed modification time opens it again."""
    return _open(root, path)


@lru_cache(maxsize=2)  # rows are read mostly in order: each group is decoded once; the second entry serves readahead
def _images(root: str, path: str, mtime: int | None, group: int, column: str) -> pa.ChunkedArray:
    return _opened(root, path, mtime).column(group, column)


@lru_cache(maxsize=64)
def _image_column(root: str, path: str, mtime: int | None, columns: Columns) -> str:
    return _image_of(_opened(root, path, mtime).schema, columns.image, location(root, path))


def _mtime(root: str, path: str) -> int | None:
    """Modification time of a local file, ns: the key that invalidates cached content when the file changes."""
    local = local_path(root)
    if local is None:
        return None
    try:
        return os.stat(os.path.join(local, path) if path else local).st_mtime_ns
    except OSError:
        return None


def _features(schema: pa.Schema) -> dict[str, dict[str, Any]]:
    """The column features that Hugging Face's ``datasets`` stores in a schema; empty for other tables."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _image_of(schema: pa.Schema, wanted: str | None, location: str) -> str:
    """The name of the image column.

    Raises:
        MilanError: No column, or more than one, can be the image column.
    """
    names = schema.names
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise MilanError(f"{location} has two columns {twice!r}: give each a name of its own.")
    if wanted is not None:
        if wanted not in names:
            raise MilanError(f"{location} has no column {wanted!r}: it has {', '.join(names)}.")
        if not _can_hold_images(schema.field(wanted).type):
            raise MilanError(
                f"column {wanted!r} of {location} holds {schema.field(wanted).type}, no encoded images: choose another."
            )
        return wanted
    if "image" in names and _can_hold_images(schema.field("image").type):
        return "image"
    features = _features(schema)
    able = [name for name in names if _can_hold_images(schema.field(name).type)]
    for kind in (
        [name for name in able if features.get(name, {}).get("_type") == "Image"],
        [name for name in able if pa.types.is_struct(schema.field(name).type)],
        able,
    ):
        if len(kind) == 1:
            return kind[0]
        if kind:
            raise MilanError(
                f"{location} has several columns that can hold images ({', '.join(kind)}): choose one with "
                "--image-column."
            )
    raise MilanError(f"{location} has no column of encoded images: it has {', '.join(names)}.")


def _can_be_classes(type_: pa.DataType) -> bool:
    return not pa.types.is_nested(type_)


def _some(names: list[str] | None) -> str:
    if names is None:
        return "without names"
    return ", ".join(names[:4]) + (", …" if len(names) > 4 else "")


def _can_hold_images(type_: pa.DataType) -> bool:
    if pa.types.is_struct(type_):
        return type_.get_field_index("bytes") >= 0 and _is_binary(type_.field("bytes").type)
    return _is_binary(type_)


def _is_binary(type_: pa.DataType) -> bool:
    kinds = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_null)
    return any(kind(type_) for kind in kinds)


def _chosen(schema: pa.Schema, columns: Columns, location: str) -> tuple[str, str | None, list[str] | None]:
    """The image column, the class column or None, and the names of the classes' numbers or None."""
    image = _image_of(schema, columns.image, location)
    features = _features(schema)
    label = columns.label
    if label is None:
        named = [name for name in schema.names if features.get(name, {}).get("_type") == "ClassLabel"]
        label = "label" if "label" in schema.names else named[0] if len(named) == 1 else None
        able = [name for name in schema.names if name != image and _can_be_classes(schema.field(name).type)]
        if label is None and named:
            tell(f"probe: {location} has several columns of classes ({', '.join(named)}): --label-column chooses one")
        elif label is None and any(name.lower() in LIKE_LABELS for name in able):
            like = ", ".join(name for name in able if name.lower() in LIKE_LABELS)
            tell(f"probe: {location} has no column 'label'; {like} may be meant: --label-column chooses one")
    elif label not in schema.names:
        raise MilanError(f"{location} has no column {label!r}: it has {', '.join(schema.names)}.")
    if label is not None and not _can_be_classes(schema.field(label).type):
        raise MilanError(
            f"column {label!r} of {location} holds {schema.field(label).type}, no classes: choose another with "
            f"--label-column (it has {', '.join(schema.names)})."
        )
    names = features.get(label or "", {}).get("names")
    return image, label, [str(name) for name in names] if isinstance(names, list) else None


def class_name(value: object, names: list[str] | None, where: str) -> str | None:
    """Converts a cell to a class name; None for a cell without a class.

    Whole numbers are written without a decimal point, whatever their type. Bytes are decoded as UTF-8.

    Args:
        value: The cell.
        names: Names of the classes' numbers, or None.
        where: The table, for messages.

    Raises:
        MilanError: The bytes are not valid UTF-8.
    """
    if isinstance(value, float):
        if math.isnan(value):
            return None
        value = int(value) if value.is_integer() else value
    if value is None:
        return None
    if names is not None and isinstance(value, int):
        return names[value] if 0 <= value < len(names) else None  # −1 is "unknown"
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise MilanError(
                f"the classes of {where} are bytes that are no text: choose their column with --label-column."
            ) from error
    return str(value)


def _tags(root: str, file: Found, table: _Parquet | _Arrow, group: int, image: str) -> list[str]:
    """Version tags of a group's rows: the table's tag, extended by that of the image file if the row refers to one."""
    whole = f"{file.size} bytes"
    rows = table.rows[group]
    if not pa.types.is_struct(table.schema.field(image).type) or not table.holds_paths(group, image):
        return [whole] * rows
    if table.schema.field(image).type.get_field_index("path") < 0 or is_uri(root):
        return [whole] * rows
    return [whole + _version(root, file.path, target) for target in table.paths(group, image)]


def _version(root: str, path: str, target: object) -> str:
    if not isinstance(target, str) or _NOT_A_PATH.match(target):
        return ""
    try:
        status = os.stat(target if os.path.isabs(target) else os.path.join(_folder(root, path), target))
    except OSError:
        return ""
    return f" {target} {status.st_size} {status.st_mtime_ns}"


def sidecars(tables: Sequence[Found], archives: Sequence[Found]) -> Iterator[Found]:
    """Yields the tables that describe an archive of the same name."""
    stems = {archive.path.rpartition(".")[0] for archive in archives}
    yield from (table for table in tables if table.path.rpartition(".")[0] in stems)
