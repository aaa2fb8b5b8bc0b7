"""Images in tar archives in WebDataset's layout (``key.jpg`` with ``key.cls``, ``.json``, ``.txt``), read in place."""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import pyarrow as pa

from milan_ray.errors import MilanError, UnreadableImage, explained
from milan_ray.probe.base import ImageRef, ProbeImage
from milan_ray.probe.decode import HEAD, image_endings, looks_like_image, probe_image
from milan_ray.probe.files import SYSTEM_FILES, Found, file_name, location, place, read_file, tell
from milan_ray.probe.manifest import Entry
from milan_ray.probe.tables import Columns, class_name
from milan_ray.textfiles import clean, decode_text

TAR = (".tar",)
"""File name endings of archives that are read in place."""

PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")
"""File name endings of archives that must be unpacked first, because they are not read in place."""

_PLACE = re.compile(r"(?s)(.*\.tar)?#(.*)@(\d+):(\d+)", re.IGNORECASE)
"""Path of a member in a manifest: archive, name, offset of its content in bytes, size of its content in bytes."""

_LABELS = ("cls", "json", "txt")
"""Parts of a sample that can hold its class, in order of preference."""

_JSON_LABELS = ("label", "class_name", "class", "category", "cls")
_NAMED = 12
"""Maximum number of sample parts that a message lists."""

_DAMAGE = (tarfile.TarError, EOFError, OSError, ValueError, OverflowError, pa.ArrowException)
"""What readers raise on damaged archives."""

_MAX_LABEL = 1 << 20  # maximum size of a label member, bytes


@dataclass(frozen=True)
class _Member:
    name: str
    offset: int
    size: int

    @property
    def key(self) -> str:
        """The sample's key, shared by all its parts: the path up to the first dot of the file name."""
        folder, slash, name = self.name.rpartition("/")
        return folder + slash + name.partition(".")[0]

    @property
    def part(self) -> str:
        """The part of the sample: the text after the first dot of the file name, in lower case."""
        return self.name.rpartition("/")[2].partition(".")[2].lower()


def archive_of(ref: ImageRef) -> str | None:
    """The archive's path below the root, empty if the root is the archive; None for images that are in no archive."""
    match = _PLACE.fullmatch(ref.path)
    if match is None or not file_name(ref.root, match[1] or "").endswith(TAR):
        return None
    return match[1] or ""


def read_member(ref: ImageRef) -> ProbeImage:
    """Reads and decodes one image.

    Raises:
        UnreadableImage: The image is missing, corrupt, empty or too large.
    """
    match = _PLACE.fullmatch(ref.path)
    assert match is not None  # archive_of
    data = read_file(ref.root, match[1] or "", int(match[3]), int(match[4]))
    if len(data) < int(match[4]):
        raise UnreadableImage("is cut off: the archive is shorter than when it was listed")
    return probe_image(data)


def archive_entries(root: str, files: Sequence[Found], columns: Columns) -> tuple[list[Entry], Counter[str]]:
    """Lists the images of tar archives as manifest entries; reads headers and labels, but no images.

    Args:
        root: The root folder of the archives.
        files: The archives, in order.
        columns: ``image`` is the part of a sample that holds its image (``jpg``). ``label`` is the part that holds its
            class (``cls``), or a field of its ``json``.

    Returns:
        Entries, with samples in the archives' order; ending → number of members that hold neither an image nor a class.

    Raises:
        MilanError: An archive is damaged, a sample has several images, or no sample has the requested parts.
    """
    entries: list[Entry] = []
    left_out: Counter[str] = Counter()
    parts: dict[str, None] = {}  # of all samples
    labelled = stray = 0
    for file in files:
        where = location(root, file.path)
        with (
            explained(f"cannot read {where}", "give a sound tar archive.", *_DAMAGE),
            _Bounded(root, file.path) as source,
        ):
            for sample in _samples(source, left_out):
                parts |= {member.part: None for member in sample}
                images = _images(source, sample, columns.image)
                if len(images) > 1:
                    several = ", ".join(member.part for member in images)
                    raise MilanError(
                        f"sample {images[0].key} of {where} has several images ({several}): choose one with "
                        "--image-column; where these are several samples, give them names without further dots: a "
                        "sample's key ends at the first."
                    )
                label = _label(source, sample, columns.label, where)
                labelled += label is not None
                stray += label is not None and not images
                told = (*_LABELS, columns.label)
                left_out.update(
                    f".{member.part}" if member.part else "no ending"
                    for member in sample
                    if member not in images and not (images and member.part in told)
                )
                for member in images:
                    folder = next(filter(None, member.name.split("/")[:-1]), None)
                    path = f"{file.path}#{member.name}@{member.offset}:{member.size}"
                    tag = f"{file.size} bytes"
                    entries.append(Entry(root, path, member.size, file.mtime_ns, tag, label or folder))
    present = ", ".join(sorted(part or "no ending" for part in list(parts)[:_NAMED])) or "nothing"
    if columns.image is not None and not entries and files:
        raise MilanError(f"no sample in {root} has a part {columns.image!r} (--image-column): they have {present}.")
    if columns.label is not None and entries and not labelled:
        raise MilanError(f"no sample in {root} has a label {columns.label!r} (--label-column): they have {present}.")
    if stray:
        tell(
            f"probe: {stray} labels in {root} belong to no image: the parts of a sample must follow each other in the "
            "archive; write it again, sorted by name (tar --sort=name)"
        )
    return entries, left_out


class _Bounded:
    """A file whose reads are limited to its actual size, whatever size an archive header claims."""

    def __init__(self, root: str, path: str) -> None:
        system, target = place(root, path)
        self._file = system.open_input_file(target)
        self.size = self._file.size()

    def __enter__(self) -> _Bounded:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def read(self, size: int = -1) -> bytes:
        left = max(self.size - self._file.tell(), 0)
        return self._file.read(left if size < 0 else min(size, left))

    def part(self, member: _Member, size: int) -> bytes:
        """The first bytes of a member."""
        return self._file.read_at(min(size, member.size), member.offset)


def _samples(source: _Bounded, left_out: Counter[str]) -> Iterator[list[_Member]]:
    """Groups consecutive members that have the same key into samples."""
    sample: list[_Member] = []
    for member in _members(source, left_out):
        if sample and member.key != sample[0].key:
            yield sample
            sample = []
        sample.append(member)
    if sample:
        yield sample


def _members(source: _Bounded, left_out: Counter[str]) -> Iterator[_Member]:
    """Yields the regular files of an archive, except hidden and system files; counts the other omitted members.

    A hard link is read as its target file under another name, as in a folder. Symbolic links are omitted.
    """
    contents: dict[str, tuple[int, int]] = {}
    with tarfile.open(fileobj=cast(Any, source), mode="r:") as archive:
        while (info := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # otherwise tarfile keeps all members in memory
            if info.isfile() and info.offset_data + info.size > source.size:
                raise EOFError(f"it is cut off in {info.name}")
            parts = info.name.removeprefix("./").split("/")
            if info.isdir() or any(map(_is_hidden, parts)):
                continue
            part = (info.offset_data, info.size)
            if info.islnk():
                part = contents.get(info.linkname.removeprefix("./"), (-1, 0))
            if ".." in parts:
                left_out["names with .."] += 1
            elif info.issym() or part[0] < 0:
                left_out["links"] += 1
            elif info.issparse() or not (info.isreg() or info.islnk()):
                left_out["sparse files and devices"] += 1
            else:
                contents["/".join(parts)] = part
                yield _Member("/".join(parts), *part)
        # tarfile stops silently at a damaged header. An intact archive ends with zeros or at the end of the file.
        source.seek(archive.offset)
        if any(source.read(tarfile.BLOCKSIZE)):
            raise tarfile.ReadError(f"it is damaged at byte {archive.offset:,}")


def _is_hidden(part: str) -> bool:
    return (part.startswith(".") and part not in (".", "..")) or part.lower() in SYSTEM_FILES


def _images(source: _Bounded, sample: list[_Member], wanted: str | None) -> list[_Member]:
    """The members of a sample that are images, or the requested member."""
    if wanted is not None:
        return [member for member in sample if member.part == wanted.lower().removeprefix(".")]
    endings = image_endings()
    images = [member for member in sample if f".{member.part}".endswith(endings)]
    others = [member for member in sample if member.part not in _LABELS]
    return images or [member for member in others if member.size and looks_like_image(source.part(member, HEAD))]


def _label(source: _Bounded, sample: list[_Member], wanted: str | None, where: str) -> str | None:
    """The class label of a sample, or None."""
    parts = {member.part: member for member in sample}
    if wanted is not None and wanted.lower() not in parts:
        return _of_json(source, parts, (wanted,), where)
    for part in _LABELS if wanted is None else (wanted.lower(),):
        if part not in parts:
            continue
        if part == "json":
            label = _of_json(source, parts, _JSON_LABELS, where)
        else:
            label = clean(_text(source, parts[part], where)) or None
        if label is not None:
            return label
    return None


def _of_json(source: _Bounded, parts: dict[str, _Member], fields: Sequence[str], where: str) -> str | None:
    if "json" not in parts:
        return None
    what = f"{parts['json'].name} in {where} is no JSON"
    with explained(what, "write the archive again.", ValueError, RecursionError):
        label = json.loads(_text(source, parts["json"], where))
    if isinstance(label, dict):
        label = next((label[name] for name in fields if label.get(name) is not None), None)
    return None if isinstance(label, (dict, list)) else class_name(label, None, where)


def _text(source: _Bounded, member: _Member, where: str) -> str:
    if member.size > _MAX_LABEL:
        raise MilanError(f"{member.name} in {where} has {member.size:,} bytes, too many for a label: leave it out.")
    with explained(f"{member.name} in {where} is no text in UTF-8", "write the archive again.", UnicodeDecodeError):
        return decode_text(source.part(member, member.size))
