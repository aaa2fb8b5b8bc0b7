"""Parquet files of tables: their bytes, their metadata, and the checks before their content is used."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from milan_ray.config import Fingerprint
from milan_ray.errors import DamagedTable
from milan_ray.schema import Table
from milan_ray.storage.files import job_again
from milan_ray.tensorfiles import check_groups

CONFIG_KEY = "milan_ray.config"
"""Metadata key: hash of the configuration that made a file."""

INPUTS_KEY = "milan_ray.parts"
"""Metadata key: digests of that configuration's inputs, as JSON."""

UNITS_KEY = "milan_ray.units"
"""Metadata key: the units that a file was made for, where these are not all."""

ALL_UNITS_KEY = "milan_ray.whole"
"""Metadata key: hash that the configuration would have with all units, where a file is for some."""

EXEMPLARS_KEY = "milan_ray.exemplars"
"""Metadata key: configuration hash of the exemplars that a file was made from."""

CONTRASTS_KEY = "milan_ray.contrasts"
"""Metadata key: configuration hash, of all units, of the contrasts that a label was made with."""

ORDER_KEY = "milan_ray.order"
"""Metadata key of exemplars: the layer's place among the modules of its model."""

ROW_GROUP = 2**14
"""Rows that are read together at least: a worker needs its few rows of a long manifest."""


class Entries(dict[str, str]):
    """Metadata of a file; looking up an entry that is missing raises an error that names the file.

    Args:
        entries: The metadata.
        where: The file's address.
        path: The file, relative to the run directory.
        what: The table to make again, for the message.
    """

    def __init__(self, entries: Mapping[str, str], *, where: str, path: str, what: str) -> None:
        super().__init__(entries)
        self._where, self._path, self._what = where, path, what

    def __bool__(self) -> bool:
        return True  # a file without metadata differs from no file

    def __missing__(self, key: str) -> str:
        raise DamagedTable(
            f"{self._where} is damaged (its metadata lack {key!r}); delete it and run {job_again(self._what)}.",
            self._path,
        )


def metadata_of(config: str | Fingerprint) -> dict[str, str]:
    """The metadata that say which configuration made a file."""
    if isinstance(config, str):
        return {CONFIG_KEY: config}
    metadata = {CONFIG_KEY: config.hash, INPUTS_KEY: json.dumps(config.inputs, sort_keys=True)}
    if config.units:
        metadata |= {ALL_UNITS_KEY: config.all_units, UNITS_KEY: ",".join(map(str, config.units))}
    return metadata


def inputs_of(metadata: Mapping[str, str]) -> dict[str, str]:
    """The inputs' digests in a file's metadata; empty where there are none, or they cannot be read."""
    try:
        inputs = json.loads(metadata.get(INPUTS_KEY, "{}"))
    except ValueError:
        return {}
    return inputs if isinstance(inputs, dict) else {}


def to_parquet(rows: pa.Table, metadata: Mapping[str, str]) -> bytes:
    """Rows as the bytes of a Parquet file: same rows and metadata, same bytes."""
    own = {key.encode(): value.encode() for key, value in metadata.items()}
    rows = rows.replace_schema_metadata(dict(sorted({**(rows.schema.metadata or {}), **own}.items())))
    buffer = io.BytesIO()
    pq.write_table(rows, buffer, compression="zstd", row_group_size=ROW_GROUP, write_page_checksum=True)
    return buffer.getvalue()


def open_parquet(stream: pa.NativeFile, table: Table, buffered: bool) -> pq.ParquetFile:
    """Opens a Parquet file and checks its footer before anything is allocated for its rows.

    Args:
        stream: The file.
        table: The table that it must hold.
        buffered: Whether to read column chunks ahead, which saves requests to an object store.

    Raises:
        pa.ArrowInvalid: The footer is damaged or claims more than the file holds, the columns are not the table's, or
            the metadata do not say which configuration made it.
    """
    file = pq.ParquetFile(stream, page_checksum_verification=True, pre_buffer=buffered)
    check_groups(file.metadata, stream.size())
    table.check(file.schema_arrow)
    if CONFIG_KEY.encode() not in (file.schema_arrow.metadata or {}):
        raise pa.ArrowInvalid(f"its metadata lack {CONFIG_KEY!r}")
    return file


def checked(rows: pa.Table, table: Table, names: Sequence[str]) -> pa.Table:
    """The columns of rows that were read, in the order asked for.

    Raises:
        pa.ArrowInvalid: A text is not valid, or a value is missing in a column that allows no nulls.
    """
    rows = rows.select(names)
    rows.validate(full=True)
    for column in table.columns:
        if not column.nullable and column.name in rows.column_names and rows[column.name].null_count:
            raise pa.ArrowInvalid(f"column {column.name!r} has rows without a value")
    return rows
