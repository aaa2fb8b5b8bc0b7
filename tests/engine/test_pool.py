"""Small jobs on threads of the driver: the same results as actors', without a Ray."""

from __future__ import annotations

import gc
import os
import platform
import resource
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch

from milan_ray.config import ExemplarConfig, Resources
from milan_ray.engine import cluster
from milan_ray.engine.actor_pool import Row, run_pool
from milan_ray.engine.cluster import FEW_PIECES, threads_here
from milan_ray.engine.model_cache import ModelCache
from milan_ray.engine.references import ModelRef, ProbeRef
from milan_ray.errors import MilanError
from milan_ray.schema import EXEMPLARS, LEVELS
from milan_ray.stages.exemplars import Exemplars
from milan_ray.storage import Storage, WorkRemovedError

PLUGIN = str(Path(__file__).resolve().parents[1] / "plugins/tiny_models.py")
CONFIG = ExemplarConfig(k=4, batch_size=16, shard_size=16)


def tables(storage: Storage) -> dict[str, bytes]:
    return {path: storage.get(path) for table in (EXEMPLARS, LEVELS) for path in storage.files(table.name)}


@pytest.mark.usefixtures("ray_session")
@pytest.mark.slow
def test_threads_and_actors_write_the_same_bytes(photos, tmp_path):
    found = []
    for actors in (None, 2):
        storage = Storage(tmp_path / str(actors))
        model = ModelRef("tiny/cnn", plugins=(PLUGIN,))
        Exemplars([model], ProbeRef((str(photos),)), CONFIG).run(storage, Resources(actors=actors))
        found.append(tables(storage))
    assert found[0] == found[1] and len(found[0]) == 6


SMALL = """
import sys
from milan_ray import runtime
runtime.prepare(None)
import ray
from milan_ray.config import ExemplarConfig, Resources
from milan_ray.engine.cluster import connected
from milan_ray.stages.exemplars import Exemplars
from milan_ray.engine.model_cache import ModelCache
from milan_ray.engine.references import ModelRef, ProbeRef
from milan_ray.storage import Storage
root, plugin, photos = sys.argv[1:]
with connected(Resources()):
    model, probe = ModelRef("tiny/cnn", plugins=(plugin,)), ProbeRef((photos,))
    Exemplars([model], probe, ExemplarConfig(k=4, batch_size=16, shard_size=16)).run(Storage(root), Resources())
    assert not ray.is_initialized() and "ray.data" not in sys.modules
    try:
        ray.get(ray.remote(lambda: 1).remote())
    except ray.exceptions.RaySystemError:  # Ray does not start by itself either
        print("done")
"""


@pytest.mark.slow
def test_small_job_never_starts_ray(photos, tmp_path):
    command = [sys.executable, "-c", SMALL, str(tmp_path), PLUGIN, str(photos)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout == "done\n", done.stderr
    assert Storage(tmp_path).partitions(EXEMPLARS, model="tiny/cnn")


class Faults:
    """Counts the pages that the system clears when a block of 16 MB is used again."""

    def __init__(self, threads: int) -> None:
        pass

    def __call__(self, row: Row) -> Row:
        for _ in range(2):
            before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
            b"x" * row["bytes"]
        return {"faults": resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's allocator")
def test_workers_use_their_freed_memory_again(monkeypatch: pytest.MonkeyPatch) -> None:
    size = 2**24
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    (here,) = run_pool(Faults, {"threads": 1}, [{"bytes": size}], Resources(), in_driver=True)
    assert here["faults"] < 100 < size // resource.getpagesize()
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")  # the user's own settings stay
    (here,) = run_pool(Faults, {"threads": 1}, [{"bytes": 2**27}], Resources(), in_driver=True)
    assert here["faults"] > 1000


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As inside :func:`connected` on a local Ray."""
    monkeypatch.setattr(cluster._own, "wanted", True)


@pytest.mark.usefixtures("own")
def test_actors_do_what_is_large_asked_for_or_on_gpus():
    assert threads_here(Resources(device="cpu"), FEW_PIECES) >= 1
    assert threads_here(Resources(device="cpu"), 1) == 1
    assert threads_here(Resources(device="cpu"), FEW_PIECES + 1) == 0
    assert threads_here(Resources(device="cpu", actors=1), 2) == 0
    assert threads_here(Resources(gpus_per_actor=0.5), 2) == 0


def test_actors_do_everything_on_a_cluster(monkeypatch):
    monkeypatch.setattr(cluster._own, "wanted", False)
    assert threads_here(Resources(device="cpu"), 2) == 0


class Worker:
    """Says which thread did a row; fails where the row says so."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self._thread = threading.get_ident()
        self.rows = 0

    def __call__(self, row: Row) -> Row:
        self.rows += 1
        if row["fails"] == "gone":
            raise WorkRemovedError("gone")
        if row["fails"]:
            raise MilanError("it failed; choose another.")
        assert threading.get_ident() == self._thread  # nobody else's worker
        return {"number": row["number"]}


@pytest.mark.usefixtures("own")
def test_every_row_is_done_once_by_a_thread_with_its_own_worker():
    before = torch.get_num_threads()
    rows = [{"number": number, "fails": False} for number in range(20)]
    answers = list(run_pool(Worker, {"threads": 1}, rows, Resources(device="cpu")))
    assert sorted(answer["number"] for answer in answers) == list(range(20))
    assert all(answer["seconds"] >= 0 for answer in answers)
    assert torch.get_num_threads() == before


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(("fails", "error"), [(True, MilanError), ("gone", WorkRemovedError)])
def test_failures_come_out_as_they_went_in(fails, error):
    rows = [{"number": number, "fails": fails if number == 3 else False} for number in range(8)]
    with pytest.raises(error, match=r"gone|it failed; choose another\."):
        list(run_pool(Worker, {"threads": 1}, rows, Resources(device="cpu")))


@pytest.mark.parametrize("rows", ["aaabbbccc", "aababbbccc", "aabacbcc", "abc", "aabbabb"], ids="{}".format)
def test_nothing_is_loaded_twice_when_two_waiting_rows_change_places(rows):
    loads: list[int] = []

    def load(index: int) -> str:
        loads.append(index)
        return chr(index)

    kept = ModelCache(load)
    assert "".join(kept(ord(row)) for row in rows) == rows
    assert "".join(map(chr, loads)) == "".join(dict.fromkeys(rows)) + ("a" if rows == "aabbabb" else "")


def test_one_thing_is_kept_when_it_is_asked_for_again():
    class Thing:
        """Something large."""

    kept = ModelCache(lambda index: Thing())
    first = weakref.ref(kept(0))
    kept(1)
    assert first() is not None
    kept(1)
    gc.collect()
    assert first() is None
