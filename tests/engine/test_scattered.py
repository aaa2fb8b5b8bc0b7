"""Rows of outputs by shard: one object per output, of which shards read their own."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from reads import Reads

from milan_ray.engine.scattered import Scattered
from milan_ray.storage import Storage, WorkRemovedError


@pytest.mark.parametrize("local", [True, False])
def test_scattered_rows_come_back_by_shard_and_an_index_is_read_once(tmp_path, monkeypatch, local):
    storage = Storage(tmp_path)
    rows = {f"{n:04d}": pa.table({"number": [n] * 20}) for n in range(700)}
    for number in range(3):
        Scattered(storage, "work").put(number, rows.items())
    assert len(storage.files("_work/work")) == 3
    monkeypatch.setattr(storage, "is_local", local)
    reader = Scattered(storage, "work")
    sizes: list[int] = []
    monkeypatch.setattr(storage, "_fs", Reads(storage._fs, sizes))
    for shard in ("0000", "0350", "0699", "0001"):
        found = list(reader.get([2, 0], shard))
        assert [number for number, _ in found] == [2, 0]
        assert all(table.equals(rows[shard]) for _, table in found)
    assert sum(size > 2**14 for size in sizes) == 2  # the end, with the index, of each of two objects
    assert len(sizes) <= 2 * 4 + 2


def test_scattered_rows_that_are_gone_or_written_again_are_not_mistaken(tmp_path):
    storage = Storage(tmp_path)
    reader = Scattered(storage, "work")
    for size in (20, 3000, 10):  # parts lie elsewhere than the index says that the reader knows
        rows = {f"{n:04d}": pa.table({"number": np.random.default_rng(n).random(size)}) for n in range(9)}
        Scattered(storage, "work").put(0, rows.items())
        for shard in ("0008", "0003"):
            ((_, table),) = reader.get([0], shard)
            assert table.equals(rows[shard])
    storage.remove_work("work")
    with pytest.raises(WorkRemovedError):
        list(reader.get([0], "0003"))
