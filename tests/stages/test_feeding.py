"""Decoding in tasks of its own, for actors that hold GPUs: the same tables, and other processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from milan_ray.config import ExemplarConfig, Resources
from milan_ray.engine import references
from milan_ray.engine.cluster import on_gpus
from milan_ray.engine.references import ModelRef, ProbeRef
from milan_ray.exemplars import forward
from milan_ray.exemplars.read_shard import ReadShard
from milan_ray.models.view import View
from milan_ray.stages.exemplars import Exemplars, Run, store_manifest, worker
from milan_ray.stages.exemplars.worker import ShardReader
from milan_ray.stages.images import read_refs
from milan_ray.storage import Storage

PLUGINS = Path(__file__).resolve().parents[1] / "plugins"

SCRIPT = """
import json, sys
from pathlib import Path
from milan_ray import runtime
runtime.prepare(None)
import ray
from milan_ray.config import ExemplarConfig, Resources
from milan_ray.engine import actor_pool
from milan_ray.engine.references import ModelRef, ProbeRef
from milan_ray.stages.exemplars import Exemplars
from milan_ray.storage import Storage
photos, plugin, root, notes = sys.argv[1:]
actor_pool.WINDOW = 4  # of six shards
ray.init(num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False)
found = {}
for name, gpus in (("fed", 1), ("alone", 0)):
    storage = Storage(Path(root, name))
    model, config = ModelRef("seen/by", plugins=(plugin,)), ExemplarConfig(k=4, batch_size=16, shard_size=16)
    resources = Resources(actors=1, gpus_per_actor=gpus, device="cpu")
    done = Exemplars([model], ProbeRef((photos,)), config).run(storage, resources)
    assert not done.failed, done.failed
    found[name] = sorted(file.name for file in Path(notes).iterdir())
    for file in Path(notes).iterdir():
        file.unlink()
print(json.dumps(found))
"""


@pytest.mark.slow
def test_tasks_read_for_an_actor_with_a_gpu_and_the_tables_are_those_of_one_that_reads_itself(photos, tmp_path):
    """On a GPU that only Ray believes in; in two windows, each with an actor of its own; one image is damaged."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for file in photos.rglob("*.png"):
        (folder / file.name).write_bytes(b"no image" if file.name == "020.png" else file.read_bytes())
    notes = tmp_path / "notes"
    notes.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {"MILAN_TEST_SEEN": str(notes)}
    arguments = [str(folder), str(PLUGINS / "seen_by.py"), str(tmp_path), str(notes)]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], env=environment, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = {
        name: {did: {note.rpartition("-")[2] for note in notes if note.startswith(did)} for did in ("read", "ran")}
        for name, notes in json.loads(done.stdout.splitlines()[-1]).items()
    }
    for windows in found.values():
        assert len(windows["ran"]) >= 3  # an actor of each window, and the driver, which looks at the model
    actors = {name: windows["ran"] & windows["read"] for name, windows in found.items()}
    assert len(actors["fed"]) <= 1 < len(actors["alone"])  # the driver alone, which reads the views
    fed, alone = (Storage(tmp_path / name) for name in found)
    paths = [path for table in ("exemplars", "levels", "skipped") for path in fed.files(table)]
    assert len(paths) == 3 and all(fed.get(path) == alone.get(path) for path in paths)


@pytest.fixture
def reader(photos, tmp_path):
    """Makes a reader of shards of 32 photographs, and says where the probe and its rows are."""
    storage, source = Storage(tmp_path / "run"), ProbeRef((str(photos),))
    config = ExemplarConfig(k=4, batch_size=16, shard_size=32)
    manifest, digest = store_manifest(storage, source)
    model = ModelRef("tiny/cnn", plugins=(str(PLUGINS / "tiny_models.py"),))
    work = Exemplars([model], source, config).due(storage, digest, len(manifest))
    return ShardReader(**Run(storage, source, config, Resources()).arguments(work)), storage, source, work[0]


ROW = {"models": [0], "group": 0, "shard": 2, "start": 64, "images": 26}


def test_reader_reads_the_rows_of_its_shard(reader):
    read, storage, source, item = reader
    refs, found = read_refs(storage, item.probe, 64, 90), read(ROW)
    expected = forward.read_inputs(references.probe(source), refs, references.model(item.model))
    (batch,) = (batch for _, batch in ReadShard(found.array, found.facts).batches(refs, 100))
    assert batch.ids.tolist() == list(range(64, 90)) and batch.sha256 == expected.sha256
    assert (batch.views == expected.views).all()


def test_reader_leaves_to_the_worker_what_is_too_large_or_raises(reader, monkeypatch):
    read, *_ = reader
    monkeypatch.setattr(worker, "MOST_SHARED", 26 * 24 * 24 * 3 - 1)
    assert read(ROW) is None
    monkeypatch.setattr(worker, "MOST_SHARED", 26 * 24 * 24 * 3)
    assert read(ROW) is not None

    def fails(self, image):
        raise OSError("the disk is gone")

    monkeypatch.setattr(View, "__call__", fails)
    assert read(ROW) is None


def test_actors_hold_gpus_where_the_user_says_so_or_there_are_some(ray_session):
    assert on_gpus(Resources(gpus_per_actor=0.5, device="cpu"))
    assert not on_gpus(Resources(gpus_per_actor=0))
    assert not on_gpus(Resources(device="cpu"))


@pytest.mark.parametrize(("images", "size"), [(90, 128), (2000, 128), (4096, 512), (10**6, 1024)])
def test_shards_of_gpus_are_whole_passes_and_larger_for_larger_probes(images, size):
    assert ExemplarConfig().for_gpus(images).shard(images) == size
    assert ExemplarConfig(shard_size=48).for_gpus(images).shard(images) == 48
    assert ExemplarConfig().for_gpus(images).identity() == ExemplarConfig().identity()
