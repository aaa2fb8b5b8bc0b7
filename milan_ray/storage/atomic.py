"""Atomic, durable writes of local files by jobs that may share a folder."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

TRIES = 8
"""Attempts at a local file or folder that another job removes or fills at the same moment."""


def replace_file(target: Path, fill: Callable[[IO[bytes]], object]) -> None:
    """Fills a temporary file beside a local file, then moves it into place durably.

    Another job may remove the folder at any time. The open file keeps what was written to it, so the content is then
    copied into a new temporary file, and ``fill`` is called once in any case.

    Args:
        target: The file to write; its folder is made.
        fill: Writes the content to a stream.

    Raises:
        OSError: The file cannot be written, or the folder was removed :data:`TRIES` times.
    """
    with ExitStack() as files:
        stream = files.enter_context(_temporary_file(target.parent))
        fill(stream)
        for last in (*[False] * (TRIES - 1), True):
            try:
                return _move(stream, target)
            except FileNotFoundError:  # another job has removed the folder
                if last:
                    raise
            written, stream = stream, files.enter_context(_temporary_file(target.parent))
            written.seek(0)
            shutil.copyfileobj(written, stream)


def remove_abandoned(folder: Path) -> None:
    """Removes temporary files that killed processes left in a folder."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:  # another job has removed it
        return
    for path in (folder / name for name in names if name.startswith(".") and name.endswith(".tmp")):
        try:
            handle = os.open(path, os.O_RDWR)
        except (FileNotFoundError, PermissionError):  # finished or removed since it was listed, or another user's
            continue
        try:
            if _lock(handle, wait=False):
                path.unlink(missing_ok=True)
        finally:
            os.close(handle)


def _move(stream: IO[bytes], target: Path) -> None:
    """Flushes a temporary file to disk and renames it, while its lock is held."""
    stream.flush()
    os.fsync(stream.fileno())
    os.chmod(stream.name, 0o644)
    os.replace(stream.name, target)


@contextmanager
def _temporary_file(folder: Path) -> Iterator[IO[bytes]]:
    """A new locked temporary file in a folder, which is made; the file is removed when the body raises."""
    stream = _create(folder)
    try:
        with stream:
            yield stream
    except BaseException:
        Path(stream.name).unlink(missing_ok=True)
        raise


def _create(folder: Path) -> IO[bytes]:
    for _ in range(TRIES - 1):
        with suppress(FileNotFoundError, FileExistsError):  # another job has just removed the folder, or makes it
            return _create_locked(folder)
    return _create_locked(folder)


def _create_locked(folder: Path) -> IO[bytes]:
    """A new temporary file in a folder, which is made; locked as long as its writer lives, if locks are supported."""
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        stream = tempfile.NamedTemporaryFile(prefix=".", suffix=".tmp", dir=folder, delete=False)  # noqa: SIM115
        _lock(stream.fileno(), wait=True)
        if os.path.exists(stream.name):
            return stream
        stream.close()  # another job was faster than the lock and took the file for a dead writer's


def _lock(handle: int, wait: bool) -> bool:
    """Locks a file; False where its writer lives, or the file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
