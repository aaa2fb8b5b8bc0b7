"""Every table of the run directory: documented, hive-partitioned by its own columns, and strict about what goes in."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from milan_ray import schema
from milan_ray.schema import EXEMPLARS, LEVELS, MANIFEST, SKIPPED, TABLES, TRIALS, Table

by_table = pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)

ROW = {"model": ["m"], "image_id": [1], "path": ["p"], "reason": ["empty"]}


def test_nouns_have_distinct_names_and_are_all_exported():
    assert len({table.name for table in TABLES}) == len(TABLES)
    exported = {table.name for name in schema.__all__ if isinstance(table := getattr(schema, name), Table)}
    assert exported == {table.name for table in TABLES}
    assert all(not table.name.startswith(("_", ".")) for table in TABLES)


@by_table
def test_noun_is_partitioned_by_required_string_columns_of_its_own(table):
    assert table.partition
    columns = {column.name: column for column in table.columns}
    assert len(columns) == len(table.columns)
    # A manifest's key is the digest of its own rows, a scores table's the evaluation's name.
    own = () if table is MANIFEST else table.partition
    for key in own:
        assert columns[key].type == pa.string(), key
        assert not columns[key].nullable, key


@by_table
def test_noun_and_its_columns_say_what_they_are(table):
    assert table.doc.endswith(".")
    assert [field.name for field in table.schema if not field.metadata[b"doc"].strip()] == []
    assert all("\n" not in column.doc for column in table.columns)


@by_table
def test_noun_of_no_rows_round_trips(table):
    rows = table.table({column.name: [] for column in table.columns}, {"k": "v"})
    assert len(rows) == 0
    assert rows.schema.equals(table.schema)
    assert rows.schema.metadata == {b"k": b"v"}


def test_table_takes_lists_arrays_and_numpy_alike():
    expected = SKIPPED.table(ROW)
    assert SKIPPED.table({**ROW, "image_id": np.array([1])}).equals(expected)
    assert SKIPPED.table({**ROW, "image_id": pa.array([1], pa.int32())}).equals(expected)
    assert SKIPPED.table({**ROW, "path": pa.chunked_array([["p"], []])}).equals(expected)
    assert SKIPPED.table(dict(reversed(ROW.items()))).equals(expected)


@pytest.mark.parametrize("missing", ROW)
def test_table_without_a_column_raises_key_error(missing):
    with pytest.raises(KeyError, match=missing):
        SKIPPED.table({name: values for name, values in ROW.items() if name != missing})


def test_table_with_an_unknown_column_raises_key_error():
    with pytest.raises(KeyError, match=r"skipped has no column.*layer"):
        SKIPPED.table({**ROW, "layer": ["0"]})


@pytest.mark.parametrize(
    "change",
    [
        {"image_id": ["one"]},
        {"image_id": [2**63]},
        {"image_id": pa.array(["one"])},
        {"image_id": pa.array([1.5])},
        {"path": [1]},
        {"path": [b"\xff"]},
        {"model": ["m", "m"]},
    ],
    ids=lambda change: " ".join(change),
)
def test_table_of_values_that_do_not_fit_raises(change):
    with pytest.raises((pa.ArrowInvalid, pa.ArrowTypeError, OverflowError)):
        SKIPPED.table({**ROW, **change})


@pytest.mark.parametrize(("table", "column"), [(EXEMPLARS, "rank"), (LEVELS, "unit")])
def test_table_of_integers_too_large_for_their_column_raises(table, column):
    columns = {c.name: pa.nulls(1, c.type) for c in table.columns}
    with pytest.raises(pa.ArrowInvalid):
        table.table({**columns, column: pa.array([2**31])})


def test_file_of_an_earlier_version_without_an_added_column_is_valid_and_without_another_is_not():
    assert [column.name for column in TRIALS.columns if column.added] == ["mu"]
    TRIALS.check(TRIALS.schema.remove(TRIALS.schema.get_field_index("mu")))
    with pytest.raises(pa.ArrowInvalid, match="no column 'chosen'"):
        TRIALS.check(TRIALS.schema.remove(TRIALS.schema.get_field_index("chosen")))
    wrong = TRIALS.schema.set(TRIALS.schema.get_field_index("mu"), pa.field("mu", pa.string()))
    with pytest.raises(pa.ArrowInvalid, match="'mu' holds string"):
        TRIALS.check(wrong)
