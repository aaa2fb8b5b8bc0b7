"""The run directory: the tables on disk *are* the state.

Public tables are hive-partitioned, one file of a fixed name per partition, replaced whole. Work in progress lives
under ``_work/<configuration hash>/``. Both are written by one primitive, :meth:`Storage.put`, so that a reader sees
the old file or the new one and never a torso. Every file carries the hash of the configuration that made it, and
:meth:`Storage.is_current` is the one answer to "is this done?".
"""

from __future__ import annotations

import errno
import fcntl
import io
import json
import mmap
import os
import re
import tempfile
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from itertools import accumulate
from pathlib import Path
from typing import IO, Any, BinaryIO, TypeVar
from urllib.parse import quote, unquote, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from milan_ray.config import Fingerprint
from milan_ray.errors import DamagedTable, MilanError, reason
from milan_ray.names import shown
from milan_ray.progress import say
from milan_ray.remote import is_uri, open_uri, split_query, why
from milan_ray.schema import EXEMPLARS, Table
from milan_ray.tensorfiles import check_groups

Result = TypeVar("Result")

CONFIG_KEY = "milan_ray.config"
"""Metadata key: hash of the configuration that made a file."""

INPUTS_KEY = "milan_ray.parts"
"""Metadata key: digests of that configuration's ingredients, as JSON."""

UNITS_KEY = "milan_ray.units"
"""Metadata key: the units that a file was made for, where these are not all."""

ALL_UNITS_KEY = "milan_ray.whole"
"""Metadata key: hash that the configuration would have with all units, where a file is for some."""

EXEMPLARS_KEY = "milan_ray.exemplars"
"""Metadata key: configuration hash of the exemplars that a file speaks of."""

ORDER_KEY = "milan_ray.order"
"""Metadata key of exemplars: the layer's place among the modules of its model."""

FILE_NAME = "data.parquet"
WORK = "_work"

ROW_GROUP = 2**14
"""Rows that are read together at least: a worker needs its few rows of a long manifest."""


LONGEST = 255
"""Bytes of a file's name at most, on all common file systems."""

_CHUNK = 2**23
"""Bytes of a file that are read at once."""

_READERS = 16
"""Files of an object store whose footers are read at once."""

_TRIES = 8
"""Attempts at a local file or folder that another job removes or fills at the same moment."""


class WorkRemovedError(MilanError):
    """Work in progress that was there before is no longer: another job on the same storage has finished it."""


@dataclass(frozen=True)
class FileStat:
    """What a file system knows of a file.

    Attributes:
        size: Bytes.
        modified: When it was last written, UTC; None where the file system does not say.
    """

    size: int
    modified: datetime | None


class Storage:
    """Tables and files below one root, local or on an object store.

    Picklable: what travels is the root.

    Args:
        root: A local path (made absolute) or a URI that pyarrow knows (``s3://…``, ``gs://…``).

    Raises:
        MilanError: The URI names no file system that pyarrow knows.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self._said: set[str] = set()
        text = os.fspath(root)
        if text.startswith("file://"):
            text = unquote(urlsplit(text).path)
        self.is_local = not is_uri(text)
        if self.is_local:
            self.root = str(Path(text).expanduser().absolute())
            self._place, self._query = self.root, ""
            self._fs: pafs.FileSystem = pafs.LocalFileSystem()
            self._base = self.root
        else:
            self._fs, self._base = open_uri(text)
            self._place, self._query = split_query(text)
            self.root = self._place + self._query

    def __reduce__(self) -> tuple[type[Storage], tuple[str]]:
        return (Storage, (self.root,))

    def __repr__(self) -> str:
        return f"Storage({self.root!r})"

    # -- files ------------------------------------------------------------------------------------------------

    def uri(self, path: str = "") -> str:
        """Where a file lies, in the form the user gave the root."""
        return f"{self._place}/{path}{self._query}" if path else self.root

    def _steady(self, path: str, read: Callable[[str], Result]) -> Result:
        """Reads of one version of a file alone, however often others replace it meanwhile.

        Locally an open file stays what it was. An object store answers each request, of which a table takes several,
        with the version of that moment.

        Raises:
            FileNotFoundError: There is none.
            MilanError: It cannot be read.
        """
        target = self._target(path)
        with self._reading(path):
            if self.is_local:
                return read(target)
            for _ in range(_TRIES):
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

    def _target(self, path: str) -> str:
        """Where a path lies for the file system: always below the root, whatever names it is made of.

        Raises:
            MilanError: A part of it is no name of a file.
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

    def _version(self, target: str) -> tuple[object, ...]:
        """What tells one version of an object from another: its tag, where the store has such, and size and time."""
        with self._fs.open_input_stream(target) as stream:
            found = {name.lower(): value for name, value in (stream.metadata() or {}).items()}
        if b"etag" in found:
            return (found[b"etag"],)
        info = self._fs.get_file_info(target)
        return info.size, info.mtime_ns

    @contextmanager
    def _reading(self, path: str) -> Iterator[None]:
        """Turns what the file system says, other than that a file is not there, into one sentence."""
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            raise MilanError(f"cannot read {self.uri(path)}: {why(error, self.root)}") from error

    @contextmanager
    def intact(self, path: str, what: str = "") -> Iterator[None]:
        """Turns what a reader of a file's content says, whenever it says it, into one sentence.

        Args:
            path: The file.
            what: What is to be made again; left out, the job is to be run again.

        Raises:
            DamagedTable: It can be read, and is not what it should be.
        """
        try:
            yield
        except FileNotFoundError:
            raise
        except (OSError, pa.ArrowException, MemoryError, UnicodeError) as error:
            target = self._target(path)
            if self._fs.get_file_info(target).type == pafs.FileType.Directory:
                raise DamagedTable(
                    f"{self.uri(path)} is a folder, where a file belongs; remove it and run {_again(what)}.",
                    path,
                ) from error
            if isinstance(error, OSError) and not self._legible(target):
                raise
            said = reason(error).rstrip(".")
            raise DamagedTable(
                f"{self.uri(path)} is damaged ({said}); delete it and run {_again(what)}.", path
            ) from error

    def _legible(self, target: str) -> bool:
        """Whether all bytes of a file can be had: what is wrong with it is then its content."""
        try:
            with self._fs.open_input_file(target) as stream:
                while stream.read(_CHUNK):
                    pass
        except OSError:
            return False
        return True

    def put(self, path: str, data: bytes | memoryview) -> None:
        """Writes a file so that readers see all of it or none.

        Locally: temporary file, fsync, replace. On an object store: one PUT of the finished buffer (in parts, where it
        is large), which becomes visible as a whole when the stream is closed.

        Raises:
            MilanError: The place cannot be written.
        """
        target = self._target(path)
        if self.is_local:
            with self._writing(path):
                _replace(Path(target), data)
                if not path.startswith(f"{WORK}/"):  # goes as a whole
                    _remove_dead(Path(target).parent)
            return
        try:
            # In another thread, because a KeyboardInterrupt here would close the stream and make a torso visible.
            with ThreadPoolExecutor(1) as thread:
                thread.submit(self._upload, target, data).result()
        except OSError as error:
            raise MilanError(f"cannot write {self.uri(path)}: {why(error, self.root)}") from error

    @contextmanager
    def _writing(self, path: str) -> Iterator[None]:
        """Turns what the local file system says into one sentence."""
        try:
            yield
        except OSError as error:
            if Path(self._target(path)).is_dir():
                raise MilanError(
                    f"cannot write {self.uri(path)}: it is a folder, where a file belongs; remove it and run the job "
                    "again."
                ) from error
            said = error.strerror or error
            raise MilanError(f"cannot write {self.uri(path)}: {said}; choose a writable --storage.") from error

    def _upload(self, target: str, data: bytes | memoryview) -> None:
        with self._fs.open_output_stream(target) as stream:
            stream.write(data)

    def get(self, path: str) -> bytes:
        """Reads a file.

        Raises:
            FileNotFoundError: There is none.
        """
        return self._steady(path, self._bytes)

    def text(self, path: str) -> str:
        """Reads a file of text.

        Raises:
            DamagedTable: It is none.
            MilanError: There is none.
        """
        try:
            with self.intact(path):
                return self.get(path).decode()
        except FileNotFoundError as error:
            raise MilanError(f"{self.uri(path)} does not exist; run the job that makes it again.") from error

    def json(self, path: str) -> Any:
        """Reads a JSON file.

        Raises:
            DamagedTable: It is none.
            MilanError: There is none.
        """
        text = self.text(path)
        try:
            return json.loads(text)
        except ValueError as error:
            raise DamagedTable(
                f"{self.uri(path)} is damaged ({error}); delete it and run the job again.", path
            ) from error

    def _bytes(self, target: str) -> bytes:
        with self._fs.open_input_file(target) as stream:
            return stream.read()

    def open(self, path: str) -> pa.NativeFile:
        """Opens one version of a file, to read parts of it, however often others replace it meanwhile.

        From an object store, which answers each request with the version of that moment, it is copied into a temporary
        file of this machine first.

        Raises:
            FileNotFoundError: There is none.
            MilanError: It cannot be read, or there is no room for the copy.
        """
        if self.is_local:
            with self._reading(path):
                return self._fs.open_input_file(self._target(path))
        with tempfile.NamedTemporaryFile() as spool:
            self._steady(path, lambda target: self._copy(target, spool))
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

    def exists(self, path: str) -> bool:
        """Whether there is a file of that name."""
        with self._reading(path):
            return self._fs.get_file_info(self._target(path)).type == pafs.FileType.File

    def files(self, folder: str) -> list[str]:
        """All files below a folder, as sorted paths relative to the root; none when there is no such folder."""
        return list(self.stat(folder))

    def stat(self, folder: str) -> dict[str, FileStat]:
        """Size and age of all files below a folder, by path relative to the root, sorted."""
        found = self._list(folder)
        return {path: FileStat(i.size, i.mtime) for path, i in found.items() if i.type == pafs.FileType.File}

    def _list(self, folder: str) -> dict[str, pafs.FileInfo]:
        """All files and folders below a folder, but hidden ones, by path relative to the root, sorted."""
        selector = pafs.FileSelector(self._target(folder), recursive=True, allow_not_found=True)
        prefix = len(self._base.rstrip("/")) + 1
        found = self._infos(selector, folder)
        visible = [info for info in found if not info.base_name.startswith(".")]
        return {info.path[prefix:]: info for info in sorted(visible, key=lambda info: info.path)}

    def _infos(self, selector: pafs.FileSelector, folder: str) -> list[pafs.FileInfo]:
        with self._reading(folder):
            for _ in range(_TRIES):
                try:
                    return self._fs.get_file_info(selector)
                except FileNotFoundError:  # a folder below was removed while it was listed
                    continue
            return self._fs.get_file_info(selector)

    def remove(self, folder: str) -> None:
        """Removes a folder and all below it; nothing happens when there is none.

        What another job writes there at the same time may stay; that job removes it when it is done.
        """
        target = self._target(folder)
        with self._reading(folder):
            for _ in range(_TRIES):
                if self._fs.get_file_info(target).type == pafs.FileType.NotFound:
                    return
                try:
                    self._fs.delete_dir(target)
                except OSError as error:  # another job removed some of it first, or has just put something there
                    if not isinstance(error, FileNotFoundError) and error.errno != errno.ENOTEMPTY:
                        raise

    def remove_file(self, path: str) -> None:
        """Removes a file; nothing happens when there is none."""
        with self._reading(path):
            try:
                self._fs.delete_file(self._target(path))
            except FileNotFoundError:
                return

    def check_writable(self) -> None:
        """Fails early and clearly where nothing could be written later.

        Raises:
            MilanError: The root cannot be written.
        """
        path = f"{WORK}/writable"
        self.put(path, b"")
        self.remove_file(path)
        self._remove_empty_work()

    # -- tables -----------------------------------------------------------------------------------------------

    def path(self, noun: Table, **keys: str) -> str:
        """The file of one partition, relative to the root.

        Values are quoted: whatever they are, each is one folder, and no other than itself.
        """
        if set(keys) != set(noun.partition):
            raise KeyError(f"{noun.name} is partitioned by {noun.partition}, got {tuple(keys)}")
        folders = [f"{key}={quote(keys[key], safe=' ')}" for key in noun.partition]
        return "/".join([noun.name, *folders, FILE_NAME])

    def write(self, noun: Table, table: pa.Table, config: str | Fingerprint, **keys: str) -> None:
        """Replaces one partition.

        Args:
            noun: Which table.
            table: Its rows (schema of the noun); its metadata goes into the file.
            config: What decided them; a hash alone where nobody will ask what changed.
            **keys: Values of the noun's partition keys.
        """
        if not table.schema.equals(noun.schema):
            raise ValueError(f"{noun.name}: schema differs: {table.schema} instead of {noun.schema}")
        self.put(self.path(noun, **keys), to_parquet(table, _stamp(config)))

    def write_stream(
        self,
        noun: Table,
        pieces: Iterable[pa.Table],
        config: str | Fingerprint,
        metadata: Mapping[str, str],
        **keys: str,
    ) -> None:
        """Replaces one partition, whatever its size, and holds one piece at a time.

        The file is whole on this machine's disk before it takes its place: by a rename locally, on an object store as
        one PUT out of a memory map.

        Args:
            noun: Which table.
            pieces: Its rows (schema of the noun); each piece becomes a row group.
            config: What decided them, as for :meth:`write`.
            metadata: Key-value pairs for the file.
            **keys: Values of the noun's partition keys.

        Raises:
            MilanError: The place cannot be written.
        """
        path = self.path(noun, **keys)
        schema = noun.schema.with_metadata(dict(sorted({**metadata, **_stamp(config)}.items())))

        def fill(stream: BinaryIO) -> None:
            with pq.ParquetWriter(stream, schema, compression="zstd", write_page_checksum=True) as writer:
                for piece in pieces:
                    writer.write_table(piece)

        if not self.is_local:
            with tempfile.TemporaryFile() as spool:
                fill(spool)
                spool.flush()
                self.put(path, memoryview(mmap.mmap(spool.fileno(), 0, access=mmap.ACCESS_READ)))
            return
        target = Path(self._target(path))
        with self._writing(path):
            target.parent.mkdir(parents=True, exist_ok=True)
            with _replacing(target) as stream:
                fill(stream)
            _remove_dead(target.parent)

    def read(self, noun: Table, columns: Sequence[str] | None = None, **keys: str) -> pa.Table:
        """Reads one partition.

        Raises:
            MilanError: It does not exist.
            DamagedTable: It cannot be read, or is another table.
        """
        path = self.path(noun, **keys)
        names = noun.schema.names if columns is None else list(columns)
        try:
            return self._parquet(path, noun, lambda file: _sound(file.read(names, use_threads=True), noun, names))
        except FileNotFoundError as error:
            raise MilanError(f"{self.uri(path)} does not exist; run the stage that makes {noun.name} first.") from error

    def read_rows(self, noun: Table, start: int, stop: int, columns: Sequence[str], **keys: str) -> pa.Table:
        """Rows ``start`` to ``stop - 1`` of one partition, as far as it has them; only their row groups are read.

        Raises:
            MilanError: It does not exist.
            DamagedTable: It cannot be read, or is another table.
        """
        self._present(noun, **keys)
        names = list(columns)

        def rows(file: pq.ParquetFile) -> pa.Table:
            ends = list(accumulate(file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)))
            first, last = bisect_right(ends, start), min(bisect_left(ends, stop), len(ends) - 1)
            before = ends[first - 1] if first else 0
            table = file.read_row_groups(range(first, last + 1), columns=names)
            return _sound(table, noun, names).slice(start - before, stop - start)

        return self._parquet(self.path(noun, **keys), noun, rows)

    def stream(self, noun: Table, columns: Sequence[str] | None = None, **keys: str) -> Iterator[pa.Table]:
        """The rows of one partition in their order, a row group at a time: for tables that need not fit in memory.

        Raises:
            MilanError: It does not exist.
            DamagedTable: It cannot be read, or is another table.
        """
        self._present(noun, **keys)
        path = self.path(noun, **keys)
        names = noun.schema.names if columns is None else list(columns)
        with self.open(path) as stream:
            with self.intact(path, noun.name):
                file = _open_parquet(stream, noun, not self.is_local)
            for group in range(file.num_row_groups):
                with self.intact(path, noun.name):
                    piece = _sound(file.read_row_group(group, columns=names), noun, names)
                yield piece

    def _parquet(self, path: str, noun: Table | None, use: Callable[[pq.ParquetFile], Result]) -> Result:
        """What is wanted of one version of a Parquet file, whose claims and, for a noun, columns hold.

        Raises:
            FileNotFoundError: There is none.
            DamagedTable: It cannot be read, or is another table.
        """

        def read(target: str) -> Result:
            with self.intact(path, noun.name if noun else ""), self._fs.open_input_file(target) as stream:
                return use(_open_parquet(stream, noun, not self.is_local))

        return self._steady(path, read)

    def metadata(self, noun: Table, **keys: str) -> dict[str, str] | None:
        """The file metadata of one partition, or None where there is no such partition.

        Raises:
            DamagedTable: Its footer cannot be read, or it is another table; or, when it is looked up, an entry lacks.
        """
        return self._metadata(self.path(noun, **keys), noun)

    def file_metadata(self, path: str) -> dict[str, str] | None:
        """The key-value metadata of a Parquet file, or None where there is none."""
        return self._metadata(path, None)

    def _metadata(self, path: str, noun: Table | None) -> dict[str, str] | None:
        def entries(file: pq.ParquetFile) -> dict[str, str]:
            found = file.schema_arrow.metadata or {}
            return {key.decode(): value.decode() for key, value in found.items() if key != b"ARROW:schema"}

        try:
            what = noun.name if noun else ""
            return _Entries(self._parquet(path, noun, entries), where=self.uri(path), path=path, what=what)
        except FileNotFoundError:
            return None

    def is_current(self, noun: Table, config: str, **keys: str) -> bool:
        """Whether one partition exists and was made under this very configuration: "is this done?"."""
        try:
            found = self.metadata(noun, **keys)
        except DamagedTable:
            self._say_missing(self.path(noun, **keys))
            return False
        return found is not None and found.get(CONFIG_KEY) == config

    def count(self, noun: Table, **keys: str) -> int:
        """Rows of one partition, from its footer; 0 where there is no such partition."""
        path = self.path(noun, **keys)
        try:
            return self._parquet(path, noun, lambda file: file.metadata.num_rows)
        except FileNotFoundError:
            return 0

    def why(self, noun: Table, fingerprint: Fingerprint, **keys: str) -> str | None:
        """Why one partition has to be made: ``missing``, ``damaged``, or which ingredients changed.

        None when it is current; where only some units are wanted, one with all of them will do.
        """
        try:
            found = self.metadata(noun, **keys)
        except DamagedTable:
            self._say_missing(self.path(noun, **keys))
            return "damaged"
        if found is None:
            return "missing"
        if found.get(CONFIG_KEY) in (fingerprint.hash, fingerprint.all_units):
            return None
        old = parts_of(found)
        names = {**fingerprint.inputs, **old}
        changed = [name for name in names if old.get(name) != fingerprint.inputs.get(name)]
        return f"{', '.join(changed)} changed" if old else "made by an earlier version"

    def _say_missing(self, path: str) -> None:
        if path not in self._said:
            self._said.add(path)
            say(f"{self.uri(path)} is damaged: it counts as missing, and is made anew", level="warning")

    def config_of(self, noun: Table, **keys: str) -> str:
        """The configuration hash of one partition.

        Raises:
            MilanError: It does not exist.
        """
        return self._present(noun, **keys)[CONFIG_KEY]

    def all_units_of(self, noun: Table, **keys: str) -> str:
        """The configuration hash of one partition, or what it would be with all of the layer's units.

        Raises:
            MilanError: It does not exist.
        """
        found = self._present(noun, **keys)
        return found.get(ALL_UNITS_KEY, found[CONFIG_KEY])

    def exemplars_of(self, noun: Table, **keys: str) -> str | None:
        """The configuration hash of the exemplars that one partition speaks of; None where it does not say.

        Raises:
            MilanError: It does not exist.
        """
        return self._present(noun, **keys).get(EXEMPLARS_KEY)

    def _present(self, noun: Table, **keys: str) -> dict[str, str]:
        found = self.metadata(noun, **keys)
        if found is None:
            path = self.uri(self.path(noun, **keys))
            raise MilanError(f"{path} does not exist; run the stage that makes {noun.name} first.")
        return found

    def partitions(self, noun: Table, **where: str) -> list[dict[str, str]]:
        """The partitions that exist, damaged ones too, as their key values, sorted.

        Args:
            noun: Which table.
            **where: Only partitions with these values.
        """
        found = []
        for file in self._list(noun.name):
            parts = file.split("/")[1:]
            if parts[-1] != FILE_NAME or len(parts) != len(noun.partition) + 1:
                continue
            keys = {}
            for part in parts[:-1]:
                key, _, value = part.partition("=")
                keys[key] = unquote(value)
            if tuple(keys) == noun.partition and all(keys[key] == value for key, value in where.items()):
                found.append(keys)
        return found

    def in_model_order(self, partitions: Iterable[Mapping[str, str]]) -> list[dict[str, str]]:
        """Partitions by their keys, but layers as they follow one another in their model.

        The order is what the model's exemplars say. Where one of the layers has none that say it, names decide, numbers
        in them by their value.

        Args:
            partitions: Keys of partitions, ``model`` and ``layer`` among them.
        """
        found = [dict(keys) for keys in partitions]
        layers: dict[str, set[str]] = {}
        for keys in found:
            layers.setdefault(keys["model"], set()).add(keys["layer"])
        ranks = {
            model: {layer: n for n, layer in enumerate(self.layers_in_order(model, of))} for model, of in layers.items()
        }

        def place(keys: dict[str, str]) -> tuple[str | int, ...]:
            return tuple(ranks[keys["model"]][value] if name == "layer" else value for name, value in keys.items())

        return sorted(found, key=place)

    def layers_in_order(self, model: str, layers: Iterable[str]) -> list[str]:
        """Some layers of a model as they follow one another in it; order as for :meth:`in_model_order`."""
        names = sorted(set(layers), key=natural)
        with ThreadPoolExecutor(1 if self.is_local else _READERS) as threads:
            places = list(threads.map(lambda layer: self._place_of(model, layer), names))
        known = [place for place in places if place is not None]
        if len(known) < len(names):
            return names
        return [names[n] for n in sorted(range(len(names)), key=lambda n: (known[n], n))]

    def _place_of(self, model: str, layer: str) -> int | None:
        try:
            found = (self.metadata(EXEMPLARS, model=model, layer=layer) or {}).get(ORDER_KEY, "")
        except MilanError:  # a damaged file has no say; whoever reads its rows says that it is damaged
            return None
        return int(found) if found.isdecimal() else None

    # -- work in progress -------------------------------------------------------------------------------------

    def put_work(self, config: str, name: str, table: pa.Table) -> None:
        """Writes a work table under a name that is a function of configuration and shard alone.

        Work is Arrow IPC, not Parquet: it is written and read once, and no glob for tables can meet it.
        """
        buffer = io.BytesIO()
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        with pa.ipc.new_file(buffer, table.schema, options=options) as writer:
            writer.write_table(table)
        self.put(f"{WORK}/{config}/{name}.arrow", buffer.getbuffer())

    def get_work(self, config: str, name: str) -> pa.Table:
        """Reads a work table back.

        Raises:
            WorkRemovedError: It is not there.
        """
        path = f"{WORK}/{config}/{name}.arrow"
        try:
            data = self.get(path)
        except FileNotFoundError as error:
            raise WorkRemovedError(
                f"{self.uri(path)} is gone; run the job again to go on from what is there."
            ) from error
        try:
            with self.intact(path):
                table = pa.ipc.open_file(pa.BufferReader(data)).read_all()
                table.validate(full=True)
                return table
        except DamagedTable as error:
            self.remove_file(path)
            raise WorkRemovedError(
                f"{self.uri(path)} was damaged and is gone; run the job again to make it anew."
            ) from error

    def work_names(self, config: str, folder: str = "") -> list[str]:
        """The names of a configuration's finished work tables, below a folder of it."""
        prefix = f"{WORK}/{config}/"
        names = [path[len(prefix) :] for path in self.files(f"{prefix}{folder}".rstrip("/"))]
        return [name.removesuffix(".arrow") for name in names if name.endswith(".arrow")]

    def remove_work(self, config: str) -> None:
        """Removes a configuration's work, once its result is public; the last one's takes the folder with it."""
        self.remove(f"{WORK}/{config}")
        self._remove_empty_work()

    def _remove_empty_work(self) -> None:
        """Removes the folder of work in progress, unless some job has work there; who writes next makes it again."""
        if self.is_local:
            _remove_dead(Path(self._base, WORK))
            try:
                os.rmdir(f"{self._base}/{WORK}")
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
                    raise


class _Entries(dict[str, str]):
    """File metadata; an entry that lacks says which file is damaged."""

    def __init__(self, entries: Mapping[str, str], *, where: str, path: str, what: str) -> None:
        super().__init__(entries)
        self._where, self._path, self._what = where, path, what

    def __bool__(self) -> bool:
        return True  # that of a file without any is not that of no file

    def __missing__(self, key: str) -> str:
        raise DamagedTable(
            f"{self._where} is damaged (its metadata lack {key!r}); delete it and run {_again(self._what)}.",
            self._path,
        )


def _again(what: str) -> str:
    return f"the job that makes {what} again" if what else "the job again"


def parts_of(metadata: Mapping[str, str]) -> dict[str, str]:
    """The digests of the ingredients of a file, by its metadata; none where it does not say, or not legibly."""
    try:
        found = json.loads(metadata.get(INPUTS_KEY, "{}"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _open_parquet(stream: pa.NativeFile, noun: Table | None, buffered: bool) -> pq.ParquetFile:
    """Opens a Parquet file and looks whether it may be believed, before anything is allocated for it.

    Raises:
        pa.ArrowInvalid: Its footer is damaged or claims more than the file holds, its columns are not the noun's, or it
            does not say what it was made of.
    """
    file = pq.ParquetFile(stream, page_checksum_verification=True, pre_buffer=buffered)
    check_groups(file.metadata, stream.size())
    if noun is not None:
        noun.check(file.schema_arrow)
        if CONFIG_KEY.encode() not in (file.schema_arrow.metadata or {}):
            raise pa.ArrowInvalid(f"its metadata lack {CONFIG_KEY!r}")
    return file


def _sound(table: pa.Table, noun: Table, names: Sequence[str]) -> pa.Table:
    """The columns of a table that was read, in the order asked for.

    Raises:
        pa.ArrowInvalid: A text is none, or a value lacks that must be there.
    """
    table = table.select(names)
    table.validate(full=True)
    for column in noun.columns:
        if not column.nullable and column.name in table.column_names and table[column.name].null_count:
            raise pa.ArrowInvalid(f"column {column.name!r} has rows without a value")
    return table


def natural(name: str) -> list[tuple[int, int, str]]:
    """Sorts ``layer10`` after ``layer9``."""
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in re.split(r"(\d+)", name)]


def _stamp(config: str | Fingerprint) -> dict[str, str]:
    """What a file says of the configuration that made it."""
    if isinstance(config, str):
        return {CONFIG_KEY: config}
    stamp = {CONFIG_KEY: config.hash, INPUTS_KEY: json.dumps(config.inputs, sort_keys=True)}
    if config.units:
        stamp |= {ALL_UNITS_KEY: config.all_units, UNITS_KEY: ",".join(map(str, config.units))}
    return stamp


def to_parquet(table: pa.Table, metadata: Mapping[str, str]) -> bytes:
    """A table as the bytes of a Parquet file: same table and metadata, same bytes."""
    stamped = {**(table.schema.metadata or {}), **{key.encode(): value.encode() for key, value in metadata.items()}}
    stamped = dict(sorted(stamped.items()))
    buffer = io.BytesIO()
    table = table.replace_schema_metadata(stamped)
    pq.write_table(table, buffer, compression="zstd", row_group_size=ROW_GROUP, write_page_checksum=True)
    return buffer.getvalue()


def _replace(target: Path, data: bytes | memoryview) -> None:
    """Writes a local file through a temporary neighbour, durably."""
    for last in (*[False] * (_TRIES - 1), True):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            return _replace_in_folder(target, data)
        except (FileNotFoundError, FileExistsError):  # another job has just removed the folder, or while it was made
            if last:
                raise


def _replace_in_folder(target: Path, data: bytes | memoryview) -> None:
    with _replacing(target) as stream:
        stream.write(data)


@contextmanager
def _replacing(target: Path) -> Iterator[BinaryIO]:
    """A temporary neighbour of a local file, which takes its place durably when nothing went wrong."""
    handle, temporary = _temporary(target.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, target)  # while it is open, and with that locked
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _temporary(folder: Path) -> tuple[int, str]:
    """A new temporary file, locked as long as its writer lives, where the file system has locks."""
    while True:
        handle, path = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=folder)
        _lock(handle, wait=True)
        if os.path.exists(path):
            return handle, path
        os.close(handle)  # another job was faster than the lock and took it for a dead writer's


def _lock(handle: int, wait: bool) -> bool:
    """Locks a file; False where its writer lives, or nothing can be locked."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove_dead(folder: Path) -> None:
    """Removes what killed processes have left of files that they were writing into a folder."""
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
