"""Lists and reads files in local folders and object stores through one interface."""

from __future__ import annotations

import os
import stat
import time
from collections import Counter
from collections.abc import Iterator, Sequence
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
"""Files and folders that operating systems create, in lower case; like hidden files, they are ignored."""

NEVER_IMAGES = (".csv", ".html", ".json", ".jsonl", ".md", ".mp4", ".npy", ".txt", ".xml", ".yaml", ".yml")
"""Endings of files in object stores whose content is not checked, because each check is a request."""

_PAUSES = (0.5, 2.0)
"""Pauses between attempts to read from an object store after a temporary failure, seconds."""

_LOOKS = 32
"""Number of files in an object store whose content is checked concurrently."""


class Found(NamedTuple):
    """A file below a root.

    Attributes:
        path: Path relative to the root.
        size: Size in bytes, or None if unknown.
        mtime_ns: Modification time in ns since the epoch, or None if unknown.
    """

    path: str
    size: int | None
    mtime_ns: int | None


@dataclass
class Listing:
    """The files below a root.

    Attributes:
        files: All files except hidden and system files; each real file once.
        links: Links that were not followed, because their targets are already listed.
    """

    files: list[Found] = field(default_factory=list)
    links: list[str] = field(default_factory=list)


@lru_cache
def filesystem(root: str) -> tuple[fs.FileSystem, str]:
    """The filesystem of a URI or local path, and the path in it; one client per process.

    Raises:
        MilanError: No filesystem supports the URI.
    """
    return open_uri(root) if is_uri(root) else (fs.LocalFileSystem(), root)


def absolute_root(root: str | Path) -> str:
    """Normalizes a root as manifests store it: a URI unchanged; a local path absolute, with links resolved.

    A file's own name is not resolved, because download caches store files under names without an ending and link to
    them under names with the right ending.
    """
    if is_uri(root):
        return str(root)
    path = Path(root).expanduser()
    return str(path.parent.resolve() / path.name if path.is_file() else path.resolve())


def location(root: str, path: str) -> str:
    """The address of a file below a root, for messages; the root itself if the path is empty."""
    return f"{root.rstrip('/')}/{path}" if path else root


def place(root: str, path: str) -> tuple[fs.FileSystem, str]:
    """The filesystem of a file below a root, and the file's path in it."""
    system, base = filesystem(root)
    return system, location(base, path)


def file_name(root: str, path: str) -> str:
    """The name whose ending tells the file's format: its path, or the root if the root is the file; in lower case."""
    return (path or split_query(root)[0]).lower()


def local_path(root: str) -> str | None:
    """The local path of a root, including ``file://`` URIs; None for remote roots."""
    if not is_uri(root):
        return root
    if root.partition("://")[0] != "file":
        return None
    return filesystem(root)[1]


def list_files(root: str) -> Listing:
    """Lists the files below a root; a root that is a file is listed with an empty path.

    Raises:
        MilanError: The root is missing or not readable.
    """
    local = local_path(root)
    return _list_remote(root) if local is None else _list_local(local)


def read_file(root: str, path: str, offset: int = 0, size: int | None = None) -> bytes:
    """Reads a file, or a range of its bytes; returns fewer bytes if the file ends earlier.

    Args:
        root: The root.
        path: The file's path below the root; empty if the root is the file.
        offset: First byte.
        size: Number of bytes; None reads to the end.

    Raises:
        UnreadableImage: The file is missing or not readable.
        MilanError: An object store failed on every attempt.
    """

    def length(whole: int) -> int:
        return max(whole - offset if size is None else min(size, whole - offset), 0)

    local = local_path(root)
    if local is not None:
        try:
            target = Path(local, path)
            if not stat.S_ISREG(target.stat().st_mode):  # reading a pipe would block
                raise UnreadableImage("is no plain file")
            with target.open("rb") as file:
                file.seek(offset)
                return file.read(length(os.fstat(file.fileno()).st_size))
        except OSError as error:
            raise UnreadableImage(f"cannot be read ({error.strerror})") from error
    system, key = place(root, path)
    for pause in (*_PAUSES, None):
        try:
            with system.open_input_file(key) as remote:
                content: bytes = remote.read_at(length(remote.size()), offset)
                return content
        except (FileNotFoundError, PermissionError) as error:
            raise UnreadableImage(f"cannot be read ({type(error).__name__})") from error
        except OSError as error:  # the network failed, not the image: skipping the image would change the result
            if pause is None:
                raise MilanError(f"cannot read {root.rstrip('/')}/{path}: {why(error, root)}") from error
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def images_of(root: str, listing: Listing, only: tuple[str, ...] | None = None) -> tuple[list[Found], Counter[str]]:
    """Separates the images of a listing from its other files.

    Files with an image's ending count as images. The content of all other files is checked.

    Args:
        root: The root that was listed.
        listing: The files below the root.
        only: The only endings that count as images; no content is checked. None accepts all images.

    Returns:
        The images, in the listing's order; ending → number of files that are not images.
    """
    endings = only or image_endings()
    odd = [file for file in listing.files if not file.path.lower().endswith(endings)]
    images = set(_look(root, odd)) if only is None else set()
    others = {file.path for file in odd if file.path not in images}
    return [file for file in listing.files if file.path not in others], Counter(map(ending, others))


def ending(path: str) -> str:
    """A file's ending in lower case, for counting."""
    name = path.rpartition("/")[2]
    return PurePosixPath(name).suffix.lower() or "no ending"


def tell_left_out(where: str, left_out: Counter[str], links: list[str]) -> None:
    """Prints how many files of a probe are not images and which links were skipped; the same text once per process."""
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
    """Prints one warning for all images that may have been decoded wrongly.

    Args:
        doubts: (location of an image, warning); at least the first.
        count: Number of such images.
    """
    if doubts:
        where, why = doubts[0]
        others = f" (and {count - 1} more images like it)" if count > 1 else ""
        tell(f"probe: {where}{others}: {why}")


@lru_cache(maxsize=4096)
def tell(text: str) -> None:
    """Prints a message about a probe once per process, because a job lists its probe several times."""
    say(text)


def _look(root: str, files: list[Found]) -> Iterator[str]:
    """Yields the paths of files whose first bytes are those of an image."""

    def head(file: Found) -> bool:
        try:
            return looks_like_image(read_file(root, file.path, 0, HEAD))
        except UnreadableImage:
            return False

    if local_path(root) is not None:
        yield from (file.path for file in files if file.size and head(file))
        return
    files = [file for file in files if file.size and ending(file.path) not in NEVER_IMAGES]
    with ThreadPoolExecutor(_LOOKS) as threads:
        yield from (file.path for file, is_image in zip(files, threads.map(head, files), strict=True) if is_image)


def is_ignored(name: str) -> bool:
    """Whether a file or folder is hidden or created by an operating system."""
    return name.startswith(".") or name.lower() in SYSTEM_FILES


def _list_local(root: str) -> Listing:
    if os.path.isfile(root):
        return Listing([_stat("", root)])
    listing = Listing()
    folders: set[str] = set()
    links: list[tuple[str, str]] = []
    file_links: list[tuple[str, str]] = []

    def fail(error: OSError) -> None:
        raise MilanError(
            f"cannot list {error.filename} ({error.strerror}): give an existing folder of images that you may read."
        ) from error

    def walk(top: str, below: str) -> None:
        """Lists the real folders and files of a real folder under the prefix ``below``; collects the links."""
        for folder, names, files in os.walk(top, onerror=fail):
            here = below if folder == top else f"{below}{os.path.relpath(folder, top).replace(os.sep, '/')}/"
            folders.add(folder)
            folder_paths = [(name, os.path.join(folder, name)) for name in names if not is_ignored(name)]
            links.extend((here + name, path) for name, path in folder_paths if os.path.islink(path))
            names[:] = [name for name, path in folder_paths if not os.path.islink(path) and path not in folders]
            for name, path in ((name, os.path.join(folder, name)) for name in files if not is_ignored(name)):
                if os.path.islink(path):
                    file_links.append((here + name, path))
                else:
                    listing.files.append(_stat(here + name, path))

    walk(os.path.realpath(root), "")
    while links:  # real folders keep their own paths; a folder reached only by links gets the first link's path
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
            listing.files.append(_stat(path, place))
            linked_to.add(target)
        except OSError:  # a broken link: listed here, then skipped with a reason when read
            listing.files.append(Found(path, None, None))
    return listing


def _stat(path: str, file: str) -> Found:
    """The entry of a local file, listed under a path."""
    status = os.stat(file)
    return Found(path, status.st_size, status.st_mtime_ns)


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
