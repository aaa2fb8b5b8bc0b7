"""Counts the requests that an object store would get, on this machine's disk."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from milan_ray.storage import Storage

PAGE = 1000
"""Objects that an object store lists per request."""


def counting(storage: Storage, requests: Counter[str], below: str = "") -> Storage:
    """The same run directory, which counts requests as on an object store; it does not travel to other processes.

    Args:
        storage: A local run directory.
        requests: Kind of request → number, and the MB that were read.
        below: Folder of the requests that are counted.
    """
    counted = Storage(storage.root)
    counted._fs = _CountingSystem(counted._fs, requests, f"{storage.root}/{below}")
    counted.is_local = False
    return counted


class _CountingSystem:
    """A local file system that counts what pyarrow would ask an object store for."""

    def __init__(self, system: pafs.FileSystem, requests: Counter[str], below: str) -> None:
        self._system, self._of_all, self._below = system, requests, below

    def _requests(self, path: str) -> Counter[str]:
        """Where a request for a path is counted."""
        return self._of_all if path.startswith(self._below) else Counter()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._system, name)

    def get_file_info(self, where: str | pafs.FileSelector) -> Any:
        """A listing, or what is known of one object."""
        found = self._system.get_file_info(where)
        if isinstance(where, str):
            self._requests(where)["HEAD"] += 1
        else:
            self._requests(f"{where.base_dir}/")["LIST"] += -(-len(found) // PAGE) or 1
        return found

    def open_input_file(self, path: str) -> _CountingFile:
        """Asks for the object's size."""
        requests = self._requests(path)
        requests["HEAD"] += 1
        return _CountingFile(self._system.open_input_file(path), requests, path)

    def open_input_stream(self, path: str) -> _CountingFile:
        """Asks for the object's version."""
        return self.open_input_file(path)

    def open_output_stream(self, path: str) -> pa.NativeFile:
        """Writes the object; a folder is nothing on an object store."""
        self._requests(path)["PUT"] += 1
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        return self._system.open_output_stream(path)


class _CountingFile:
    """A file of which every read is a request."""

    def __init__(self, file: pa.NativeFile, requests: Counter[str], path: str) -> None:
        self._file, self._requests, self._path = file, requests, path

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _CountingFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def metadata(self) -> Mapping[bytes, bytes]:
        """The object's tag."""
        return {b"ETag": str(os.stat(self._path).st_mtime_ns).encode()}

    def read(self, *size: int) -> bytes:
        """Reads on."""
        return self._noted(self._file.read(*size))

    def read_at(self, size: int, start: int) -> bytes:
        """Reads a range."""
        return self._noted(self._file.read_at(size, start))

    def _noted(self, data: bytes) -> bytes:
        self._requests["GET"] += 1
        self._requests["MB"] += len(data) / 1e6  # type: ignore[assignment]
        return data
