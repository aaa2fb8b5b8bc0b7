"""A job whose work in progress is finished and removed by another one, at the worst moment, ends as if alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from milan_ray.config import ExemplarConfig, Resources
from milan_ray.engine.references import ModelRef, ProbeRef
from milan_ray.engine.stage import run_stage
from milan_ray.schema import ENCODINGS, EXEMPLARS, LEVELS, SKIPPED, VIEWS, Table
from milan_ray.stages.captioners import EncoderRef
from milan_ray.stages.encodings import Encodings
from milan_ray.stages.exemplars import Exemplars
from milan_ray.storage import Storage

PLUGIN = str(Path(__file__).resolve().parents[1] / "plugins/tiny_models.py")
CNN = ModelRef("tiny/cnn", plugins=(PLUGIN,))
ENCODER = EncoderRef("tiny", plugins=(PLUGIN,))
LAYERS = {"tiny/cnn": ("0", "2", "6")}


class Overtaken(Storage):
    """Something else happens before a certain step of the driver, once; workers know nothing of it."""

    def __init__(self, root: str, step: str, happens: Callable[[], object]) -> None:
        super().__init__(root)
        self._step = step
        self._happens: Callable[[], object] | None = happens
        self._listed = 0

    def __reduce__(self):
        return (Storage, (self.root,))

    def _reached(self, step: str) -> None:
        if step == self._step and self._happens is not None:
            happens, self._happens = self._happens, None
            happens()

    def write(self, table, rows, config, **keys):
        super().write(table, rows, config, **keys)
        self._reached(table.name)

    def pieces_with(self, config, parts):
        found = super().pieces_with(config, parts)
        self._listed += 1
        self._reached(f"listing {self._listed}")
        return found


def exemplars(storage: Storage, photos: Path, budget: int) -> None:
    config = ExemplarConfig(k=4, batch_size=16, shard_size=40, map_budget=budget)
    Exemplars([CNN], ProbeRef((str(photos),)), config).run(storage, Resources())


def assert_equal(found: Storage, expected: Storage, tables: Sequence[Table]) -> None:
    for table in tables:
        assert found.partitions(table) == expected.partitions(table)
        for keys in expected.partitions(table):
            assert found.read(table, **keys).equals(expected.read(table, **keys)), (table.name, keys)
    assert not found.files("_work")


@pytest.fixture(scope="module")
def alone(ray_session, photos, tmp_path_factory) -> Storage:
    storage = Storage(tmp_path_factory.mktemp("alone"))
    exemplars(storage, photos, 2**20)
    run_stage(Encodings(LAYERS, ENCODER), storage, Resources())
    return storage


@pytest.mark.parametrize(
    ("step", "budget"),
    [
        ("listing 1", 2**20),  # the other is done when the first one has found no shard
        ("listing 2", 2**20),  # … when it has found all shards and merges them
        (SKIPPED.name, 2**20),  # … before it merges the first layer
        (LEVELS.name, 2**20),  # … between two layers
        (SKIPPED.name, 0),  # … before masks are recomputed
    ],
)
def test_exemplars_overtaken_by_the_same_job_are_those_of_one(alone, photos, tmp_path, capsys, step, budget):
    overtaken = Overtaken(str(tmp_path), step, lambda: exemplars(Storage(tmp_path), photos, budget))
    exemplars(overtaken, photos, budget)
    assert overtaken._happens is None
    assert_equal(Storage(tmp_path), alone, (EXEMPLARS, LEVELS, VIEWS))


def test_encodings_overtaken_by_the_same_job_are_those_of_one(alone, tmp_path, capsys):
    shutil.copytree(alone.root, tmp_path / "run")
    storage = Storage(tmp_path / "run")
    storage.remove(ENCODINGS.name)
    run = storage.root
    encodings, resources = Encodings(LAYERS, ENCODER), Resources()
    overtaken = Overtaken(run, "listing 1", lambda: run_stage(encodings, Storage(run), resources))
    run_stage(encodings, overtaken, resources)
    assert "another job on this storage has finished the same work" in capsys.readouterr().err
    assert_equal(storage, alone, (EXEMPLARS, LEVELS, VIEWS, ENCODINGS))
