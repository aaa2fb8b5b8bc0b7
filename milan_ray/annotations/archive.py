"""Unpacks untrusted zips atomically and only into their own folder."""

from __future__ import annotations

import json
import os
import shutil
import stat
import time
import zipfile
from contextlib import suppress
from pathlib import Path, PurePosixPath, PureWindowsPath

from milan_ray.errors import MilanError, explained
from milan_ray.progress import Progress

MAX_BYTES = 256 * 2**30
"""Maximum unpacked size of an archive, bytes; the largest released set has about 12 GB."""

MAX_FILES = 100_000

_MARKER = ".archive.json"
_CHUNK = 2**20


def extract(archive: Path, target: Path, max_bytes: int = MAX_BYTES) -> Path:
    """Unpacks a zip into a folder atomically. Does nothing if the folder already holds the same archive.

    Hidden files and macOS's extra files are left out. Files keep the modification times stored in the archive, so that
    unpacking again gives the same result.

    Args:
        archive: The zip.
        target: Folder to be made. Content of another version of the same archive is replaced.
        max_bytes: Refuse archives that declare more than this; no file can exceed its declared size.

    Returns:
        The folder with the content: the target, or its only subfolder if that holds everything.

    Raises:
        MilanError: The file is no zip, is damaged or encrypted, would write outside its folder, holds links, or is too
            large; or the target exists and was not unpacked from it.
    """
    with explained(f"{archive} cannot be unpacked", "fetch it again."):
        status = archive.stat()
        identity = {"archive": archive.name, "size": status.st_size, "mtime_ns": status.st_mtime_ns}
        marker = target / _MARKER
        if target.exists():
            if not marker.is_file():
                raise MilanError(f"{target} exists and was not unpacked from {archive.name}: use or move that folder.")
            with suppress(ValueError):  # a damaged marker: unpack again
                if json.loads(marker.read_text(encoding="utf-8")) == identity:
                    return content(target)
        part = target.parent / f".{target.name}.part"
        if part.exists():
            shutil.rmtree(part)
        part.mkdir(parents=True)
        try:
            _unpack(archive, part, max_bytes)
            (part / _MARKER).write_text(json.dumps(identity))
            if target.exists():
                shutil.rmtree(target)
            part.rename(target)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return content(target)


def _unpack(archive: Path, folder: Path, max_bytes: int) -> None:
    with zipfile.ZipFile(archive) as source:
        members = [member for member in source.infolist() if _checked(archive, member)]
        total = sum(member.file_size for member in members)
        if len(members) > MAX_FILES or total > max_bytes:
            raise MilanError(
                f"{archive} declares {len(members)} files of {total:,} bytes in all, more than {MAX_FILES} files or "
                f"{max_bytes:,} bytes: it is refused."
            )
        free = shutil.disk_usage(folder).free
        if total > free:
            raise MilanError(f"{archive} needs {total:,} bytes in {folder.parent}, where {free:,} are free: make room.")
        steps = sum(-(-member.file_size // _CHUNK) for member in members)
        with Progress(f"unpacking {archive.name}", steps, "MiB") as progress:
            for member in members:
                path = folder / member.filename
                path.parent.mkdir(parents=True, exist_ok=True)
                with source.open(member) as data, path.open("xb") as file:
                    while chunk := data.read(_CHUNK):
                        file.write(chunk)
                        progress.advance()
                seconds = time.mktime((*member.date_time, 0, 0, -1))
                os.utime(path, (seconds, seconds))


def _checked(archive: Path, member: zipfile.ZipInfo) -> bool:
    """Whether a member is a file to unpack.

    Raises:
        MilanError: The member would be written outside the folder, or is a link or device.
    """
    parts = PurePosixPath(member.filename).parts
    windows = PureWindowsPath(member.filename)
    outside = ".." in parts or ".." in windows.parts or windows.drive or member.filename.startswith(("/", "\\"))
    kind = stat.S_IFMT(member.external_attr >> 16)
    if outside or kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        what = "would lie outside its folder" if outside else "is a link or device"
        raise MilanError(f"{archive}: the member {member.filename!r} {what}: the archive is refused.")
    return not member.is_dir() and not any(part.startswith(".") or part == "__MACOSX" for part in parts)


def content(folder: Path) -> Path:
    """Returns an unpacked folder, or its only subfolder if that holds everything."""
    inside = [path for path in folder.iterdir() if path.name != _MARKER]
    if len(inside) == 1 and inside[0].is_dir() and any(path.is_dir() for path in inside[0].iterdir()):
        return content(inside[0])
    return folder
