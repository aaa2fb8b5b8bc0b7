"""Models of a zoo share a shard's images: one pass of reading and decoding, whatever is in memory or already done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from milan_ray.config import ExemplarConfig, Resources
from milan_ray.engine import model_cache, references
from milan_ray.engine.model_cache import GroupCache
from milan_ray.engine.references import ModelRef, ProbeRef
from milan_ray.exemplars import forward
from milan_ray.models.view import View
from milan_ray.probe.base import ImageRef, LatentProbe
from milan_ray.schema import EXEMPLARS, LEVELS
from milan_ray.stages.exemplars import Exemplars, Run, stage
from milan_ray.stages.exemplars.worker import ExemplarWorker
from milan_ray.storage import Storage

ZOO = """
import torch
from torch import nn
from milan_ray.models.registry import register_model
from milan_ray.models.view import Preprocess, View

def network(seed):
    def build(weights):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    return build

for name, side, seed in (("a", 24, 1), ("b", 24, 2), ("c", 24, 3), ("other", 20, 4)):
    register_model(f"share/{name}", network(seed), ("1",), Preprocess(View(resize=side, crop=side)))
"""
ALIKE = ("share/a", "share/b", "share/c")
IMAGES = 90

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(scope="module")
def plugin(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("plugin") / "share.py"
    path.write_text(ZOO)
    return str(path)


@pytest.fixture
def reads(monkeypatch) -> list[int]:
    """The ids of all images that workers read, in a list that grows."""
    found: list[int] = []
    read = forward.read_inputs

    def counting(probe, refs, spec):
        found.extend(ref.image_id for ref in refs)
        return read(probe, refs, spec)

    monkeypatch.setattr(forward, "read_inputs", counting)
    return found


@pytest.fixture
def dissect(plugin, photos) -> Callable[..., Storage]:
    def run(folder: Path, *models: str) -> Storage:
        storage, refs = Storage(folder), [ModelRef(name, plugins=(plugin,)) for name in models]
        done = Exemplars(refs, ProbeRef((str(photos),)), ExemplarConfig(k=3, batch_size=8, shard_size=16)).run(
            storage, Resources()
        )
        assert not done.failed
        return storage

    return run


def tables(storage: Storage, *models: str) -> list[pa.Table]:
    return [storage.read(table, model=model, layer="1") for table in (EXEMPLARS, LEVELS) for model in models]


def test_models_of_one_view_cost_one_pass_of_reading_and_have_the_tables_of_separate_jobs(dissect, reads, tmp_path):
    together = dissect(tmp_path / "together", *ALIKE, "share/other")
    assert sorted(reads) == sorted([*range(IMAGES)] * 2)  # two views
    for model in (*ALIKE, "share/other"):
        reads.clear()
        alone = dissect(tmp_path / model, model)
        assert sorted(reads) == [*range(IMAGES)]
        assert all(ours.equals(own) for ours, own in zip(tables(together, model), tables(alone, model), strict=True))


@pytest.mark.parametrize(
    ("where", "limit"), [(model_cache, "MODELS_MEMORY"), (forward, "MOST_SHARED"), (model_cache, "MOST_TOGETHER")]
)
def test_memory_bounds_what_is_shared_and_changes_no_table(where, limit, dissect, reads, monkeypatch, tmp_path):
    expected = tables(dissect(tmp_path / "shared", *ALIKE), *ALIKE)
    reads.clear()
    monkeypatch.setattr(where, limit, 1)
    found = tables(dissect(tmp_path / "bounded", *ALIKE), *ALIKE)
    assert len(reads) == len(ALIKE) * IMAGES
    assert all(ours.equals(own) for ours, own in zip(found, expected, strict=True))


def test_a_killed_zoo_goes_on_with_the_shards_that_each_model_lacks(dissect, reads, plugin, photos, tmp_path, capsys):
    """A job is killed when one model's shards are all there, and two of another's."""
    storage, source = Storage(tmp_path), ProbeRef((str(photos),))
    config = ExemplarConfig(k=3, batch_size=8, shard_size=16)
    manifest, digest = stage.store_manifest(storage, source)
    refs = [ModelRef(name, plugins=(plugin,)) for name in ALIKE]
    work = Exemplars(refs, source, config).due(storage, digest, len(manifest))
    run = Run(storage, source, config, Resources())
    done = stage.run_shards(run, ExemplarWorker, work[:2], [item.parts for item in work[:2]], "exemplars")
    assert done[0] == {}
    pieces = storage.pieces_with(work[1].work, work[1].parts)
    for shard in range(2, 6):
        storage.remove_file(f"_work/{work[1].work}/{pieces[f'{shard:06d}']}.parts")
    reads.clear()
    dissect(tmp_path, *ALIKE)
    said = capsys.readouterr().err
    assert "exemplars of share/a: 6 of 6 shards are done already" in said
    assert "exemplars of share/b: 2 of 6 shards are done already" in said
    assert sorted(reads) == [*range(IMAGES)]
    expected = tables(dissect(tmp_path / "whole", *ALIKE), *ALIKE)
    assert all(ours.equals(own) for ours, own in zip(tables(storage, *ALIKE), expected, strict=True))


def test_what_belongs_to_models_of_a_group_is_kept_while_rows_are_for_it_or_the_one_before():
    made: list[int] = []

    def make(index: int) -> torch.Tensor:
        made.append(index)
        return torch.zeros(1)

    cache = GroupCache(make)
    for group, models in ((0, (0, 1)), (0, (0, 1)), (1, (2, 3)), (0, (1,)), (1, (2, 3)), (1, (3,))):
        cache.turn_to(group)
        for index in models:
            assert cache(index) is cache(index)
    assert made == [0, 1, 2, 3]
    cache.turn_to(0)
    cache(0)
    assert made == [0, 1, 2, 3, 0]  # two rows in succession were of the other group


def test_shared_inputs_are_those_of_reading_for_each_model(photos, plugin, reads):
    probe = references.probe(ProbeRef((str(photos),)))
    assert not isinstance(probe, LatentProbe)
    spec = references.model(ModelRef("share/a", plugins=(plugin,)))
    refs = [ImageRef(row["image_id"], row["root"], row["path"]) for row in probe.manifest().to_pylist()][:20]
    for models, count in ((2, 20), (1, 40)):
        reads.clear()
        shared = forward.SharedInputs(probe, refs, 2, models)
        for _ in range(2):
            batches = list(shared.batches(spec, 8))
            assert [len(batch.ids) for _, batch in batches] == [8, 8, 4]
            for part, batch in batches:
                assert (batch.views == forward.read_views(probe, part, View(resize=24, crop=24)).views).all()
        assert len(reads) == count, "only what another model takes is kept"
