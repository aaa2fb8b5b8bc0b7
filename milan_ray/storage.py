"""The run directory: the tables on disk *are* the state.

Public tables are hive-partitioned, one file of a fixed name per partition, replaced whole. Work in progress lives
under ``_work/<configuration hash>/``. Both are written by one primitive, :meth:`Storage.put`, so that a reader sees
the old file or the new one and never a torso. Every file carries the hash of the configuration that made it, and
:meth:`Storage.is_current` is the one answer to "is this done?".
"""

from __future__ import annotations

import io
import json
import os
import tempfile
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import accumulate
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from milan_ray.config import Recipe
from milan_ray.errors import MilanError
from milan_ray.schema import Noun

CONFIG_KEY = "milan_ray.config"
"""Metadata key: hash of the configuration that made a file."""

PARTS_KEY = "milan_ray.parts"
"""Metadata key: digests of that configuration's ingredients, as JSON."""

UNITS_KEY = "milan_ray.units"
"""Metadata key: the units that a file was made for, where these are not all."""

WHOLE_KEY = "milan_ray.whole"
"""Metadata key: hash that the configuration would have with all units, where a file is for some."""

EXEMPLARS_KEY = "milan_ray.exemplars"
"""Metadata key: configuration hash of the exemplars that a file speaks of."""

FILE_NAME = "data.parquet"
WORK = "_work"

ROW_GROUP = 2**14
"""Rows that are read together at least: a worker needs its few rows of a long manifest."""


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
        text = os.fspath(root)
        if text.startswith("file://"):
            text = unquote(urlsplit(text).path)
        self.is_local = "://" not in text
        self.root = str(Path(text).expanduser().absolute()) if self.is_local else text.rstrip("/")
        if self.is_local:
            self._fs: pafs.FileSystem = pafs.LocalFileSystem()
            self._base = self.root
        else:
            try:
                self._fs, self._base = pafs.FileSystem.from_uri(self.root)
            except (pa.ArrowException, ValueError, OSError) as error:
                raise MilanError(f"cannot open the storage {self.root}: {error}") from error

    def __reduce__(self) -> tuple[type[Storage], tuple[str]]:
        return (Storage, (self.root,))

    def __repr__(self) -> str:
        return f"Storage({self.root!r})"

    # -- files ------------------------------------------------------------------------------------------------

    def uri(self, path: str = "") -> str:
        """Where a file lies, in the form the user gave the root."""
        return f"{self.root}/{path}" if path else self.root

    def put(self, path: str, data: bytes | memoryview) -> None:
        """Writes a file so that readers see all of it or none.

        Locally: temporary file, fsync, replace. On an object store: one PUT of the finished buffer, which becomes
        visible as a whole; an exception before it leaves nothing (a stream closed by an exception would).

        Raises:
            MilanError: The place cannot be written.
        """
        target = f"{self._base}/{path}"
        try:
            if self.is_local:
                _replace(Path(target), data)
            else:
                with self._fs.open_output_stream(target) as stream:
                    stream.write(data)
        except OSError as error:
            reason = error.strerror or error
            raise MilanError(f"cannot write {self.uri(path)}: {reason}; choose a writable --storage.") from error

    def get(self, path: str) -> bytes:
        """Reads a file.

        Raises:
            FileNotFoundError: There is none.
        """
        with self.open(path) as stream:
            return stream.read()

    def open(self, path: str) -> pa.NativeFile:
        """Opens a file, to read parts of it.

        Raises:
            FileNotFoundError: There is none.
        """
        return self._fs.open_input_file(f"{self._base}/{path}")

    def exists(self, path: str) -> bool:
        """Whether there is a file of that name."""
        return self._fs.get_file_info(f"{self._base}/{path}").type == pafs.FileType.File

    def files(self, folder: str) -> list[str]:
        """All files below a folder, as sorted paths relative to the root; none when there is no such folder."""
        return list(self.stat(folder))

    def stat(self, folder: str) -> dict[str, FileStat]:
        """Size and age of all files below a folder, by path relative to the root, sorted."""
        selector = pafs.FileSelector(f"{self._base}/{folder}", recursive=True, allow_not_found=True)
        prefix = len(self._base.rstrip("/")) + 1
        found = [info for info in self._fs.get_file_info(selector) if info.type == pafs.FileType.File]
        visible = [info for info in found if not info.base_name.startswith(".")]
        return {
            info.path[prefix:]: FileStat(info.size, info.mtime) for info in sorted(visible, key=lambda info: info.path)
        }

    def remove(self, folder: str) -> None:
        """Removes a folder and all below it; nothing happens when there is none."""
        if self._fs.get_file_info(f"{self._base}/{folder}").type != pafs.FileType.NotFound:
            try:
                self._fs.delete_dir(f"{self._base}/{folder}")
            except FileNotFoundError:  # another job on the same storage removed it first
                return

    def check_writable(self) -> None:
        """Fails early and clearly where nothing could be written later.

        Raises:
            MilanError: The root cannot be written.
        """
        self.put(f"{WORK}/writable", b"")

    # -- tables -----------------------------------------------------------------------------------------------

    def path(self, noun: Noun, **keys: str) -> str:
        """The file of one partition, relative to the root."""
        if set(keys) != set(noun.partition):
            raise KeyError(f"{noun.name} is partitioned by {noun.partition}, got {tuple(keys)}")
        folders = [f"{key}={quote(keys[key], safe=' ')}" for key in noun.partition]
        return "/".join([noun.name, *folders, FILE_NAME])

    def write(self, noun: Noun, table: pa.Table, config: str | Recipe, **keys: str) -> None:
        """Replaces one partition.

        Args:
            noun: Which table.
            table: Its rows (schema of the noun); its metadata goes into the file.
            config: What decided them; a hash alone where nobody will ask what changed.
            **keys: Values of the noun's partition keys.
        """
        if not table.schema.equals(noun.schema):
            raise ValueError(f"{noun.name}: schema differs: {table.schema} instead of {noun.schema}")
        if isinstance(config, str):
            stamp = {CONFIG_KEY: config}
        else:
            stamp = {CONFIG_KEY: config.hash, PARTS_KEY: json.dumps(config.parts, sort_keys=True)}
            if config.units:
                stamp |= {WHOLE_KEY: config.whole, UNITS_KEY: ",".join(map(str, config.units))}
        self.put(self.path(noun, **keys), to_parquet(table, stamp))

    def read(self, noun: Noun, columns: Sequence[str] | None = None, **keys: str) -> pa.Table:
        """Reads one partition.

        Raises:
            MilanError: It does not exist.
        """
        path = self.path(noun, **keys)
        try:
            return pq.read_table(f"{self._base}/{path}", columns=columns, filesystem=self._fs, partitioning=None)
        except FileNotFoundError as error:
            raise MilanError(f"{self.uri(path)} does not exist; run the stage that makes {noun.name} first.") from error

    def read_rows(self, noun: Noun, start: int, stop: int, columns: Sequence[str], **keys: str) -> pa.Table:
        """Rows ``start`` to ``stop - 1`` of one partition; of a long one only the row groups that hold them are read.

        Raises:
            MilanError: It does not exist.
        """
        self._present(noun, **keys)
        with self.open(self.path(noun, **keys)) as stream:
            file = pq.ParquetFile(stream)
            ends = list(accumulate(file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)))
            first, last = bisect_right(ends, start), bisect_left(ends, stop)
            before = ends[first - 1] if first else 0
            table = file.read_row_groups(range(first, last + 1), columns=list(columns))
            return table.slice(start - before, stop - start)

    def metadata(self, noun: Noun, **keys: str) -> dict[str, str] | None:
        """The file metadata of one partition, or None where there is no such partition."""
        return self.file_metadata(self.path(noun, **keys))

    def file_metadata(self, path: str) -> dict[str, str] | None:
        """The key-value metadata of a Parquet file, or None where there is none."""
        try:
            found = pq.read_schema(f"{self._base}/{path}", filesystem=self._fs).metadata or {}
        except FileNotFoundError:
            return None
        except pa.ArrowInvalid as error:
            raise MilanError(f"{self.uri(path)} is damaged ({error}); delete it and run the job again.") from error
        return {key.decode(): value.decode() for key, value in found.items() if key != b"ARROW:schema"}

    def is_current(self, noun: Noun, config: str, **keys: str) -> bool:
        """Whether one partition exists and was made under this very configuration: "is this done?"."""
        found = self.metadata(noun, **keys)
        return found is not None and found.get(CONFIG_KEY) == config

    def count(self, noun: Noun, **keys: str) -> int:
        """Rows of one partition, from its footer; 0 where there is no such partition."""
        try:
            return pq.read_metadata(f"{self._base}/{self.path(noun, **keys)}", filesystem=self._fs).num_rows
        except FileNotFoundError:
            return 0

    def why(self, noun: Noun, recipe: Recipe, **keys: str) -> str | None:
        """Why one partition has to be made: ``missing``, or which ingredients changed.

        None when it is current; where only some units are wanted, one with all of them will do.
        """
        found = self.metadata(noun, **keys)
        if found is None:
            return "missing"
        if found.get(CONFIG_KEY) in (recipe.hash, recipe.whole):
            return None
        old = json.loads(found.get(PARTS_KEY, "{}"))
        names = {**recipe.parts, **old}
        changed = [name for name in names if old.get(name) != recipe.parts.get(name)]
        return f"{', '.join(changed)} changed" if old else "made by an earlier version"

    def config_of(self, noun: Noun, **keys: str) -> str:
        """The configuration hash of one partition.

        Raises:
            MilanError: It does not exist.
        """
        return self._present(noun, **keys)[CONFIG_KEY]

    def whole_of(self, noun: Noun, **keys: str) -> str:
        """The configuration hash of one partition, or what it would be with all of the layer's units.

        Raises:
            MilanError: It does not exist.
        """
        found = self._present(noun, **keys)
        return found.get(WHOLE_KEY, found[CONFIG_KEY])

    def exemplars_of(self, noun: Noun, **keys: str) -> str | None:
        """The configuration hash of the exemplars that one partition speaks of; None where it does not say.

        Raises:
            MilanError: It does not exist.
        """
        return self._present(noun, **keys).get(EXEMPLARS_KEY)

    def _present(self, noun: Noun, **keys: str) -> dict[str, str]:
        found = self.metadata(noun, **keys)
        if found is None:
            path = self.uri(self.path(noun, **keys))
            raise MilanError(f"{path} does not exist; run the stage that makes {noun.name} first.")
        return found

    def partitions(self, noun: Noun, **where: str) -> list[dict[str, str]]:
        """The partitions that exist, as their key values, sorted.

        Args:
            noun: Which table.
            **where: Only partitions with these values.
        """
        found = []
        for file in self.files(noun.name):
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
        """Reads a work table back."""
        return pa.ipc.open_file(pa.BufferReader(self.get(f"{WORK}/{config}/{name}.arrow"))).read_all()

    def work_names(self, config: str, folder: str = "") -> list[str]:
        """The names of a configuration's finished work tables, below a folder of it."""
        prefix = f"{WORK}/{config}/"
        names = [path[len(prefix) :] for path in self.files(f"{prefix}{folder}".rstrip("/"))]
        return [name.removesuffix(".arrow") for name in names if name.endswith(".arrow")]

    def remove_work(self, config: str) -> None:
        """Removes a configuration's work, once its result is public."""
        self.remove(f"{WORK}/{config}")


def to_parquet(table: pa.Table, metadata: Mapping[str, str]) -> bytes:
    """A table as the bytes of a Parquet file: same table and metadata, same bytes."""
    stamped = {**(table.schema.metadata or {}), **{key.encode(): value.encode() for key, value in metadata.items()}}
    stamped = dict(sorted(stamped.items()))
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(stamped), buffer, compression="zstd", row_group_size=ROW_GROUP)
    return buffer.getvalue()


def _replace(target: Path, data: bytes | memoryview) -> None:
    """Writes a local file through a temporary neighbour, durably."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
