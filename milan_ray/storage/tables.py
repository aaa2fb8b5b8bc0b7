"""Tables: one Parquet file per partition, replaced whole, with the fingerprint of its content in the metadata."""

from __future__ import annotations

import mmap
import os
import re
import tempfile
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import IO, TypeVar
from urllib.parse import quote, unquote

import pyarrow as pa
import pyarrow.parquet as pq

from milan_ray.config import Fingerprint
from milan_ray.errors import DamagedTable, MilanError
from milan_ray.progress import say
from milan_ray.schema import EXEMPLARS, Table
from milan_ray.storage.files import Files
from milan_ray.storage.parquet import (
    ALL_UNITS_KEY,
    CONFIG_KEY,
    EXEMPLARS_KEY,
    ORDER_KEY,
    Entries,
    checked,
    inputs_of,
    metadata_of,
    open_parquet,
    to_parquet,
)

Result = TypeVar("Result")

FILE_NAME = "data.parquet"
"""Name of every partition's file."""

_READERS = 16
"""Files of an object store whose footers are read at once."""


class Tables(Files):
    """Files with partitions of tables among them."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        super().__init__(root)
        self._warned: set[str] = set()

    def path(self, table: Table, **keys: str) -> str:
        """The file of one partition, relative to the root.

        Values are quoted: each is one folder, whatever characters it has, and no two share one.
        """
        if set(keys) != set(table.partition):
            raise KeyError(f"{table.name} is partitioned by {table.partition}, got {tuple(keys)}")
        folders = [f"{key}={quote(keys[key], safe=' ')}" for key in table.partition]
        return "/".join([table.name, *folders, FILE_NAME])

    # -- writing ----------------------------------------------------------------------------------------------

    def write(self, table: Table, rows: pa.Table, config: str | Fingerprint, **keys: str) -> None:
        """Replaces one partition.

        Args:
            table: Which table.
            rows: Its rows, in the table's schema; their metadata goes into the file.
            config: Fingerprint of the rows; a hash alone where nobody will ask what changed.
            **keys: Values of the partition keys.
        """
        if not rows.schema.equals(table.schema):
            raise ValueError(f"{table.name}: schema differs: {rows.schema} instead of {table.schema}")
        self.put(self.path(table, **keys), to_parquet(rows, metadata_of(config)))

    def write_stream(
        self,
        table: Table,
        pieces: Iterable[pa.Table],
        config: str | Fingerprint,
        metadata: Mapping[str, str],
        **keys: str,
    ) -> None:
        """Replaces one partition of any size, with one piece in memory at a time.

        The file is complete on this machine's disk before it takes its place: by a rename locally, on an object store
        by one PUT out of a memory map.

        Args:
            table: Which table.
            pieces: Its rows, in the table's schema; each piece becomes a row group.
            config: Fingerprint of the rows, as for :meth:`write`.
            metadata: Key-value pairs for the file.
            **keys: Values of the partition keys.

        Raises:
            MilanError: The file cannot be written.
        """
        path = self.path(table, **keys)
        schema = table.schema.with_metadata(dict(sorted({**metadata, **metadata_of(config)}.items())))

        def fill(stream: IO[bytes]) -> None:
            with pq.ParquetWriter(stream, schema, compression="zstd", write_page_checksum=True) as writer:
                for piece in pieces:
                    writer.write_table(piece)

        if self.is_local:
            self._replace(path, fill)
            return
        with tempfile.TemporaryFile() as spool:
            fill(spool)
            spool.flush()
            self.put(path, memoryview(mmap.mmap(spool.fileno(), 0, access=mmap.ACCESS_READ)))

    # -- reading ----------------------------------------------------------------------------------------------

    def read(self, table: Table, columns: Sequence[str] | None = None, **keys: str) -> pa.Table:
        """Reads one partition.

        Raises:
            MilanError: It does not exist.
            DamagedTable: It cannot be read, or holds another table.
        """
        path = self.path(table, **keys)
        names = table.schema.names if columns is None else list(columns)
        try:
            return self._parquet(path, table, lambda file: checked(file.read(names, use_threads=True), table, names))
        except FileNotFoundError as error:
            raise self._missing(table, path) from error

    def read_rows(self, table: Table, start: int, stop: int, columns: Sequence[str], **keys: str) -> pa.Table:
        """Reads rows ``start`` to ``stop - 1`` of one partition, as far as it has them; only their row groups are read.

        Raises:
            MilanError: It does not exist.
            DamagedTable: It cannot be read, or holds another table.
        """
        self._present(table, **keys)
        names = list(columns)

        def rows(file: pq.ParquetFile) -> pa.Table:
            ends = list(accumulate(file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)))
            first, last = bisect_right(ends, start), min(bisect_left(ends, stop), len(ends) - 1)
            before = ends[first - 1] if first else 0
            groups = file.read_row_groups(range(first, last + 1), columns=names)
            return checked(groups, table, names).slice(start - before, stop - start)

        return self._parquet(self.path(table, **keys), table, rows)

    def stream(self, table: Table, columns: Sequence[str] | None = None, **keys: str) -> Iterator[pa.Table]:
        """Yields the rows of one partition in their order, a row group at a time, for tables larger than memory.

        Raises:
            MilanError: It does not exist.
            DamagedTable: It cannot be read, or holds another table.
        """
        self._present(table, **keys)
        path = self.path(table, **keys)
        names = table.schema.names if columns is None else list(columns)
        with self.open(path) as stream:
            with self.intact(path, table.name):
                file = open_parquet(stream, table, not self.is_local)
            for group in range(file.num_row_groups):
                with self.intact(path, table.name):
                    piece = checked(file.read_row_group(group, columns=names), table, names)
                yield piece

    def count(self, table: Table, **keys: str) -> int:
        """Rows of one partition, from its footer; 0 where there is no such partition."""
        try:
            return self._parquet(self.path(table, **keys), table, lambda file: file.metadata.num_rows)
        except FileNotFoundError:
            return 0

    def _parquet(self, path: str, table: Table, read: Callable[[pq.ParquetFile], Result]) -> Result:
        """Reads from one version of a table's Parquet file, whose footer and columns are checked first.

        Raises:
            FileNotFoundError: There is no such file.
            DamagedTable: It cannot be read, or holds another table.
        """

        def opened(target: str) -> Result:
            with self.intact(path, table.name), self._fs.open_input_file(target) as stream:
                return read(open_parquet(stream, table, not self.is_local))

        return self._read_version(path, opened)

    # -- metadata ---------------------------------------------------------------------------------------------

    def metadata(self, table: Table, **keys: str) -> dict[str, str] | None:
        """The file metadata of one partition, or None where there is no such partition.

        Raises:
            DamagedTable: Its footer cannot be read, or it holds another table; or, at look-up, an entry is missing.
        """

        def entries(file: pq.ParquetFile) -> dict[str, str]:
            metadata = file.schema_arrow.metadata or {}
            return {key.decode(): value.decode() for key, value in metadata.items() if key != b"ARROW:schema"}

        path = self.path(table, **keys)
        try:
            return Entries(self._parquet(path, table, entries), where=self.uri(path), path=path, what=table.name)
        except FileNotFoundError:
            return None

    def is_current(self, table: Table, config: str, **keys: str) -> bool:
        """Whether one partition exists and was made under this configuration: "is this done?"."""
        metadata = self._footer(table, **keys)
        return isinstance(metadata, dict) and metadata.get(CONFIG_KEY) == config

    def why(self, table: Table, fingerprint: Fingerprint, **keys: str) -> str | None:
        """Why one partition has to be made: ``missing``, ``damaged``, or which inputs changed.

        None when it is current; where only some units are wanted, a partition with all units is current too.
        """
        metadata = self._footer(table, **keys)
        if isinstance(metadata, str):
            return metadata
        if metadata.get(CONFIG_KEY) in (fingerprint.hash, fingerprint.all_units):
            return None
        old = inputs_of(metadata)
        names = {**fingerprint.inputs, **old}
        changed = [name for name in names if old.get(name) != fingerprint.inputs.get(name)]
        return f"{', '.join(changed)} changed" if old else "made by an earlier version"

    def _footer(self, table: Table, **keys: str) -> dict[str, str] | str:
        """The file metadata of one partition; ``missing`` or, with one warning, ``damaged`` where there are none."""
        try:
            metadata = self.metadata(table, **keys)
        except DamagedTable:
            path = self.path(table, **keys)
            if path not in self._warned:
                self._warned.add(path)
                say(f"{self.uri(path)} is damaged: it counts as missing, and is made anew", level="warning")
            return "damaged"
        return "missing" if metadata is None else metadata

    def config_of(self, table: Table, **keys: str) -> str:
        """The configuration hash of one partition.

        Raises:
            MilanError: It does not exist.
        """
        return self._present(table, **keys)[CONFIG_KEY]

    def all_units_of(self, table: Table, **keys: str) -> str:
        """The configuration hash that one partition has, or would have with all of the layer's units.

        Raises:
            MilanError: It does not exist.
        """
        metadata = self._present(table, **keys)
        return metadata.get(ALL_UNITS_KEY, metadata[CONFIG_KEY])

    def exemplars_of(self, table: Table, **keys: str) -> str | None:
        """The configuration hash of the exemplars that one partition was made from; None where it does not say.

        Raises:
            MilanError: It does not exist.
        """
        return self._present(table, **keys).get(EXEMPLARS_KEY)

    def _present(self, table: Table, **keys: str) -> dict[str, str]:
        metadata = self.metadata(table, **keys)
        if metadata is None:
            raise self._missing(table, self.path(table, **keys))
        return metadata

    def _missing(self, table: Table, path: str) -> MilanError:
        return MilanError(f"{self.uri(path)} does not exist; run the stage that makes {table.name} first.")

    # -- partitions -------------------------------------------------------------------------------------------

    def partitions(self, table: Table, **where: str) -> list[dict[str, str]]:
        """The partitions that exist, damaged ones too, as their key values, sorted.

        Args:
            table: Which table.
            **where: Only partitions with these values.
        """
        partitions = []
        for file in self._list(table.name):
            *folders, name = file.split("/")[1:]
            if name != FILE_NAME or len(folders) != len(table.partition):
                continue
            keys = {}
            for folder in folders:
                key, _, value = folder.partition("=")
                keys[key] = unquote(value)
            if tuple(keys) == table.partition and all(keys[key] == value for key, value in where.items()):
                partitions.append(keys)
        return partitions

    def in_model_order(self, partitions: Iterable[Mapping[str, str]]) -> list[dict[str, str]]:
        """Sorts partitions by their keys, but layers by their order in the model.

        The metadata of the model's exemplars hold that order. Where one of the layers has none, the layers' names
        decide, with the numbers in them compared by value.

        Args:
            partitions: Keys of partitions, ``model`` and ``layer`` among them.
        """
        chosen = [dict(keys) for keys in partitions]
        layers: dict[str, set[str]] = {}
        for keys in chosen:
            layers.setdefault(keys["model"], set()).add(keys["layer"])
        ranks = {
            model: {layer: rank for rank, layer in enumerate(self.layers_in_order(model, names))}
            for model, names in layers.items()
        }

        def rank(keys: dict[str, str]) -> tuple[str | int, ...]:
            return tuple(ranks[keys["model"]][value] if name == "layer" else value for name, value in keys.items())

        return sorted(chosen, key=rank)

    def layers_in_order(self, model: str, layers: Iterable[str]) -> list[str]:
        """Sorts layers of a model by their order in it, as :meth:`in_model_order` does."""
        names = sorted(set(layers), key=natural)
        with ThreadPoolExecutor(1 if self.is_local else _READERS) as threads:
            places = list(threads.map(lambda layer: self._place_of(model, layer), names))
        known = [place for place in places if place is not None]
        if len(known) < len(names):
            return names
        return [names[n] for n in sorted(range(len(names)), key=lambda n: (known[n], n))]

    def _place_of(self, model: str, layer: str) -> int | None:
        """A layer's place among the modules of its model; None where it is not known."""
        try:
            place = (self.metadata(EXEMPLARS, model=model, layer=layer) or {}).get(ORDER_KEY, "")
        except MilanError:  # the file is damaged; whoever reads its rows says so
            return None
        return int(place) if place.isdecimal() else None


def natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key that puts ``layer10`` after ``layer9``."""
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in re.split(r"(\d+)", name)]
