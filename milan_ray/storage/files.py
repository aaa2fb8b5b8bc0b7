"""Bytes below one root, local or on an object store: atomic writes, reads of one version, listing and removal."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from milan_ray.errors import DamagedTable, MilanError, reason
from milan_ray.names import shown
from milan_ray.remote import is_uri, open_uri, split_query, why
from milan_ray.storage.atomic import TRIES, remove_abandoned, replace_file

Result = TypeVar("Result")

WORK = "_work"
"""Folder of work in progress."""

LONGEST = 255
"""Bytes of a file's name at most, on all common file systems."""

_CHUNK = 2**23
"""Bytes of a file that are read at once."""


@dataclass(frozen=True)
class FileStat:
    """Size and age of a file.

    Attributes:
        size: Bytes.
        modified: When it was last written, UTC; None where the file system does not say.
    """

    size: int
    modified: datetime | None


class Files:
    """Files below one root.

    Picklable: only the root is pickled.

    Args:
        root: A local path (made absolute) or a URI that pyarrow knows (``s3://…``, ``gs://…``).

    Raises:
        MilanError: The URI names no file system that pyarrow knows.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        text = os.fspath(root)
        if text.startswith("file://"):
            text = unquote(urlsplit(text).path)
        self.is_local = not is_uri(text)
        if self.is_local:
            self.root = str(Path(text).expanduser().absolute())
            self._prefix, self._query = self.root, ""
            self._fs: pafs.FileSystem = pafs.LocalFileSystem()
            self._base = self.root
        else:
            self._fs, self._base = open_uri(text)
            self._prefix, self._query = split_query(text)
            self.root = self._prefix + self._query

    def uri(self, path: str = "") -> str:
        """The address of a file, in the form in which the user gave the root."""
        return f"{self._prefix}/{path}{self._query}" if path else self.root

    def _target(self, path: str) -> str:
        """A path as the file system wants it: always below the root, whatever names the path is made of.

        Raises:
            MilanError: A part of it cannot name a file.
        """
        for part in path.split("/") if path else ():
            if part in ("", ".", "..") or "\0" in part:
                raise MilanError(
                    f"{shown(path)} is no place in a storage: {shown(part)} is no name of a file or folder; choose "
                    "another name."
                )
            if len(part.encode(errors="surrogatepass")) > LONGEST:
                raise MilanError(f"the name {shown(part)} is longer than {LONGEST} bytes; choose a shorter one.")
        return f"{self._base}/{path}"

    # -- reading ----------------------------------------------------------------------------------------------

    def get(self, path: str) -> bytes:
        """Reads a file.

        Raises:
            FileNotFoundError: There is no such file.
        """

        def read(target: str) -> bytes:
            with self._fs.open_input_file(target) as stream:
                return stream.read()

        return self._read_version(path, read)

    def text(self, path: str) -> str:
        """Reads a text file.

        Raises:
            DamagedTable: Its content is no text.
            MilanError: There is no such file.
        """
        try:
            with self.intact(path):
                return self.get(path).decode()
        except FileNotFoundError as error:
            raise MilanError(f"{self.uri(path)} does not exist; run the job that makes it again.") from error

    def json(self, path: str) -> Any:
        """Reads a JSON file.

        Raises:
            DamagedTable: Its content is no JSON.
            MilanError: There is no such file.
        """
        text = self.text(path)
        with self.intact(path):
            return json.loads(text)

    def open(self, path: str) -> pa.NativeFile:
        """Opens one version of a file, to read parts of it, however often other jobs replace it meanwhile.

        An object store answers each request with the version of that moment, so its file is first copied into a
        temporary file of this machine.

        Raises:
            FileNotFoundError: There is no such file.
            MilanError: The file cannot be read, or there is no room for the copy.
        """
        if self.is_local:
            with self._explain_reading(path):
                return self._fs.open_input_file(self._target(path))
        with tempfile.NamedTemporaryFile() as spool:
            self._read_version(path, lambda target: self._copy(target, spool))
            return pa.OSFile(spool.name)  # which stays readable without its name

    def _copy(self, target: str, spool: IO[bytes]) -> None:
        """Fills a local file with an object's bytes."""
        spool.seek(0)
        spool.truncate()
        with self._fs.open_input_stream(target) as source:
            while part := source.read(_CHUNK):
                try:
                    spool.write(part)
                    spool.flush()
                except OSError as error:
                    raise MilanError(
                        f"cannot copy {target} into {tempfile.gettempdir()}: {error.strerror or error}; "
                        "set TMPDIR to a folder with more room."
                    ) from error

    def _read_version(self, path: str, read: Callable[[str], Result]) -> Result:
        """Reads a file so that all bytes are of one version, however often other jobs replace it meanwhile.

        A local file that is open never changes. An object store answers each request with the version of that moment,
        and a table takes several requests: a read during which the version changed is repeated.

        Args:
            path: The file.
            read: Opens the file, given its path for the file system, and reads what is wanted of it.

        Raises:
            FileNotFoundError: There is no such file.
            MilanError: The file cannot be read.
        """
        target = self._target(path)
        with self._explain_reading(path):
            if self.is_local:
                return read(target)
            for _ in range(TRIES):
                before = self._version(target)
                try:
                    result = read(target)
                except (OSError, pa.ArrowException, DamagedTable):
                    if self._version(target) == before:
                        raise
                    continue
                if self._version(target) == before:
                    return result
        raise MilanError(f"{self.uri(path)} is replaced over and over while it is read; run the job again.")

    def _version(self, target: str) -> tuple[object, ...]:
        """Identifies the version of an object: its tag, where the store has tags, else size and time."""
        with self._fs.open_input_stream(target) as stream:
            metadata = {name.lower(): value for name, value in (stream.metadata() or {}).items()}
        if b"etag" in metadata:
            return (metadata[b"etag"],)
        info = self._fs.get_file_info(target)
        return info.size, info.mtime_ns

    @contextmanager
    def _explain_reading(self, path: str) -> Iterator[None]:
        """Raises errors of the file system as :class:`MilanError`, except that a file does not exist."""
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            raise MilanError(f"cannot read {self.uri(path)}: {why(error, self.root)}") from error

    @contextmanager
    def intact(self, path: str, what: str = "") -> Iterator[None]:
        """Raises errors of a reader about a file's content as :class:`DamagedTable`.

        Args:
            path: The file.
            what: The table to make again, for the message; empty for "the job".

        Raises:
            DamagedTable: The file can be read, and its content is damaged.
        """
        try:
            yield
        except FileNotFoundError:
            raise
        except (OSError, pa.ArrowException, MemoryError, UnicodeError, json.JSONDecodeError) as error:
            target = self._target(path)
            if self._fs.get_file_info(target).type == pafs.FileType.Directory:
                raise DamagedTable(
                    f"{self.uri(path)} is a folder, where a file belongs; remove it and run {job_again(what)}.",
                    path,
                ) from error
            if isinstance(error, OSError) and not self._is_readable(target):
                raise
            raise DamagedTable(
                f"{self.uri(path)} is damaged ({reason(error).rstrip('.')}); delete it and run {job_again(what)}.", path
            ) from error

    def _is_readable(self, target: str) -> bool:
        """Whether all bytes of a file can be read; an error is then about its content."""
        try:
            with self._fs.open_input_file(target) as stream:
                while stream.read(_CHUNK):
                    pass
        except OSError:
            return False
        return True

    # -- writing ----------------------------------------------------------------------------------------------

    def put(self, path: str, data: bytes | memoryview) -> None:
        """Writes a file so that readers see all of it or none.

        Locally: temporary file, fsync, replace. On an object store: one PUT of the finished buffer (in parts, where it
        is large), which becomes visible as a whole when the stream is closed.

        Raises:
            MilanError: The file cannot be written.
        """
        if self.is_local:
            self._replace(path, lambda stream: stream.write(data))
            return
        target = self._target(path)
        try:
            # In another thread, because a KeyboardInterrupt here would close the stream and make a torso visible.
            with ThreadPoolExecutor(1) as thread:
                thread.submit(self._upload, target, data).result()
        except OSError as error:
            raise MilanError(f"cannot write {self.uri(path)}: {why(error, self.root)}") from error

    def _upload(self, target: str, data: bytes | memoryview) -> None:
        with self._fs.open_output_stream(target) as stream:
            stream.write(data)

    def _replace(self, path: str, fill: Callable[[IO[bytes]], object]) -> None:
        """Replaces a local file by what ``fill`` writes to a stream.

        Raises:
            MilanError: The file cannot be written.
        """
        target = Path(self._target(path))
        try:
            replace_file(target, fill)
            if not path.startswith(f"{WORK}/"):  # goes as a whole
                remove_abandoned(target.parent)
        except OSError as error:
            if target.is_dir():
                raise MilanError(
                    f"cannot write {self.uri(path)}: it is a folder, where a file belongs; remove it and run the job "
                    "again."
                ) from error
            why_not = error.strerror or error
            raise MilanError(f"cannot write {self.uri(path)}: {why_not}; choose a writable --storage.") from error

    def remove(self, folder: str) -> None:
        """Removes a folder and all below it; nothing happens when there is none.

        What another job writes there at the same time may stay; that job removes it when it is done.
        """
        target = self._target(folder)
        with self._explain_reading(folder):
            for _ in range(TRIES):
                if self._fs.get_file_info(target).type == pafs.FileType.NotFound:
                    return
                try:
                    self._fs.delete_dir(target)
                except OSError as error:  # another job removed some of it first, or has just put something there
                    if not isinstance(error, FileNotFoundError) and error.errno != errno.ENOTEMPTY:
                        raise

    def remove_file(self, path: str) -> None:
        """Removes a file; nothing happens when there is none."""
        with self._explain_reading(path), suppress(FileNotFoundError):
            self._fs.delete_file(self._target(path))

    # -- listing ----------------------------------------------------------------------------------------------

    def exists(self, path: str) -> bool:
        """Whether there is a file of that name."""
        with self._explain_reading(path):
            return self._fs.get_file_info(self._target(path)).type == pafs.FileType.File

    def files(self, folder: str) -> list[str]:
        """All files below a folder, as sorted paths relative to the root; none when there is no such folder."""
        return list(self.stat(folder))

    def stat(self, folder: str) -> dict[str, FileStat]:
        """Size and age of all files below a folder, by path relative to the root, sorted."""
        return {
            path: FileStat(info.size, info.mtime)
            for path, info in self._list(folder).items()
            if info.type == pafs.FileType.File
        }

    def _list(self, folder: str) -> dict[str, pafs.FileInfo]:
        """All files and folders below a folder, except hidden ones, by path relative to the root, sorted."""
        selector = pafs.FileSelector(self._target(folder), recursive=True, allow_not_found=True)
        prefix = len(self._base.rstrip("/")) + 1
        infos = sorted(self._infos(selector, folder), key=lambda info: info.path)
        return {info.path[prefix:]: info for info in infos if not info.base_name.startswith(".")}

    def _infos(self, selector: pafs.FileSelector, folder: str) -> list[pafs.FileInfo]:
        with self._explain_reading(folder):
            for _ in range(TRIES):
                with suppress(FileNotFoundError):  # a folder below was removed while it was listed
                    return self._fs.get_file_info(selector)
            return self._fs.get_file_info(selector)


def job_again(what: str) -> str:
    """What to run again to make a table, for messages; ``what`` is empty where no table is known."""
    return f"the job that makes {what} again" if what else "the job again"
