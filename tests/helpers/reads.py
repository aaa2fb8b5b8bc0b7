"""Counts what is read of files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pyarrow.fs as pafs


class Reads:
    """A file system that notes the number of bytes of every read."""

    def __init__(self, system: pafs.FileSystem, sizes: list[int]) -> None:
        self._system, self._sizes = system, sizes

    def __getattr__(self, name: str) -> object:
        return getattr(self._system, name)

    @contextmanager
    def open_input_file(self, path: str) -> Iterator[SimpleNamespace]:
        with self._system.open_input_file(path) as file:

            def read_at(length: int, start: int) -> bytes:
                self._sizes.append(length)
                data: bytes = file.read_at(length, start)
                return data

            yield SimpleNamespace(size=file.size, read_at=read_at)
