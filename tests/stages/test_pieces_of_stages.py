"""What a zoo stores while it runs is one object per shard, whatever the number of layers; a kill loses none of them."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from milan_ray.config import ExemplarConfig, Resources
from milan_ray.engine.references import ModelRef, ProbeRef
from milan_ray.engine.stage import run_stage
from milan_ray.schema import ENCODINGS, EXEMPLARS, Table
from milan_ray.stages.captioners import EncoderRef
from milan_ray.stages.encodings import Encodings
from milan_ray.stages.exemplars import Exemplars
from milan_ray.stages.exemplars.masks import MaskWorker
from milan_ray.storage import Storage

TINY = str(Path(__file__).resolve().parents[1] / "plugins/tiny_models.py")
LAYERS: dict[str, tuple[str, ...]] = {"tiny/cnn": ("0", "2", "6"), "tiny/twin": ("0", "2")}
ENCODER = EncoderRef("tiny", plugins=(TINY,))
CONFIG = ExemplarConfig(k=4, batch_size=16, shard_size=16)


class Killed(BaseException):
    """The process is gone."""


class Watched(Storage):
    """Notes what is written below the work, and dies when a table is written for the n-th time.

    Attributes:
        objects: Folder of the work, without hashes → objects written there.
    """

    def __init__(self, root: str, table: Table | None = None, last: int = 0) -> None:
        super().__init__(root)
        self.objects: Counter[str] = Counter()
        self._table, self._left = table, last

    def put(self, path, data):
        if path.startswith("_work/"):
            name = path.split("/", 2)[-1]
            self.objects[name.split("/")[0]] += 1
        super().put(path, data)

    def write(self, table, rows, config, **keys):
        if table is self._table:
            self._left -= 1
            if self._left == 0:
                raise Killed
        super().write(table, rows, config, **keys)


def tables(storage: Storage, table: Table) -> list[pa.Table]:
    return [storage.read(table, **keys) for keys in storage.partitions(table)]


@pytest.fixture
def dissect(ray_session, photos) -> Callable[..., Storage]:
    def run(storage: Storage, config: ExemplarConfig = CONFIG, models: dict[str, tuple[str, ...]] = LAYERS) -> Storage:
        refs = [ModelRef(name, layers=layers, plugins=(TINY,)) for name, layers in models.items()]
        assert not Exemplars(refs, ProbeRef((str(photos),)), config).run(storage, Resources()).failed
        return storage

    return run


@pytest.fixture
def dissected(dissect, tmp_path) -> Storage:
    storage: Storage = dissect(Storage(str(tmp_path / "run")))
    return storage


def images_of(storage: Storage, model: str) -> set[int]:
    return {
        image_id
        for layer in LAYERS[model]
        for image_id in storage.read(EXEMPLARS, ["image_id"], model=model, layer=layer)["image_id"].to_pylist()
    }


def noted(monkeypatch: pytest.MonkeyPatch, last: int = 1000) -> list[str]:
    """The blocks whose masks are computed, in a list that grows; there is a kill after the last."""
    ran: list[str] = []
    lock, compute = threading.Lock(), MaskWorker._run

    def run(worker: MaskWorker, row: dict[str, object]) -> None:
        with lock:  # workers are threads
            if len(ran) == last:
                raise Killed
            ran.append(str(row["name"]))
        compute(worker, row)

    monkeypatch.setattr(MaskWorker, "_run", run)
    return ran


def test_masks_of_all_layers_are_one_object_per_block(dissect, dissected, tmp_path):
    storage = Watched(str(tmp_path / "masked"))
    dissect(storage, replace(CONFIG, map_budget=0))
    assert all(
        mine.equals(own) for mine, own in zip(tables(storage, EXEMPLARS), tables(dissected, EXEMPLARS), strict=True)
    )
    blocks = sum(-(-len(images_of(storage, model)) // 16) for model in LAYERS)
    assert blocks > 4
    assert storage.objects["masks"] == blocks
    assert storage.objects["winners"] == sum(map(len, LAYERS.values()))
    assert storage.objects["pieces"] == 2 * -(-90 // 16)  # of the shards
    assert storage.files("_work") == []


@pytest.mark.parametrize("last", [1, 2, 3])
def test_a_job_killed_while_masked_exemplars_become_public_computes_no_mask_again(
    dissect, dissected, tmp_path, monkeypatch, last
):
    """The first, second or third layer of the first model is being written; another model is not masked yet, or is."""
    models = {"tiny/cnn": LAYERS["tiny/cnn"]}
    config, run = replace(CONFIG, map_budget=0), str(tmp_path / "masked")
    with pytest.raises(Killed):
        dissect(Watched(run, EXEMPLARS, last), config, models)
    assert len(tables(Storage(run), EXEMPLARS)) == last - 1
    ran = noted(monkeypatch)
    dissect(Storage(run), config, models)
    assert ran == []
    for layer in LAYERS["tiny/cnn"]:
        keys = {"model": "tiny/cnn", "layer": layer}
        assert Storage(run).read(EXEMPLARS, **keys).equals(dissected.read(EXEMPLARS, **keys))
    assert Storage(run).files("_work") == []


def test_a_job_killed_between_blocks_of_masks_computes_the_others(dissect, dissected, tmp_path, monkeypatch):
    config, run = replace(CONFIG, map_budget=0), str(tmp_path / "masked")
    with monkeypatch.context() as patched:
        before = noted(patched, last=3)
        with pytest.raises(Killed):
            dissect(Storage(run), config)
    after = noted(monkeypatch)
    dissect(Storage(run), config)
    assert len(before) == 3 and not set(before) & set(after)
    assert len(before) + len(after) == sum(-(-len(images_of(dissected, model)) // 16) for model in LAYERS)
    found = tables(Storage(run), EXEMPLARS)
    assert all(mine.equals(own) for mine, own in zip(found, tables(dissected, EXEMPLARS), strict=True))


def test_encodings_of_a_zoo_are_one_object_per_chunk_and_one_per_layer(dissected):
    storage = Watched(dissected.root)
    outputs = run_stage(Encodings(LAYERS, ENCODER), storage, Resources())
    images = set().union(*(images_of(storage, model) for model in LAYERS))
    chunks = -(-len(images) // 32)
    assert chunks > 1 and len(outputs) == 5
    assert storage.objects == {"pieces": chunks, "scattered": len(outputs)}
    assert storage.files("_work") == []


@pytest.mark.parametrize("last", [1, 3, 5])
def test_a_job_killed_between_layers_encodes_no_chunk_again(dissected, tmp_path, last):
    expected = run_and_read(dissected)
    dissected.remove(ENCODINGS.name)
    with pytest.raises(Killed):
        run_stage(Encodings(LAYERS, ENCODER), Watched(dissected.root, ENCODINGS, last), Resources())
    assert len(tables(dissected, ENCODINGS)) < 5
    storage = Watched(dissected.root)
    assert all(mine.equals(own) for mine, own in zip(run_and_read(storage), expected, strict=True))
    assert storage.objects["pieces"] == 0


def run_and_read(storage: Storage) -> list[pa.Table]:
    run_stage(Encodings(LAYERS, ENCODER), storage, Resources())
    return tables(storage, ENCODINGS)
