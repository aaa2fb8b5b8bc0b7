"""The probe manifest (one row per image) and the probe's fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from milan_ray.errors import MilanError
from milan_ray.probe.base import ImageRef
from milan_ray.schema import MANIFEST

_IDENTITY = ("root", "path", "size", "mtime_ns", "etag", "class_label")


@dataclass(frozen=True)
class Entry:
    """One image of a probe; the fields are the manifest's columns.

    Attributes:
        root: The root that contains the image.
        path: Path relative to the root.
        size: Size of the file in bytes, or None.
        mtime_ns: Modification time in ns since the epoch, or None.
        etag: Version tag, or None.
        class_label: Class name, or None.
        sha256: Hex digest of the image's bytes, or None before they are read.
    """

    root: str
    path: str
    size: int | None = None
    mtime_ns: int | None = None
    etag: str | None = None
    class_label: str | None = None
    sha256: str | None = None


def build(entries: Sequence[Entry]) -> pa.Table:
    """Builds the manifest of these images, numbered in this order.

    Raises:
        MilanError: A file name is not valid text.
    """
    columns: dict[str, object] = {"image_id": range(len(entries))}
    for column in (*_IDENTITY, "sha256"):
        columns[column] = [getattr(entry, column) for entry in entries]
    try:
        return MANIFEST.table(columns)
    except UnicodeEncodeError as error:
        raise MilanError(f"a file or folder name is not valid UTF-8 ({error.object!r}): rename it.") from error


def image_refs(manifest: pa.Table, image_ids: Iterable[int] | None = None) -> list[ImageRef]:
    """Converts manifest rows to references for reading their images.

    Args:
        manifest: A probe's manifest.
        image_ids: The requested images, in order; None for all.

    Raises:
        MilanError: The manifest lacks a requested image.
    """
    ids = range(len(manifest)) if image_ids is None else list(image_ids)
    rows = rows_of(manifest.select(["image_id", "root", "path"]), ids)
    return [ImageRef(**row) for row in rows.to_pylist()]


def rows_of(manifest: pa.Table, image_ids: Iterable[int]) -> pa.Table:
    """The rows of the given images, in the given order.

    Raises:
        MilanError: The manifest lacks a requested image.
    """
    ids = pa.array(list(image_ids), pa.int64())
    if len(ids) and (least := pc.max(ids).as_py()) >= len(manifest):
        raise MilanError(
            f"the manifest of the probe has {len(manifest)} rows and lacks image {least}: it is damaged; delete it and "
            "run jobs.exemplars again."
        )
    return manifest.take(ids)


def digest(manifest: pa.Table) -> str:
    """The probe's fingerprint: a hash over root, path, size, mtime, etag and label of its images, in order.

    Contents are not read: hashing a large probe before starting would take hours.

    Args:
        manifest: A probe's manifest.

    Returns:
        16 hex digits of a sha256.
    """
    state = hashlib.sha256()
    for batch in manifest.select(list(_IDENTITY)).to_batches():
        for row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            state.update(repr(row).encode())
    return state.hexdigest()[:16]
