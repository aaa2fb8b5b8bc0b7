"""Locates or downloads published files atomically and verifies their digests."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import http.client
import re
import shutil
import time
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from milan_ray.errors import MilanError
from milan_ray.progress import Progress

TIMEOUT = 10.0
"""Seconds without an answer or a byte after which a download fails."""

_FORGOTTEN = 24 * 3600.0  # seconds without a byte after which a killed download's file is removed
_CHUNK = 2**20  # bytes per step of the progress bar


_dry: list[tuple[str, str]] | None = None  # (file, address) of what a dry run would have downloaded


class WouldDownload(MilanError):
    """A dry run needs a file that it would have to download."""


@contextlib.contextmanager
def dry() -> Iterator[list[tuple[str, str]]]:
    """Forbids downloads in the body: an attempt raises :class:`WouldDownload`.

    Yields:
        (file, address) of the attempted downloads, a list that grows.
    """
    global _dry
    before, _dry = _dry, []
    try:
        yield _dry
    finally:
        _dry = before


def find(
    name: str,
    folders: Sequence[Path],
    url: str | None = None,
    *,
    download: bool = False,
    variable: str | None = None,
    sha256: str | None = None,
    also: Sequence[str] = (),
    hint: str = "",
) -> Path:
    """Finds a file, or downloads it when it is absent and ``download`` is set.

    Args:
        name: File name, or path below a folder.
        folders: Folders to search, in order; a download goes into the first.
        url: Address of the published file; None when it is not published.
        download: Whether to download an absent file.
        variable: The environment variable that sets these folders, for the message.
        sha256: First digits of its digest, hex, any number; checked after a download.
        also: Other names that the file may have in a folder.
        hint: Another remedy, for the message: ``or …``.

    Returns:
        The file's absolute path.

    Raises:
        MilanError: The file is absent and not to be downloaded, or the download failed; the message names the file,
            the folders, the address and the variable.
    """
    for folder in folders:
        for candidate in (name, *also):
            if (folder / candidate).is_file():
                return (folder / candidate).absolute()
    reason = ""
    if download and url is not None:
        try:
            return fetch(url, folders[0] / name, sha256)
        except WouldDownload:
            raise
        except MilanError as error:
            reason = f"; {error}"
    places = " nor in ".join(str(folder.absolute()) for folder in folders)
    places = f"neither in {places}" if len(folders) > 1 else f"not in {places}"
    names = " or ".join((name, *also))
    moved = f" (see ${variable})" if variable else ""
    way = "put it there" if reason or url is None else f"fetch it from {url} into {folders[0].absolute()}"
    raise MilanError(f"{names} is {places}{moved}{reason}: {way}{f', {hint}' if hint else ''}.")


def fetch(url: str, target: Path, sha256: str | None = None) -> Path:
    """Downloads a file under a temporary name, then renames it, so that ``target`` is complete or absent.

    Several processes may download the same file.

    Args:
        url: Address: ``http``, ``https`` or ``file``.
        target: The file to write; folders are made.
        sha256: First digits of its digest, hex; None when unknown.

    Returns:
        The target's absolute path.

    Raises:
        MilanError: The download failed, is incomplete or has another digest; nothing is left behind.
        WouldDownload: This is a dry run.
    """
    if _dry is not None:
        _dry.append((target.name, url))
        raise WouldDownload(f"{target.name} would be fetched from {url}, and a dry run fetches nothing.")
    part = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.part"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for left in target.parent.glob(f".{glob.escape(target.name)}.*.part"):
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                if time.time() - left.stat().st_mtime > _FORGOTTEN:
                    left.unlink()
        try:
            digest = _download(url, part)
            if sha256 is not None and not digest.startswith(sha256.lower()):
                raise ValueError(f"its sha256 is {digest}, not {sha256}")
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise MilanError(f"{url} cannot be downloaded ({error or type(error).__name__})") from error
    return target.absolute()


def _download(url: str, part: Path) -> str:
    """Downloads an address into a file; returns its sha256."""
    digest, written = hashlib.sha256(), 0
    request = urllib.request.Request(url, headers={"User-Agent": "milan_ray"})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer, part.open("xb") as file:
        if url.lower().startswith("https:") and not answer.geturl().lower().startswith("https:"):
            raise OSError(f"it leads to {answer.geturl()}, without encryption")
        length = answer.headers.get("Content-Length")
        size = None if length is None else int(length)
        if size is not None and size > shutil.disk_usage(part.parent).free:
            raise OSError(f"its {size / 2**20:.0f} MiB do not fit into {part.parent}")
        with Progress(f"downloading {url}", None if size is None else -(-size // _CHUNK), "MiB") as progress:
            while chunk := answer.read(_CHUNK):
                file.write(chunk)
                digest.update(chunk)
                written += len(chunk)
                progress.advance()
    if size is not None and written != size:
        raise OSError(f"only {written} of {size} bytes came")
    return digest.hexdigest()


def digest_in(name: str) -> str | None:
    """First digits of the sha256 in names such as ``resnet18-f37072fd.pth``; None for other names."""
    match = re.search(r"-([0-9a-f]{8,})\.", name)
    return match.group(1) if match else None
