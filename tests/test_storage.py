"""The run directory: atomic files, "is this done?", partitions of any name, work tables."""

from __future__ import annotations

import itertools
import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from milan_ray.config import Fingerprint
from milan_ray.errors import MilanError
from milan_ray.schema import LEVELS, RUNS, SKIPPED
from milan_ray.storage import CONFIG_KEY, Storage, WorkRemovedError, to_parquet

ODD_NAMES = (
    "tiny/cnn",
    "a b",
    "50%",
    "k=v",
    "ünïcödé/模型",
    "0",
    "007",
    "1.5",
    "2020-01-01",
    "..",
    "a%2Fb",
    "true",
    "~+&?#",
)


def levels(model: str = "tiny/cnn", layer: str = "0", units: int = 3) -> pa.Table:
    columns = {
        "model": [model] * units,
        "layer": [layer] * units,
        "unit": range(units),
        "level": [unit / 7 for unit in range(units)],
        "positions": [100] * units,
        "nonfinite": [0] * units,
        "exact": [True] * units,
    }
    return LEVELS.table(columns, {"probe": "p"})


def entries(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


# -- files --------------------------------------------------------------------------------------------------------


def test_put_while_another_thread_reads_shows_it_whole_files_only(tmp_path):
    storage = Storage(tmp_path)
    versions = [bytes([value]) * size for value, size in ((1, 300_000), (2, 100), (3, 70_000))]
    storage.put("a/file", versions[0])
    seen: set[bytes] = set()
    failures: list[Exception] = []
    ready, finished = threading.Event(), threading.Event()

    def read() -> None:
        try:
            while not finished.is_set():
                seen.add(storage.get("a/file"))
                assert storage.exists("a/file")
                assert storage.files("a") == ["a/file"]
                ready.set()
        except Exception as error:
            failures.append(error)
            ready.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert ready.wait(60)
    for version in itertools.islice(itertools.cycle(versions), 300):
        storage.put("a/file", version)
    finished.set()
    reader.join()
    assert not failures
    assert seen <= set(versions)
    assert len(seen) > 1
    assert entries(tmp_path) == ["a/file"]


def test_put_on_a_full_disk_keeps_the_old_file_and_leaves_no_other(tmp_path):
    """The kernel refuses the write half way, as on a full disk; Python ignores the signal that comes with it."""
    script = """
import resource, sys
from milan_ray.config import Fingerprint
from milan_ray.errors import MilanError
from milan_ray.storage import Storage
storage = Storage(sys.argv[1])
storage.put("folder/file", b"old")
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
for path in ("folder/file", "folder/new"):
    try:
        storage.put(path, b"x" * 2**20)
    except MilanError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert str(tmp_path / "folder/file") in first
    assert str(tmp_path / "folder/new") in second
    assert "File too large" in first
    assert entries(tmp_path) == ["folder/file"]
    assert (tmp_path / "folder/file").read_bytes() == b"old"


def test_put_below_a_file_is_a_milan_error_and_harms_nothing(tmp_path):
    storage = Storage(tmp_path)
    storage.put("blocked", b"old")
    with pytest.raises(MilanError, match=r"cannot write .*blocked/deep/file"):
        storage.put("blocked/deep/file", b"new")
    assert storage.get("blocked") == b"old"
    assert entries(tmp_path) == ["blocked"]


def test_put_in_place_of_a_folder_is_a_milan_error_and_leaves_no_temporary_file(tmp_path):
    storage = Storage(tmp_path)
    storage.put("folder/file", b"old")
    with pytest.raises(MilanError, match="cannot write"):
        storage.put("folder", b"new")
    assert entries(tmp_path) == ["folder/file"]


def test_put_makes_files_that_others_may_read(tmp_path):
    Storage(tmp_path).put("file", b"x")
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644


def test_get_of_a_missing_file_raises_file_not_found(tmp_path):
    with pytest.raises(FileNotFoundError):
        Storage(tmp_path).get("nothing")
    assert not Storage(tmp_path).exists("nothing")


def test_files_leave_out_hidden_and_temporary_ones(tmp_path):
    storage = Storage(tmp_path)
    for path in ("t/b/data.parquet", "t/a/data.parquet", "t/a/other", "u/x"):
        storage.put(path, b"")
    (tmp_path / "t/a/.abc.tmp").write_bytes(b"torso")
    (tmp_path / "t/.DS_Store").write_bytes(b"")
    assert storage.files("t") == ["t/a/data.parquet", "t/a/other", "t/b/data.parquet"]
    assert storage.files("t/b") == ["t/b/data.parquet"]
    assert storage.files("nothing") == []
    assert storage.files("") == ["t/a/data.parquet", "t/a/other", "t/b/data.parquet", "u/x"]


def test_remove_takes_a_folder_and_nothing_else(tmp_path):
    storage = Storage(tmp_path)
    for path in ("a/b/c", "a/b2", "ab"):
        storage.put(path, b"")
    storage.remove("a/b")
    assert storage.files("") == ["a/b2", "ab"]
    storage.remove("a/b")
    storage.remove("never was")
    assert storage.files("") == ["a/b2", "ab"]


# -- roots --------------------------------------------------------------------------------------------------------


def test_storage_of_a_relative_path_does_not_follow_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    storage = Storage("run")
    monkeypatch.chdir("/")
    storage.put("file", b"x")
    assert entries(tmp_path) == ["run/file"]
    assert storage.uri("file") == str(tmp_path / "run/file")
    assert storage.uri() == storage.root == str(tmp_path / "run")


def test_storage_survives_pickling(tmp_path):
    for root in (str(tmp_path / "run"), tmp_path.as_uri()):
        storage = Storage(root)
        copy = pickle.loads(pickle.dumps(storage))
        storage.put("file", b"x")
        assert copy.get("file") == b"x"
        assert copy.root == storage.root
        assert copy.is_local == storage.is_local


@pytest.mark.parametrize("root", ["nope://bucket/run", "://bucket", "s3:/ /x://"])
def test_storage_of_an_unknown_scheme_is_a_milan_error(root):
    with pytest.raises(MilanError, match=r"cannot open|names no bucket"):
        Storage(root)


def test_storage_of_a_file_uri_is_the_path(tmp_path):
    storage = Storage(f"{tmp_path.as_uri()}/new")
    storage.write(LEVELS, levels(), "hash", model="tiny/cnn", layer="0")
    assert storage.is_local
    assert storage.root == str(tmp_path / "new")
    assert Storage(tmp_path / "new").read(LEVELS, model="tiny/cnn", layer="0").equals(levels())


def test_storage_on_an_object_store_holds_tables_and_work():
    """Arrow's file system in memory; unlike object stores it wants folders to be made."""
    storage = Storage("mock://bucket/run")
    for folder in ("levels/model=tiny%2Fcnn/layer=0", "_work/one/L0"):
        storage._fs.create_dir(f"{storage._base}/{folder}")
    assert storage.partitions(LEVELS) == []
    storage.write(LEVELS, levels(), "hash", model="tiny/cnn", layer="0")
    assert not storage.is_local
    assert storage.uri("levels") == "mock://bucket/run/levels"
    assert storage.files("levels") == ["levels/model=tiny%2Fcnn/layer=0/data.parquet"]
    assert storage.partitions(LEVELS) == [{"model": "tiny/cnn", "layer": "0"}]
    assert storage.is_current(LEVELS, "hash", model="tiny/cnn", layer="0")
    assert storage.read(LEVELS, model="tiny/cnn", layer="0").equals(levels())
    assert storage.metadata(LEVELS, model="tiny/cnn", layer="1") is None
    storage.put_work("one", "L0/000000", levels())
    assert storage.get_work("one", "L0/000000").equals(levels())
    assert storage.work_names("one", "L0") == ["L0/000000"]
    storage.remove_work("one")
    storage.remove("levels")
    assert storage.files("") == []


def test_check_writable_fails_before_any_work_is_done(tmp_path):
    Storage(tmp_path / "new").check_writable()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(MilanError, match="choose a writable --storage"):
        Storage(tmp_path / "file/run").check_writable()


# -- tables -------------------------------------------------------------------------------------------------------


def test_write_then_read_gives_the_same_table_and_columns(tmp_path):
    storage = Storage(tmp_path)
    storage.write(LEVELS, levels(), "hash", model="tiny/cnn", layer="0")
    found = storage.read(LEVELS, model="tiny/cnn", layer="0")
    assert found.equals(levels())
    assert found.schema.equals(LEVELS.schema)
    assert found.schema.field("level").metadata[b"doc"].startswith("η".encode())
    assert storage.read(LEVELS, ["unit"], model="tiny/cnn", layer="0").to_pydict() == {"unit": [0, 1, 2]}


def test_write_of_another_nouns_table_is_refused(tmp_path):
    with pytest.raises(ValueError, match="skipped: schema differs"):
        Storage(tmp_path).write(SKIPPED, levels(), "hash", model="tiny/cnn")
    assert entries(tmp_path) == []


def test_write_of_a_null_where_none_may_be_is_refused(tmp_path):
    columns = {"model": ["m"], "image_id": [1], "path": [None], "reason": ["empty"]}
    with pytest.raises(pa.ArrowInvalid, match="path"):
        Storage(tmp_path).write(SKIPPED, SKIPPED.table(columns), "hash", model="m")
    assert entries(tmp_path) == []


def test_read_of_a_missing_partition_says_what_to_do(tmp_path):
    with pytest.raises(MilanError, match="does not exist; run the stage that makes levels first"):
        Storage(tmp_path).read(LEVELS, model="m", layer="0")


@pytest.mark.parametrize(
    "keys", [{}, {"model": "m"}, {"model": "m", "layer": "0", "unit": "1"}, {"model": "m", "l": "0"}]
)
def test_path_with_other_keys_than_the_partitions_raises_key_error(tmp_path, keys):
    with pytest.raises(KeyError, match="partitioned by"):
        Storage(tmp_path).path(LEVELS, **keys)


def test_is_current_only_for_the_very_configuration(tmp_path):
    storage = Storage(tmp_path)
    keys = {"model": "tiny/cnn", "layer": "0"}
    assert not storage.is_current(LEVELS, "one", **keys)
    assert storage.metadata(LEVELS, **keys) is None
    storage.write(LEVELS, levels(), "one", **keys)
    assert storage.is_current(LEVELS, "one", **keys)
    assert not storage.is_current(LEVELS, "two", **keys)
    assert not storage.is_current(LEVELS, "one", model="tiny/cnn", layer="1")
    storage.write(LEVELS, levels(), "two", **keys)
    assert storage.is_current(LEVELS, "two", **keys)
    assert not storage.is_current(LEVELS, "one", **keys)
    assert storage.metadata(LEVELS, **keys) == {"probe": "p", CONFIG_KEY: "two"}


def test_is_current_of_a_file_that_nobody_stamped_is_false(tmp_path):
    storage = Storage(tmp_path)
    storage.put(storage.path(LEVELS, model="m", layer="0"), to_parquet(levels("m"), {}))
    assert not storage.is_current(LEVELS, "hash", model="m", layer="0")


@settings(max_examples=40, deadline=None)
@given(
    model=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20), layer=st.sampled_from(ODD_NAMES)
)
@example(model="\0\n\r\t", layer="0")
@example(model="'\"\\:*?<>|", layer="0")
def test_partitions_of_any_name_are_found_again(tmp_path_factory, model, layer):
    storage = Storage(tmp_path_factory.mktemp("storage"))
    storage.write(LEVELS, levels(model, layer), "hash", model=model, layer=layer)
    assert storage.partitions(LEVELS) == [{"model": model, "layer": layer}]
    assert storage.read(LEVELS, model=model, layer=layer)["layer"].to_pylist() == [layer] * 3
    assert storage.is_current(LEVELS, "hash", model=model, layer=layer)
    assert storage.path(LEVELS, model=model, layer=layer).count("/") == 3


def test_partitions_are_sorted_filtered_and_of_one_noun(tmp_path):
    storage = Storage(tmp_path)
    for model, layer in (("b/x", "1"), ("a", "2"), ("b/x", "0"), ("a", "10")):
        storage.write(LEVELS, levels(model, layer), "hash", model=model, layer=layer)
    storage.put("levels/notes.txt", b"")
    storage.put("levels/model=a/layer=2/backup.parquet", b"")
    storage.put("levels/layer=2/model=a/data.parquet", b"")
    assert storage.partitions(LEVELS, model="b/x") == [{"model": "b/x", "layer": "0"}, {"model": "b/x", "layer": "1"}]
    assert [keys["layer"] for keys in storage.partitions(LEVELS)] == ["10", "2", "0", "1"]
    assert storage.partitions(LEVELS, model="a", layer="2") == [{"model": "a", "layer": "2"}]
    assert storage.partitions(LEVELS, model="none") == []
    assert storage.partitions(RUNS) == []


def test_polars_reads_partitions_back_as_the_names_they_were(tmp_path):
    storage = Storage(tmp_path)
    for name in ODD_NAMES:
        storage.write(LEVELS, levels(name, "0"), "hash", model=name, layer="0")
    for hive in (None, True):
        frame = pl.read_parquet(f"{tmp_path}/levels/**/*.parquet", hive_partitioning=hive)
        assert frame.schema["model"] == frame.schema["layer"] == pl.String
        assert set(frame["model"]) == set(ODD_NAMES)
        assert set(frame["layer"]) == {"0"}
        assert len(frame) == 3 * len(ODD_NAMES)
    lazy = pl.scan_parquet(f"{tmp_path}/levels/**/*.parquet", hive_partitioning=True)
    for name in ODD_NAMES:
        assert len(lazy.filter(pl.col("model") == name, pl.col("layer") == "0").collect()) == 3, name


def test_to_parquet_of_the_same_table_gives_the_same_bytes():
    table = levels(units=5000)
    pieces = pa.concat_tables([levels(units=5000).slice(0, 777), levels(units=5000).slice(777)])
    expected = to_parquet(table, {"a": "1", "b": "2"})
    assert to_parquet(levels(units=5000), {"b": "2", "a": "1"}) == expected
    assert to_parquet(pieces, {"a": "1", "b": "2"}) == expected
    assert to_parquet(table, {"a": "1", "b": "3"}) != expected


def test_write_twice_leaves_the_same_bytes_and_one_file(tmp_path):
    storage = Storage(tmp_path)
    keys = {"model": "m", "layer": "0"}
    storage.write(LEVELS, levels("m"), "hash", **keys)
    before = storage.get(storage.path(LEVELS, **keys))
    storage.write(LEVELS, levels("m"), "hash", **keys)
    assert storage.get(storage.path(LEVELS, **keys)) == before
    assert len(entries(tmp_path)) == 1


# -- work in progress ---------------------------------------------------------------------------------------------


def test_work_tables_come_back_and_go_with_their_configuration(tmp_path):
    storage = Storage(tmp_path)
    table = pa.table(
        {"name": ["a", None], "map": pa.array([b"\0\xff", b""], pa.large_binary())}
    ).replace_schema_metadata({"k": "v"})
    for name in ("L1/000001", "L0/000001", "L0/000000", "images/000000"):
        storage.put_work("one", name, table)
    storage.put_work("two", "L0/000000", table.slice(0, 0))
    found = storage.get_work("one", "L0/000001")
    assert found.equals(table)
    assert found.schema.metadata == {b"k": b"v"}
    assert storage.work_names("one") == ["L0/000000", "L0/000001", "L1/000001", "images/000000"]
    assert storage.work_names("one", "L0") == ["L0/000000", "L0/000001"]
    assert storage.work_names("three") == storage.work_names("one", "L2") == []
    assert len(storage.get_work("two", "L0/000000")) == 0
    storage.remove_work("one")
    storage.remove_work("one")
    assert storage.work_names("one") == []
    assert storage.work_names("two") == ["L0/000000"]
    with pytest.raises(WorkRemovedError, match="is gone; run the job again"):
        storage.get_work("one", "L0/000001")


def test_nothing_is_left_of_work(tmp_path):
    storage, work = Storage(tmp_path), tmp_path / "_work"
    storage.check_writable()
    assert list(tmp_path.iterdir()) == []
    storage.put_work("one", "L0/000000", levels())
    storage.put_work("two", "L0/000000", levels())
    storage.check_writable()
    storage.remove_work("one")
    assert os.listdir(work) == ["two"]
    storage.remove_work("two")
    assert not work.exists()
    storage.remove_work("two")


def test_what_a_killed_writer_left_goes_and_what_a_living_one_writes_stays(tmp_path):
    storage, keys = Storage(tmp_path), {"model": "tiny/cnn", "layer": "0"}
    storage.check_writable()
    folder = (tmp_path / storage.path(LEVELS, **keys)).parent
    for place in (folder, tmp_path / "_work"):
        place.mkdir(parents=True)
        (place / ".a.tmp").write_bytes(b"PAR1")

    def pieces():
        """Other writers are done while one is at it."""
        storage.write(LEVELS, levels(), "others", **keys)
        assert len(list(folder.glob(".*.tmp"))) == 1
        storage.check_writable()
        yield levels()

    storage.write_stream(LEVELS, pieces(), "own", {}, **keys)
    assert storage.config_of(LEVELS, **keys) == "own"
    assert os.listdir(folder) == ["data.parquet"] and not (tmp_path / "_work").exists()


def test_writers_of_work_and_removers_of_its_folder_do_not_meet(tmp_path):
    def work(number: int) -> None:
        storage = Storage(tmp_path)
        for turn in range(30):
            storage.check_writable()
            storage.put_work(str(number), f"{turn}/{turn}", levels())
            assert storage.get_work(str(number), f"{turn}/{turn}").num_rows
            storage.remove_work(str(number))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))
    assert list(tmp_path.iterdir()) == []


def test_work_is_never_met_by_a_glob_for_tables(tmp_path):
    storage = Storage(tmp_path)
    storage.put_work("one", "levels/000000", levels())
    storage.check_writable()
    assert not list(tmp_path.rglob("*.parquet"))
    assert storage.partitions(LEVELS) == []
    assert os.listdir(tmp_path) == ["_work"]


# -- fingerprints ------------------------------------------------------------------------------------------------------


def test_why_names_the_ingredients_that_changed(tmp_path):
    storage, keys = Storage(tmp_path), {"model": "tiny/cnn", "layer": "0"}
    fingerprint = Fingerprint.of({"weights": "a", "k": 3})
    assert storage.why(LEVELS, fingerprint, **keys) == "missing"
    storage.write(LEVELS, levels(), fingerprint, **keys)
    assert storage.why(LEVELS, fingerprint, **keys) is None
    assert storage.is_current(LEVELS, fingerprint.hash, **keys)
    assert storage.why(LEVELS, Fingerprint.of({"weights": "b", "k": 3}), **keys) == "weights changed"
    assert storage.why(LEVELS, Fingerprint.of({"weights": "b", "k": 4}), **keys) == "weights, k changed"
    assert storage.why(LEVELS, Fingerprint.of({"weights": "a", "k": 3, "λ": 0.2}), **keys) == "λ changed"
    storage.write(LEVELS, levels(), "an older hash", **keys)
    assert storage.why(LEVELS, fingerprint, **keys) == "made by an earlier version"


def test_why_takes_all_units_for_some_but_not_some_for_all(tmp_path):
    storage, keys = Storage(tmp_path), {"model": "tiny/cnn", "layer": "0"}
    whole, some = Fingerprint.of({"k": 3}), Fingerprint.of({"k": 3}, (0, 2))
    storage.write(LEVELS, levels(), whole, **keys)
    assert storage.why(LEVELS, some, **keys) is None
    storage.write(LEVELS, levels(units=2), some, **keys)
    assert storage.why(LEVELS, some, **keys) is None
    assert storage.why(LEVELS, whole, **keys) == "units changed"
    assert storage.why(LEVELS, Fingerprint.of({"k": 3}, (1,)), **keys) == "units changed"
    assert storage.config_of(LEVELS, **keys) == some.hash and storage.all_units_of(LEVELS, **keys) == whole.hash


@pytest.mark.parametrize(
    ("start", "stop"), [(0, 5), (16_380, 16_390), (16_384, 16_385), (40_000, 50_000), (49_999, 50_000)]
)
def test_read_rows_across_row_groups_equals_a_slice(tmp_path, start, stop):
    storage, keys = Storage(tmp_path), {"model": "tiny/cnn", "layer": "0"}
    table = levels(units=50_000)
    storage.write(LEVELS, table, "hash", **keys)
    assert storage.read_rows(LEVELS, start, stop, ["unit"], **keys)["unit"].to_pylist() == list(range(start, stop))
    assert storage.count(LEVELS, **keys) == 50_000
    with pytest.raises(MilanError, match="does not exist"):
        storage.read_rows(LEVELS, 0, 1, ["unit"], model="other", layer="0")


# -- streams ------------------------------------------------------------------------------------------------------


def test_write_stream_then_stream_gives_the_pieces_back(tmp_path):
    storage, keys = Storage(tmp_path), {"model": "tiny/cnn", "layer": "0"}
    fingerprint, pieces = Fingerprint.of({"k": 3}), [levels(units=units) for units in (3, 1, 5)]
    storage.write_stream(LEVELS, iter(pieces), fingerprint, {"probe": "p"}, **keys)
    assert [piece.to_pylist() for piece in storage.stream(LEVELS, **keys)] == [piece.to_pylist() for piece in pieces]
    assert [piece.column_names for piece in storage.stream(LEVELS, ["unit"], **keys)] == [["unit"]] * 3
    entries = storage.metadata(LEVELS, **keys)
    assert storage.why(LEVELS, fingerprint, **keys) is None and entries is not None and entries["probe"] == "p"
    assert len(storage.read(LEVELS, **keys)) == storage.count(LEVELS, **keys) == 9
    with pytest.raises(MilanError, match="run the stage that makes levels first"):
        next(storage.stream(LEVELS, model="none", layer="0"))


def test_write_stream_that_breaks_off_keeps_the_old_file_and_leaves_no_other(tmp_path):
    storage, keys = Storage(tmp_path), {"model": "tiny/cnn", "layer": "0"}
    storage.write(LEVELS, levels(), "old", **keys)
    before = entries(tmp_path)

    def pieces():
        yield levels()
        raise MilanError("one shard is gone")

    with pytest.raises(MilanError, match="one shard is gone"):
        storage.write_stream(LEVELS, pieces(), "new", {}, **keys)
    assert storage.is_current(LEVELS, "old", **keys) and entries(tmp_path) == before
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(MilanError, match="choose a writable --storage"):
        Storage(tmp_path / "file/run").write_stream(LEVELS, [levels()], "new", {}, **keys)


def test_write_stream_puts_a_whole_file_on_an_object_store():
    storage, keys = Storage("mock://bucket/run"), {"model": "tiny/cnn", "layer": "0"}
    storage._fs.create_dir(f"{storage._base}/levels/model=tiny%2Fcnn/layer=0")
    storage.write_stream(LEVELS, (levels(units=units) for units in (4, 2)), "hash", {}, **keys)
    assert [len(piece) for piece in storage.stream(LEVELS, **keys)] == [4, 2]
    assert storage.is_current(LEVELS, "hash", **keys)


def test_write_stream_into_a_folder_that_other_jobs_remove_writes_all_pieces_once(tmp_path):
    storage, keys = Storage(tmp_path), {"model": "tiny/cnn", "layer": "0"}
    taken = []

    def pieces():
        for units in (4, 2, 3):
            taken.append(units)
            yield levels(units=units)
            storage.remove("levels")

    storage.write_stream(LEVELS, pieces(), "hash", {}, **keys)
    assert taken == [4, 2, 3] and [len(piece) for piece in storage.stream(LEVELS, **keys)] == taken
    assert entries(tmp_path) == [storage.path(LEVELS, **keys)]


def test_write_stream_whose_pieces_are_not_found_writes_nothing(tmp_path):
    storage, keys = Storage(tmp_path), {"model": "tiny/cnn", "layer": "0"}

    def pieces():
        yield levels()
        storage.get("nothing")

    with pytest.raises(MilanError, match="cannot write"):
        storage.write_stream(LEVELS, pieces(), "hash", {}, **keys)
    assert entries(tmp_path) == []
