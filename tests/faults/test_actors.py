"""In other processes every stage writes the bytes that it writes on threads, where the tests of what stages do run.

Exemplars on the actors of Ray Data, which are the same for all stages. What stages differ by is whether worker,
arguments and answers travel; the others show that on processes that start faster.
"""

from __future__ import annotations

import shutil

import pytest
from processes import in_a_process

from milan_ray.config import Resources
from milan_ray.engine import actor_pool
from milan_ray.storage import Storage
from tests.faults import every_stage
from tests.faults.test_killed_at_each_write import public, runs

STAGES = {
    "photographs": ("exemplars", "masks", "encodings", "descriptions", "reranking", "image embeddings", "contrast"),
    "fields": ("labels", "clip-dissect", "scores", "cosy"),
    "scenes": ("dnd",),
    "found": ("dnd-probe",),
}
"""World → its stages that have pools."""

EVERY = [("photographs", "exemplars", "actors")]
EVERY += [(world, name, "a process") for world, names in STAGES.items() for name in names if name != "exemplars"]


@pytest.mark.slow
@pytest.mark.parametrize(("world", "name", "where"), EVERY)
def test_stage_elsewhere_writes_what_it_writes_on_threads(
    before_and_after, tmp_path, monkeypatch, world, name, where
) -> None:
    before, after, stage = before_and_after(world, name)
    pools = []

    def watched(worker, arguments, rows, resources, reader):
        pools.append(worker.__name__)
        if where == "actors":
            return actors(worker, arguments, rows, resources, reader)
        return in_a_process(worker, arguments, rows, resources)

    actors = actor_pool._actors

    monkeypatch.setattr(actor_pool, "_actors", watched)
    monkeypatch.setattr(every_stage, "HERE", Resources(actors=1))
    shutil.copytree(before, tmp_path / "run")
    stage.run(Storage(tmp_path / "run"))
    assert pools
    files, expected = public(tmp_path / "run"), public(after)
    assert files.keys() == expected.keys()
    assert [path for path in expected if files[path] != expected[path]] == []
    assert runs(tmp_path / "run") == runs(after)
