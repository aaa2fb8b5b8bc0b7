"""Probes that are not files of their own: arrays in memory, and rows of Parquet tables."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pyarrow import fs

from milan_ray.errors import MilanError, UnreadableImage
from milan_ray.probe.base import ImageRef, ProbeImage
from milan_ray.probe.decode import decode
from milan_ray.probe.folder import filesystem
from milan_ray.probe.manifest import Entry, build
from milan_ray.remote import is_uri


class ArrayProbe:
    """Images in memory. They travel to every actor with the probe, so keep them to some hundred MB."""

    def __init__(
        self,
        images: np.ndarray,
        labels: Sequence[str] | None = None,
        concept_maps: Sequence[Mapping[str, np.ndarray]] | None = None,
        name: str = "arrays",
    ) -> None:
        """Takes the images as they are.

        Args:
            images: uint8 (N, H, W, 3), RGB.
            labels: Class of each image, or None.
            concept_maps: Per image, concept → bool (H, W), or None.
            name: The probe's name.

        Raises:
            MilanError: The images have another shape or type, or the other lists another length.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise MilanError(f"images are {images.dtype} {images.shape}: an ArrayProbe takes uint8 (N, H, W, 3).")
        for given in (labels, concept_maps):
            if given is not None and len(given) != len(images):
                raise MilanError(f"{len(images)} images with {len(given)} labels or concept maps: give one for each.")
        self.name = name
        self._images = images
        self._labels = None if labels is None else list(labels)
        self._concept_maps = concept_maps

    def manifest(self) -> pa.Table:
        """Lists the images; an image's version tag is the hash of its pixels, and of its concept maps.

        Raises:
            MilanError: There are none.
        """
        if not len(self._images):
            raise MilanError(f"probe {self.name!r} has no images: give at least one.")
        entries = []
        for i, pixels in enumerate(self._images):
            sha256 = _sha256(pixels)
            label = None if self._labels is None else str(self._labels[i])
            tag = sha256 if self._concept_maps is None else _tag(sha256, self._concept_maps[i])
            entries.append(Entry(f"array:{self.name}", str(i), etag=tag, class_label=label, sha256=sha256))
        return build(entries)

    def read(self, ref: ImageRef) -> ProbeImage:
        """The image of this row."""
        pixels = self._images[int(ref.path)]
        return ProbeImage(Image.fromarray(pixels), _sha256(pixels))

    def concept_maps(self, ref: ImageRef) -> dict[str, np.ndarray] | None:
        """Concept → bool (H, W) of this row's image, where given."""
        return None if self._concept_maps is None else dict(self._concept_maps[int(ref.path)])


class ParquetProbe:
    """Encoded images in a column of one or several Parquet files, read by row group."""

    def __init__(self, path: str | Path, image: str = "image", label: str | None = None) -> None:
        """Nothing is read yet.

        Args:
            path: A Parquet file or a folder of them, local or a URI.
            image: Column of encoded images (binary, or a struct with a binary field ``bytes``).
            label: Column of classes; None takes ``label`` where there is such a column.
        """
        self._root = str(path) if is_uri(path) else str(Path(path).expanduser().resolve())
        self._image = image
        self._label = label
        self.name = PurePosixPath(self._root).name or self._root

    def manifest(self) -> pa.Table:
        """Lists the rows from the files' footers and the column of labels; images are not read.

        Raises:
            MilanError: There are no such files, columns or rows.
        """
        system, base = _open(self._root)
        entries = []
        try:
            for path, info in _parquet_files(system, base):
                with system.open_input_file(info.path) as source:
                    for position, label in self._rows(pq.ParquetFile(source), f"{self._root}/{path}"):
                        entries.append(
                            Entry(
                                self._root,
                                f"{path}#{position}",
                                mtime_ns=info.mtime_ns,
                                etag=f"{info.size} bytes",
                                class_label=label,
                            )
                        )
        except (OSError, pa.ArrowException) as error:
            raise MilanError(f"cannot read {self._root} ({error}): give a Parquet file or a folder of them.") from error
        if not entries:
            raise MilanError(f"no images in {self._root}: it has no Parquet file with rows.")
        return build(entries)

    def _rows(self, file: pq.ParquetFile, location: str) -> Iterator[tuple[str, str | None]]:
        """(``row group:row``, class) of each row."""
        names = file.schema_arrow.names
        label = self._label or ("label" if "label" in names else None)
        for column in (self._image, label):
            if column is not None and column not in names:
                raise MilanError(f"{location} has no column {column!r}: it has {', '.join(names)}.")
        for group in range(file.num_row_groups):
            classes: list[object] = [None] * file.metadata.row_group(group).num_rows
            if label is not None:
                classes = file.read_row_group(group, columns=[label]).column(0).to_pylist()
            for row, name in enumerate(classes):
                yield f"{group}:{row}", None if name is None else str(name)

    def read(self, ref: ImageRef) -> ProbeImage:
        """Reads and decodes one row's image.

        Raises:
            UnreadableImage: It is null, corrupt, empty or too large.
        """
        path, _, position = ref.path.rpartition("#")
        group, _, row = position.partition(":")
        value = _images(ref.root, path, int(group), self._image)[int(row)].as_py()
        if value is None:
            raise UnreadableImage("is null")
        return ProbeImage(decode(value), hashlib.sha256(value).hexdigest())

    def concept_maps(self, ref: ImageRef) -> dict[str, np.ndarray] | None:
        """Unknown: None."""
        return None


def _sha256(pixels: np.ndarray) -> str:
    return hashlib.sha256(pixels.tobytes()).hexdigest()


def _tag(sha256: str, maps: Mapping[str, np.ndarray]) -> str:
    """Identity of an image and its concept maps."""
    digest = hashlib.sha256(sha256.encode())
    for name in sorted(maps):
        digest.update(repr((name, maps[name].shape)).encode())
        digest.update(np.packbits(maps[name]).tobytes())
    return digest.hexdigest()


def _open(root: str) -> tuple[fs.FileSystem, str]:
    return filesystem(root) if is_uri(root) else (fs.LocalFileSystem(), root)


def _parquet_files(system: fs.FileSystem, base: str) -> list[tuple[str, fs.FileInfo]]:
    """(path below the base, information) of each Parquet file, by path; the base itself when it is one file."""
    info = system.get_file_info(base)
    if info.type == fs.FileType.File:
        return [("", info)]
    files = system.get_file_info(fs.FileSelector(base, recursive=True))
    found = [(f.path.removeprefix(base).lstrip("/"), f) for f in files if f.path.endswith(".parquet")]
    return sorted(found, key=lambda item: item[0])


@lru_cache(maxsize=2)  # rows are read mostly in order: a group is decoded once, and one more is kept for readahead
def _images(root: str, path: str, group: int, column: str) -> pa.ChunkedArray:
    system, base = _open(root)
    with system.open_input_file(f"{base}/{path}" if path else base) as source:
        images = pq.ParquetFile(source).read_row_group(group, columns=[column]).column(0)
    if pa.types.is_struct(images.type):
        images = pa.chunked_array([chunk.field("bytes") for chunk in images.chunks])
    return images
