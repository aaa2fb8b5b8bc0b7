"""Probes whose images are not separate files: arrays in memory, and rows of Parquet tables."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from milan_ray.errors import MilanError
from milan_ray.probe.base import ImageRef, ProbeImage
from milan_ray.probe.decode import from_array
from milan_ray.probe.files import list_files, local_path
from milan_ray.probe.folder import FolderProbe, tell_classes
from milan_ray.probe.manifest import Entry, build
from milan_ray.probe.tables import PARQUET, read_row, table_entries


class ArrayProbe:
    """A probe of images in memory.

    The images are sent to every actor with the probe, so keep them below a few hundred MB.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: Sequence[str] | None = None,
        concept_maps: Sequence[Mapping[str, np.ndarray]] | None = None,
        name: str = "arrays",
    ) -> None:
        """Stores the images without copying them.

        Args:
            images: uint8 (N, H, W, 3), RGB; or uint8 (N, H, W, B) for models that take B bands.
            labels: Class of each image, or None.
            concept_maps: Per image, concept → bool (H, W), or None.
            name: The probe's name.

        Raises:
            MilanError: The images have another shape or type, or ``labels`` or ``concept_maps`` have another length.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or not images.shape[-1]:
            raise MilanError(f"images are {images.dtype} {images.shape}: an ArrayProbe takes uint8 (N, H, W, bands).")
        for given in (labels, concept_maps):
            if given is not None and len(given) != len(images):
                raise MilanError(f"{len(images)} images with {len(given)} labels or concept maps: give one for each.")
        self.name = name
        self._images = images
        self._labels = None if labels is None else list(labels)
        self._concept_maps = concept_maps

    def manifest(self) -> pa.Table:
        """Lists the images; an image's version tag is the hash of its pixels and its concept maps.

        Raises:
            MilanError: The probe has no images.
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
        return from_array(pixels, _sha256(pixels))

    def concept_maps(self, ref: ImageRef) -> dict[str, np.ndarray] | None:
        """Concept → bool (H, W) of this row's image, or None if the probe has no concept maps."""
        return None if self._concept_maps is None else dict(self._concept_maps[int(ref.path)])


class ParquetProbe(FolderProbe):
    """A probe of encoded images in a column of one or several Parquet files, read by row group."""

    def __init__(self, path: str | Path, image: str | None = None, label: str | None = None) -> None:
        """Stores the arguments; reads no files.

        Args:
            path: A Parquet file or a folder of Parquet files, as a local path or a URI.
            image: Column of encoded images: binary, or a struct with a binary field ``bytes`` and a field ``path`` that
                names a file where ``bytes`` is null. None selects ``image``, or the only column that can hold images.
            label: Column of classes. None selects ``label``, or the only column that ``datasets`` marks as class label.
        """
        super().__init__([path], image_column=image, label_column=label)

    def manifest(self) -> pa.Table:
        """Lists the rows from the files' footers and the label column; reads no images.

        Raises:
            MilanError: The files or columns do not exist, or there are no rows.
        """
        (root,) = self._roots
        local = local_path(root)
        if local is not None and not Path(local).exists():
            raise MilanError(f"cannot read {root} (there is none): give a Parquet file or a folder of them.")
        files = [file for file in list_files(root).files if not file.path or file.path.lower().endswith(PARQUET)]
        entries = table_entries(root, sorted(files), self._columns)
        if not entries:
            raise MilanError(f"no images in {root}: it has no Parquet file with rows.")
        tell_classes(root, entries)
        return build(entries)

    def read(self, ref: ImageRef) -> ProbeImage:
        """Reads and decodes one row's image.

        Raises:
            UnreadableImage: The image is null, missing, corrupt, empty or too large.
        """
        return read_row(ref, self._columns)


def _sha256(pixels: np.ndarray) -> str:
    return hashlib.sha256(pixels.tobytes()).hexdigest()


def _tag(sha256: str, maps: Mapping[str, np.ndarray]) -> str:
    """A hex digest of an image and its concept maps."""
    digest = hashlib.sha256(sha256.encode())
    for name in sorted(maps):
        digest.update(repr((name, maps[name].shape)).encode())
        digest.update(np.packbits(maps[name]).tobytes())
    return digest.hexdigest()
