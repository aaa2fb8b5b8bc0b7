"""Jobs that extend the same block of views at the same time lose nothing, however their steps fall."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from milan_ray.config import ExemplarConfig, Resources
from milan_ray.engine.references import ModelRef, ProbeRef, model, probe
from milan_ray.probe.manifest import digest as probe_digest
from milan_ray.schema import MANIFEST, VIEWS
from milan_ray.stages import images as views
from milan_ray.stages.exemplars import describe_model
from milan_ray.stages.images import ExemplarImages, ensure_views
from milan_ray.storage import Storage

PLUGIN = str(Path(__file__).resolve().parents[1] / "plugins/tiny_models.py")
CNN = ModelRef("tiny/cnn", plugins=(PLUGIN,))


class Interrupted(Storage):
    """Something else happens before a certain write of views."""

    def __init__(self, root: str, happens: Callable[[], None]) -> None:
        super().__init__(root)
        self._happens: Callable[[], None] | None = happens

    def write(self, table, rows, config, **keys):
        if table is VIEWS and self._happens is not None:
            happens, self._happens = self._happens, None
            happens()
        super().write(table, rows, config, **keys)


@pytest.fixture
def pictures(photos, tmp_path) -> ExemplarImages:
    source = ProbeRef((str(photos),))
    images = probe(source)
    manifest = images.manifest()
    digest, config = probe_digest(manifest), ExemplarConfig()
    Storage(tmp_path).write(MANIFEST, manifest, digest, probe=digest)
    return ExemplarImages(source, digest, describe_model(model(CNN), images, digest, config).view, CNN, config)


def extend(storage: Storage, pictures: ExemplarImages, ids: range | list[int]) -> None:
    ensure_views(storage, pictures, list(ids), Resources())


def stored(storage: Storage) -> list[int]:
    return [i for keys in storage.partitions(VIEWS) for i in storage.read(VIEWS, **keys)["image_id"].to_pylist()]


def test_views_of_a_job_that_reads_before_and_writes_after_another_are_all_there(pictures, tmp_path):
    storage = Storage(tmp_path)
    extend(Interrupted(str(tmp_path), lambda: extend(storage, pictures, range(20, 40))), pictures, range(30))
    assert stored(storage) == list(range(40))


def test_views_written_by_one_job_or_by_many_are_the_same_bytes(pictures, tmp_path):
    storage, alone = Storage(tmp_path), Storage(tmp_path / "alone")
    alone.write(MANIFEST, storage.read(MANIFEST, probe=pictures.digest), pictures.digest, probe=pictures.digest)
    rng = np.random.default_rng(0)
    wanted = [sorted(rng.choice(90, 15, replace=False).tolist()) for _ in range(6)]
    jobs = [threading.Thread(target=extend, args=(storage, pictures, ids)) for ids in wanted]
    for each in jobs:
        each.start()
    for each in jobs:
        each.join()
    extend(alone, pictures, sorted(set().union(*wanted)))
    assert stored(storage) == sorted(set().union(*wanted))
    (keys,) = storage.partitions(VIEWS)
    path = storage.path(VIEWS, **keys)
    assert storage.get(path) == alone.get(path)


def test_views_announcement_goes_when_nobody_else_is_there_and_else_after_a_day(pictures, tmp_path, monkeypatch):
    storage = Storage(tmp_path)
    extend(storage, pictures, range(5))
    board = views._board(storage, pictures)
    assert storage.files(board) == []
    storage.put(f"{board}/of-a-job-that-was-killed.json", json.dumps([50]).encode())
    extend(storage, pictures, range(8))
    assert stored(storage) == [*range(8), 50]
    assert len(storage.files(board)) == 2
    monkeypatch.setattr(views, "FORGET", timedelta(0))
    extend(storage, pictures, range(9))
    assert storage.files(board) == []
