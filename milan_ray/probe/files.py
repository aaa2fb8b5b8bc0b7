"""Where files lie: local folders and object stores, listed and opened alike."""

from __future__ import annotations

import os
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pyarrow as pa
from pyarrow import fs

from milan_ray.errors import MilanError, UnreadableImage
from milan_ray.probe.decode import HEAD, HEIC, HEIC_REMEDY, image_endings, looks_like_image
from milan_ray.progress import say
from milan_ray.remote import is_uri, open_uri, split_query, why

SYSTEM_FILES = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "$recycle.bin",
                          "system volume information", "@eadir", "lost+found"})  # fmt: skip
"""Files and folders that operating systems leave behind, in lower case; like hidden ones they are ignored."""

NEVER_IMAGES = (".csv", ".html", ".json", ".jsonl", ".md", ".mp4", ".npy", ".txt", ".xml", ".yaml", ".yml")
"""Endings of files in object stores that are not looked into: each look is a request."""

_PAUSES = (0.5, 2.0)
"""Seconds between the attempts to read from an object store that fails for a moment."""

_LOOKS = 32
"""Files in an object store that are looked into side by side."""


class Found(NamedTuple):
    """A file below a root.

    Attributes:
        path: Its path below the root.
        size: Bytes, or None where it cannot be told.
        mtime_ns: Modification time, ns since the epoch, or None.
    """

    path: str
    size: int | None
    mtime_ns: int | None


@dataclass
class Listing:
    """What lies below a root.

    Attributes:
        files: All files but hidden and system ones, each real one once.
        links: Links that were not followed, because what they lead to is listed already.
    """

    files: list[Found] = field(default_factory=list)
    links: list[str] = field(default_factory=list)


@lru_cache
def filesystem(root: str) -> tuple[fs.FileSystem, str]:
    """The filesystem of a URI or local path, and the path in it; one client per process.

    Raises:
        MilanError: No filesystem answers to it.
    """
    return open_uri(root) if is_uri(root) else (fs.LocalFileSystem(), root)


def absolute_root(root: str | Path) -> str:
    """A root as manifests hold it: a URI as it is, a local one absolute and, but for a file's own name, without links.

    Caches of downloads keep files under names without an ending, and links with the right ones.
    """
    if is_uri(root):
        return str(root)
    path = Path(root).expanduser()
    return str(path.parent.resolve() / path.name if path.is_file() else path.resolve())


def file_name(root: str, path: str) -> str:
    """What tells a file's kind by its ending: its path, or its root where that is the file; in lower case."""
    return (path or split_query(root)[0]).lower()


def local_path(root: str) -> str | None:
    """The local folder or file that a root is, ``file://`` included; None where it is elsewhere."""
    if not is_uri(root):
        return root
    if root.partition("://")[0] != "file":
        return None
    return filesystem(root)[1]


def list_files(root: str) -> Listing:
    """Lists what lies below a root; a file is listed as itself, with an empty path.

    Raises:
        MilanError: It is missing or may not be read.
    """
    local = local_path(root)
    return _list_remote(root) if local is None else _list_local(local)


def read_file(root: str, path: str) -> bytes:
    """Reads a file whole.

    Raises:
        UnreadableImage: It is missing or may not be read.
        MilanError: An object store failed, time after time.
    """
    local = local_path(root)
    if local is not None:
        try:
            place = Path(local, path)
            if not stat.S_ISREG(place.stat().st_mode):  # a pipe would keep its reader waiting
                raise UnreadableImage("is no plain file")
            return place.read_bytes()
        except OSError as error:
            raise UnreadableImage(f"cannot be read ({error.strerror})") from error
    return _remotely(root, path, lambda file: file.read())


def read_part(root: str, path: str, offset: int, size: int) -> bytes:
    """Reads some bytes of a file; fewer where it is shorter.

    Raises:
        UnreadableImage: It is missing or may not be read.
        MilanError: An object store failed, time after time.
    """
    local = local_path(root)
    if local is not None:
        try:
            with Path(local, path).open("rb") as file:
                file.seek(offset)
                return file.read(max(min(size, os.fstat(file.fileno()).st_size - offset), 0))
        except OSError as error:
            raise UnreadableImage(f"cannot be read ({error.strerror})") from error
    return _remotely(root, path, lambda file: file.read_at(max(min(size, file.size() - offset), 0), offset))


def _remotely(root: str, path: str, read: Callable[[pa.NativeFile], bytes]) -> bytes:
    system, base = filesystem(root)
    for pause in (*_PAUSES, None):
        try:
            with system.open_input_file(f"{base.rstrip('/')}/{path}" if path else base) as file:
                return read(file)
        except (FileNotFoundError, PermissionError) as error:
            raise UnreadableImage(f"cannot be read ({type(error).__name__})") from error
        except OSError as error:  # the network's fault, not the image's: skipping it would change the result
            if pause is None:
                raise MilanError(f"cannot read {root.rstrip('/')}/{path}: {why(error, root)}") from error
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def images_of(root: str, listing: Listing, only: tuple[str, ...] | None = None) -> tuple[list[Found], Counter[str]]:
    """The images of a listing, and what else there is.

    Files with an image's ending are taken for images; others, and those without an ending, are looked into.

    Args:
        root: The root that was listed.
        listing: What lies below it.
        only: Endings of images; no others are looked into. None for all.

    Returns:
        The images, in the listing's order; ending → how many files are no images.
    """
    endings = only or image_endings()
    odd = [found for found in listing.files if not found.path.lower().endswith(endings)]
    seen = set(_look(root, odd)) if only is None else set()
    left_out = Counter(ending(found.path) for found in odd if found.path not in seen)
    images = [found for found in listing.files if found.path.lower().endswith(endings) or found.path in seen]
    return images, left_out


def ending(path: str) -> str:
    """A file's ending in lower case, for counting."""
    name = path.rpartition("/")[2]
    return PurePosixPath(name).suffix.lower() or "no ending"


def tell_left_out(where: str, left_out: Counter[str], links: list[str]) -> None:
    """Says what of a probe is no image, and which links lead to what is listed anyway; the same once per process."""
    if left_out:
        count = sum(left_out.values())
        kinds = [f"{kind} {number}" for kind, number in sorted(left_out.items(), key=lambda item: (-item[1], item[0]))]
        more = f", … {len(kinds) - 12} more kinds" if len(kinds) > 12 else ""
        remedy = f" ({HEIC_REMEDY})" if any(kind in HEIC for kind in left_out) else ""
        files = "1 file that is no image" if count == 1 else f"{count} files that are no images"
        tell(f"probe: left out {files} in {where}: {', '.join(kinds[:12])}{more}{remedy}")
    if links:
        more = f" and {len(links) - 3} more" if len(links) > 3 else ""
        what = "1 link" if len(links) == 1 else f"{len(links)} links"
        tell(f"probe: left out {what} in {where} to what is listed already: {', '.join(links[:3])}{more}")


def tell_doubts(doubts: Sequence[tuple[str, str]], count: int) -> None:
    """Says that images may have been meant otherwise than they were decoded, once for all of them.

    Args:
        doubts: Where an image is, and the doubt; at least the first.
        count: How many there are.
    """
    if doubts:
        where, why = doubts[0]
        others = f" (and {count - 1} more images like it)" if count > 1 else ""
        tell(f"probe: {where}{others}: {why}")


@lru_cache(maxsize=4096)
def tell(text: str) -> None:
    """Says something about a probe, once per process: a job lists its probe several times."""
    say(text)


def _look(root: str, files: list[Found]) -> Iterator[str]:
    """The paths of those files whose first bytes are an image's."""

    def head(found: Found) -> bool:
        try:
            return looks_like_image(read_part(root, found.path, 0, HEAD))
        except UnreadableImage:
            return False

    if local_path(root) is not None:
        yield from (found.path for found in files if found.size and head(found))
        return
    files = [found for found in files if found.size and ending(found.path) not in NEVER_IMAGES]
    with ThreadPoolExecutor(_LOOKS) as threads:
        yield from (found.path for found, yes in zip(files, threads.map(head, files), strict=True) if yes)


def is_ignored(name: str) -> bool:
    """Whether a file or folder is hidden, or one that an operating system leaves behind."""
    return name.startswith(".") or name.lower() in SYSTEM_FILES


def _list_local(root: str) -> Listing:
    if os.path.isfile(root):
        status = os.stat(root)
        return Listing([Found("", status.st_size, status.st_mtime_ns)])
    listing = Listing()
    folders: set[str] = set()
    links: list[tuple[str, str]] = []
    file_links: list[tuple[str, str]] = []

    def fail(error: OSError) -> None:
        raise MilanError(
            f"cannot list {error.filename} ({error.strerror}): give an existing folder of images that you may read."
        ) from error

    def walk(top: str, below: str) -> None:
        """Lists the real folders and files of a real folder, which is ``below`` in the listing; notes the links."""
        for folder, names, files in os.walk(top, onerror=fail):
            here = below if folder == top else f"{below}{os.path.relpath(folder, top).replace(os.sep, '/')}/"
            folders.add(folder)
            for name in list(names):
                place = os.path.join(folder, name)
                linked = os.path.islink(place)
                if linked and not is_ignored(name):
                    links.append((here + name, place))
                if linked or is_ignored(name) or place in folders:
                    names.remove(name)
            for name in files:
                place = os.path.join(folder, name)
                if is_ignored(name):
                    continue
                if os.path.islink(place):
                    file_links.append((here + name, place))
                    continue
                status = os.stat(place)
                listing.files.append(Found(here + name, status.st_size, status.st_mtime_ns))

    walk(os.path.realpath(root), "")
    while links:  # real folders have their own names; what is reached by links alone has the first link's
        links.sort(reverse=True)
        path, place = links.pop()
        target = os.path.realpath(place)
        if target in folders:
            listing.links.append(path)
        else:
            walk(target, path + "/")
    linked_to: set[str] = set()
    for path, place in sorted(file_links):
        target = os.path.realpath(place)
        folder, name = os.path.split(target)
        if target in linked_to or (folder in folders and not is_ignored(name) and os.path.isfile(target)):
            listing.links.append(path)
            continue
        try:
            status = os.stat(place)
        except OSError:  # a broken link: listed here, then skipped with a reason when read
            listing.files.append(Found(path, None, None))
        else:
            linked_to.add(target)
            listing.files.append(Found(path, status.st_size, status.st_mtime_ns))
    return listing


def _list_remote(root: str) -> Listing:
    system, base = filesystem(root)
    try:
        info = system.get_file_info(base)
        if info.type == fs.FileType.File:
            return Listing([Found("", info.size, info.mtime_ns)])
        infos = system.get_file_info(fs.FileSelector(base, recursive=True))
    except (OSError, pa.ArrowException) as error:
        raise MilanError(f"cannot list {root}: {why(error, root)}") from error
    listing = Listing()
    for info in infos:
        path = info.path.removeprefix(base).lstrip("/")
        if info.type == fs.FileType.File and not any(map(is_ignored, path.split("/"))):
            listing.files.append(Found(path, info.size, info.mtime_ns))
    return listing
