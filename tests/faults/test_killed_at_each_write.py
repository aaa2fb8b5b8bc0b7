"""A job that is killed at each of its writes in turn, started again, leaves what an undisturbed one does.

Every stage runs in this process, on threads, with a storage that dies at its n-th write or removal and does nothing any
more after that, as a killed process. What happens before a write is what happens after the one before.
"""

from __future__ import annotations

import io
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count, cycle
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from damage import damage, tables

from milan_ray.errors import MilanError
from milan_ray.schema import (
    RUNS,
    Table,
)
from milan_ray.storage import CONFIG_KEY, Storage


class Killed(BaseException):
    """The process is gone: no handler of errors sees this."""


class Dying(Storage):
    """Dies at its n-th write or removal, which is done by half, and takes no other after that.

    Attributes:
        done: Writes and removals so far.
    """

    def __init__(self, root: str, last: int, error: type[BaseException] = Killed) -> None:
        super().__init__(root)
        self._last, self.done, self._lock, self._error = last, 0, threading.Lock(), error

    def __reduce__(self):
        raise AssertionError("nothing here travels to another process")

    @contextmanager
    def _write(self, path: str, half: Callable[[Path], None]) -> Iterator[None]:
        with self._lock:  # one at a time, so that none is half done when another one dies
            self.done += 1
            if self.done == self._last and self._error is Killed:
                half(Path(self.root, path))
            if self.done >= self._last:
                raise self._error("cannot write: no space left on device; choose another --storage.")
            yield

    @property
    def died(self) -> bool:
        return self.done >= self._last

    def put(self, path, data):
        with self._write(path, _torso):
            super().put(path, data)

    def write_stream(self, table, pieces, config, metadata, **keys):
        everything = list(pieces)  # what its rows write comes first
        with self._write(self.path(table, **keys), _torso):
            super().write_stream(table, everything, config, metadata, **keys)

    def remove(self, folder):
        if Path(self.root, folder).exists():
            with self._write(folder, _remove_one):
                super().remove(folder)

    def remove_file(self, path):
        with self._write(path, lambda path: None):
            super().remove_file(path)


def _torso(path: Path) -> None:
    """What a kill between the first byte and the rename leaves."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.parent / f".{path.name}.torso.tmp").write_bytes(b"PAR1")


def _remove_one(folder: Path) -> None:
    next(path for path in sorted(folder.rglob("*")) if path.is_file()).unlink()


def public(root: Path) -> dict[str, bytes]:
    """All files, but the table of runs and what jobs ask of each other's views, which is forgotten after a while."""
    found = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    return {path: data for path, data in found.items() if not path.startswith("runs/") and "/wanted/" not in path}


def runs(root: Path) -> dict[str, dict[str, object]]:
    """The table of runs, without moments and what something took."""
    storage = Storage(root)
    return {
        storage.path(RUNS, **keys): {
            name: value
            for name, value in storage.read(RUNS, **keys).to_pylist()[0].items()
            if name in ("stage", "run", "model", "layer", "rows", "versions")
        }
        for keys in storage.partitions(RUNS)
    }


def assert_recorded(root: Path, tables: dict[Table, str]) -> None:
    """Every table that there is has its row of runs."""
    storage = Storage(root)
    recorded = {(keys["stage"], keys["run"]) for keys in storage.partitions(RUNS)}
    for table, stage in tables.items():
        for keys in storage.partitions(table):
            made = storage.metadata(table, **keys)
            assert made is not None
            assert (stage or keys["labeler"], made[CONFIG_KEY]) in recorded, (table.name, keys)


FAST = {
    "photographs": (
        "exemplars",
        "masks",
        "encodings",
        "descriptions",
        "comparison",
        "training",
        "tuning",
        "image embeddings",
        "text embeddings",
    ),
    "fields": ("labels", "clip-dissect", "scores", "cosy", "rating draws"),
    "published": ("import",),
}
LONG = {
    "photographs": ("reranking", "contrast"),
    "scenes": ("dnd",),
    "found": ("dnd-probe",),
    "experiments": ("analysis", "editing", "pasting"),
}
EVERY = [pytest.param(world, name) for world, names in FAST.items() for name in names]
EVERY += [pytest.param(world, name, marks=pytest.mark.slow) for world, names in LONG.items() for name in names]


@pytest.mark.parametrize(("world", "name"), EVERY)
def test_killed_at_each_write_in_turn(before_and_after, tmp_path, world, name):
    before, after, stage = before_and_after(world, name)
    expected, recorded = public(after), runs(after)
    for last in count(1):
        root = tmp_path / str(last)
        shutil.copytree(before, root)
        dying = Dying(str(root), last)
        try:
            stage.run(dying)
        except Killed:
            assert_recorded(root, stage.tables)
        else:
            assert not dying.died, "a kill was swallowed"
            break
        stage.run(Storage(root))
        found = public(root)
        assert found.keys() == expected.keys(), (last, found.keys() ^ expected.keys())
        assert [path for path in expected if found[path] != expected[path]] == [], last
        assert runs(root) == recorded, last
        assert not (root / "_work").exists(), last
        shutil.rmtree(root)
    assert last > 3


@pytest.mark.parametrize(("world", "name"), EVERY)
def test_work_is_gone_whichever_way_the_job_before_ended(before_and_after, tmp_path, world, name):
    """Full disk, Ctrl-C, and work that a job left behind whose tables somebody else has made since."""
    before, after, stage = before_and_after(world, name)
    shutil.copytree(before, tmp_path / "counted")
    counting = Dying(str(tmp_path / "counted"), 10**9)
    stage.run(counting)
    assert not (tmp_path / "counted/_work").exists()
    for error in (MilanError, KeyboardInterrupt):
        root = tmp_path / error.__name__
        shutil.copytree(before, root)
        with suppress(error, AssertionError):  # or models that failed, which their stages here take for a defect
            stage.run(Dying(str(root), counting.done // 2 + 1, error))
        left = root / "_work"
        if left.exists():
            done = tmp_path / f"{error.__name__} done"
            shutil.copytree(after, done)
            shutil.copytree(left, done / "_work")
            stage.run(Storage(done))
            assert not (done / "_work").exists(), "the tables were up to date"
            assert public(done) == public(after)
        stage.run(Storage(root))
        assert not left.exists()
        assert public(root) == public(after)


def judged(files: dict[str, bytes], damaged: Path) -> dict[str, object]:
    """What must be as ever where one file is damaged.

    Not what a label cost, which follows the tables on its way, and leaves out, and says so, what is damaged of them;
    nor the hash of a comparison, of which costs are a part.
    """
    kept = {path: data for path, data in files.items() if path != str(damaged) and "comparison%3A cost" not in path}
    return {
        path: repr(pq.read_table(io.BytesIO(data)).to_pylist()) if "comparison%3A" in path else data
        for path, data in kept.items()
    }


STUDIED = [
    ("photographs", "comparison"),
    ("photographs", "tuning"),
    ("photographs", "training"),
    *(pytest.param(world, name, marks=pytest.mark.slow) for world in ("experiments", "scenes") for name in LONG[world]),
]


KINDS = ("other_columns", "emptied", "cut", "other_footer")
"""Kinds of damage that a reader meets in the same way whatever the table is: each table has one of them."""


@pytest.mark.parametrize("kinds", [("other_pages",), pytest.param(KINDS, marks=pytest.mark.slow)], ids="-".join)
@pytest.mark.parametrize(("world", "name"), STUDIED)
def test_damaged_tables_of_studies_are_made_anew_or_named(before_and_after, tmp_path, world, name, kinds):
    """Of every table there is, before the stage and after it: what comes out is right, or a sentence."""
    before, after, stage = before_and_after(world, name)
    expected, turn = public(after), cycle(kinds)
    for number, where in enumerate((before, after)):
        for table, file in tables(Storage(where)).items():
            path = file.relative_to(where)
            root = tmp_path / f"{number} {table}"
            shutil.copytree(where, root)
            damage(root / path, next(turn))
            try:
                stage.run(Storage(root))
            except MilanError as error:
                assert str(path) in str(error) and "is damaged" in str(error) and "delete it" in str(error), error
            except AssertionError as error:  # the models that failed, and why
                assert str(path) in str(error) and "delete it" in str(error), error
            else:
                assert judged(public(root), path) == judged(expected, path), table
            shutil.rmtree(root)
