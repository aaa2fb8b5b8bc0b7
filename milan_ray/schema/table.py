"""Schema of a table: its name, documented columns and hive partition."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        name: The column's name.
        type: Its Arrow type.
        doc: Unit, shape and meaning, in one line.
        nullable: Whether nulls may occur.
        added: Whether a later version added it: files of earlier ones lack it and stay valid.
    """

    name: str
    type: pa.DataType
    doc: str
    nullable: bool = False
    added: bool = False


@dataclass(frozen=True)
class Table:
    """A table of the run directory.

    Attributes:
        name: The folder's name.
        partition: Hive keys of the folders below it, outermost first; each is also a string column of the file.
        columns: The table's columns, in file order.
        doc: What one row is.
    """

    name: str
    partition: tuple[str, ...]
    columns: tuple[Column, ...]
    doc: str

    @property
    def schema(self) -> pa.Schema:
        """The Arrow schema, with each column's meaning in its field metadata."""
        return pa.schema([pa.field(c.name, c.type, nullable=c.nullable, metadata={"doc": c.doc}) for c in self.columns])

    def check(self, schema: pa.Schema) -> None:
        """Checks that a file has this table's columns; further columns are ignored.

        Raises:
            pa.ArrowInvalid: A column is missing or has another type.
        """
        for column in self.columns:
            number = schema.get_field_index(column.name)
            if number < 0 and column.added:
                continue
            if number < 0:
                raise pa.ArrowInvalid(f"it has no column {column.name!r}")
            if schema.field(number).type != column.type:
                raise pa.ArrowInvalid(
                    f"its column {column.name!r} holds {schema.field(number).type} instead of {column.type}"
                )

    def table(self, columns: Mapping[str, Any], metadata: dict[str, str] | None = None, /, **keys: str) -> pa.Table:
        """Builds rows of this table from columns, and checks names and types.

        Args:
            columns: Column name → values.
            metadata: Key-value pairs for the file.
            **keys: Columns of one value, as a rule those of the partition.

        Raises:
            KeyError: A column is missing.
            pa.ArrowInvalid: A value does not fit its column's type.
        """
        if keys:
            rows = len(next(iter(columns.values())))
            columns = {**columns, **{name: [value] * rows for name, value in keys.items()}}
        extra = set(columns) - {c.name for c in self.columns}
        if extra:
            raise KeyError(f"{self.name} has no column {sorted(extra)}")
        arrays = []
        for column in self.columns:
            values = columns[column.name]
            if isinstance(values, pa.Array | pa.ChunkedArray):
                arrays.append(values.cast(column.type))
            else:
                arrays.append(pa.array(values, type=column.type))
        return pa.Table.from_arrays(arrays, schema=self.schema.with_metadata(metadata))


EXPERIMENT = Column("experiment", pa.string(), "name of the experiment")
MODEL = Column("model", pa.string(), "registered name of the model")

LAYER = (MODEL, Column("layer", pa.string(), "module path of the layer inside the model"))
UNIT = (*LAYER, Column("unit", pa.int32(), "channel index in the layer"))
"""The columns that name a layer, or a unit, in tables that stages make."""

STUDIED_LAYER = (MODEL, Column("layer", pa.string(), "module path of the layer"))
STUDIED_UNIT = (*STUDIED_LAYER, Column("unit", pa.int32(), "number of the unit in its layer"))
"""The same columns in tables that studies make."""
