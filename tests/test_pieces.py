"""Pieces of work: one object of several tables, of which one is read alone; a listing tells what is done."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from reads import Reads

from milan_ray.storage import Storage, WorkRemovedError
from milan_ray.storage.pieces import piece_name

IMAGES = pa.table({"path": ["a.png", None]}).replace_schema_metadata({"seconds": "1.5"})
EMPTY = pa.table({"unit": pa.array([], pa.int32())})


def large(seed: int) -> pa.Table:
    """A megabyte that does not become smaller."""
    return pa.table({"maps": np.random.default_rng(seed).random(2**17)})


def put(storage: Storage, shard: str, parts: dict[str, pa.Table], *more: str) -> str:
    storage.put_piece("work", shard, [*parts, *more], parts.items())
    return piece_name(shard, [*parts, *more])


@pytest.fixture
def storage(tmp_path) -> Storage:
    return Storage(tmp_path)


@pytest.fixture
def read(storage) -> list[int]:
    """The number of bytes of every read, in a list that grows."""
    sizes: list[int] = []
    storage._fs = Reads(storage._fs, sizes)
    return sizes


def test_parts_come_back_from_one_object(storage):
    piece = put(storage, "000001", {"L0": large(0), "L1": EMPTY, "images": IMAGES})
    assert storage.files("_work") == [f"_work/work/{piece}.parts"]
    for name, table in (("L0", large(0)), ("L1", EMPTY), ("images", IMAGES)):
        found = storage.get_part("work", piece, name)
        assert found.equals(table) and found.schema.equals(table.schema, check_metadata=True)
    storage.remove_work("work")
    with pytest.raises(WorkRemovedError, match="is gone; run the job again"):
        storage.get_part("work", piece, "L0")


def test_a_part_is_read_without_the_others(storage, read):
    piece = put(storage, "000001", {"L0": large(0), "L1": large(1), "images": IMAGES})
    storage.get_part("work", piece, "images")
    assert read == [2**15]  # with the index
    storage.get_part("work", piece, "L1")
    assert len(read) == 3 and 2**20 < read[2] < 2**20 + 2**10
    small = put(storage, "000002", {"L0": EMPTY, "images": IMAGES})
    read.clear()
    storage.get_part("work", small, "L0")
    assert len(read) == 1 and read[0] < 2**11


def test_an_index_of_any_length_is_read(storage, read):
    parts = {f"a part with a rather long name, number {n}": EMPTY for n in range(1000)}
    piece = put(storage, "000001", parts)
    assert storage.get_part("work", piece, list(parts)[500]).equals(EMPTY)
    assert read[0] == 2**15 and read[1] > 2**15


def test_a_listing_tells_which_shards_have_some_parts(storage, read):
    assert storage.pieces_with("work", ["images"]) == {}
    both = put(storage, "000001", {"L0": EMPTY, "images": IMAGES}, "L1")  # L1 came out empty
    one = put(storage, "000001", {"L0": EMPTY, "images": IMAGES})
    other = put(storage, "000002", {"L0": EMPTY, "images": IMAGES})
    third = put(storage, "000003", {"L1": EMPTY, "images": IMAGES})
    storage.put_work("work", "winners/L0", EMPTY)
    assert storage.pieces_with("work", ["images", "L0"]) == {"000001": one, "000002": other}
    assert len(read) == 2  # an index of each of the two other folders
    read.clear()
    assert storage.pieces_with("work", ["L1", "L0", "images"]) == {"000001": both}
    assert storage.pieces_with("work", ["images"]).keys() == {"000001", "000002", "000003"}
    assert storage.pieces_with("work", ["L1"]) == {"000001": both, "000003": third}
    assert storage.pieces_with("work", ["L2"]) == storage.pieces_with("other", ["L0"]) == {}


def test_a_shard_s_name_may_have_folders(storage):
    piece = put(storage, "0/one", {"L0": EMPTY})
    other = put(storage, "1/one", {"L0": EMPTY})
    assert storage.pieces_with("work", ["L0"]) == {"0/one": piece, "1/one": other}
    storage.put_piece("work/masks", "one", ["L0"], {"L0": IMAGES}.items())  # apart from those
    assert storage.pieces_with("work", ["L0"]) == {"0/one": piece, "1/one": other}
    assert storage.get_part("work/masks", piece_name("one", ["L0"]), "L0").equals(IMAGES)
    storage.remove_work("work")
    assert storage.files("_work") == []


def test_a_damaged_piece_is_removed_wherever_the_damage_lies(storage, tmp_path):
    rng = random.Random(0)
    piece = put(storage, "000001", {"L0": large(0).slice(0, 50), "images": IMAGES})
    file = Path(tmp_path, f"_work/work/{piece}.parts")
    whole = file.read_bytes()
    bits = [bytearray(whole) for _ in range(60)]
    for copy in bits:
        copy[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
    for torn in (b"", b"torn", whole[:-1], whole[1:], whole[: len(whole) // 2], whole + b"more", *map(bytes, bits)):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(torn)
        removed = 0
        for part in ("L0", "images"):
            try:
                storage.get_part("work", piece, part)
            except WorkRemovedError:
                removed += 1
        assert removed and not file.exists()
    file.write_bytes(b"torn")
    assert storage.pieces_with("work", ["L0"]) == {}  # of other parts, so its index is looked at


@pytest.mark.parametrize("ahead", [1, 3, 16])
def test_parts_of_an_object_store_are_read_ahead_in_order(storage, tmp_path, monkeypatch, ahead):
    monkeypatch.setattr(storage, "is_local", False)
    tables = [pa.table({"number": [n]}) for n in range(20)]
    monkeypatch.setattr(storage, "put", Storage(tmp_path).put)
    pieces = [put(storage, f"{n:06d}", {"L0": table}) for n, table in enumerate(tables)]
    taken: list[str] = []
    get_part = storage.get_part

    def counting(config: str, piece: str, part: str, known: None) -> pa.Table:
        taken.append(piece)
        return get_part(config, piece, part, known)

    monkeypatch.setattr(storage, "get_part", counting)
    found = storage.get_parts("work", pieces, "L0", ahead)
    assert next(found).equals(tables[0])
    assert len(taken) <= ahead
    assert [table["number"][0].as_py() for table in found] == [*range(1, 20)]
    storage.remove_file(f"_work/work/{pieces[7]}.parts")
    with pytest.raises(WorkRemovedError):
        list(storage.get_parts("work", pieces, "L0", ahead))
