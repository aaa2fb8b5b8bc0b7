"""The exemplars stage on a real local Ray: one answer for any actors, shards, kills and resumes."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from milan_ray.config import ExemplarConfig, Resources
from milan_ray.engine.actor_pool import run_pool
from milan_ray.engine.references import ModelRef, ProbeRef, model, probe
from milan_ray.engine.run_log import Cost
from milan_ray.errors import MilanError
from milan_ray.exemplars import masks
from milan_ray.probe.base import ImageRef, LatentProbe
from milan_ray.schema import EXEMPLARS, LEVELS, MANIFEST, RUNS, SKIPPED, VIEWS
from milan_ray.stages.exemplars import Exemplars, merge, stage
from milan_ray.stages.exemplars import masks as mask_stage
from milan_ray.stages.exemplars.masks import recompute
from milan_ray.stages.exemplars.worker import ExemplarWorker, Run
from milan_ray.storage import Storage

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = str(ROOT / "tests/plugins/tiny_models.py")
CNN = ModelRef("tiny/cnn", plugins=(PLUGIN,))
CONFIG = ExemplarConfig(k=4, batch_size=16, shard_size=40)


def tables(storage: Storage) -> dict[str, pa.Table]:
    found = {}
    for table in (EXEMPLARS, LEVELS):
        for keys in storage.partitions(table):
            found[f"{table.name} {keys}"] = storage.read(table, **keys)
    for keys in storage.partitions(VIEWS):
        found[f"views {keys}"] = storage.read(VIEWS, **keys)
    return found


def run(path: Path, photos: Path, config: ExemplarConfig = CONFIG, actors: int | None = None, models=(CNN,)) -> Storage:
    storage = Storage(path)
    Exemplars(list(models), ProbeRef((str(photos),)), config).run(storage, Resources(actors=actors))
    return storage


@pytest.fixture(scope="module")
def undisturbed(ray_session, photos, tmp_path_factory) -> Storage:
    return run(tmp_path_factory.mktemp("undisturbed"), photos)


def test_exemplars_equal_a_naive_loop(undisturbed, photos):
    spec = model(CNN)
    net, source = spec.load(), probe(ProbeRef((str(photos),)))
    assert isinstance(net, torch.nn.Sequential) and not isinstance(source, LatentProbe)
    rows = source.manifest().to_pylist()
    views = np.stack(
        [spec.preprocess.view(source.read(ImageRef(r["image_id"], r["root"], r["path"])).image) for r in rows]
    )
    with torch.inference_mode():
        maps = net[:1](spec.prepare(torch.from_numpy(views)))
    pooled = maps.amax(dim=(2, 3)).numpy()
    levels = np.quantile(maps.numpy().transpose(1, 0, 2, 3).reshape(6, -1).astype(float), 0.99, axis=1, method="hazen")
    found = undisturbed.read(EXEMPLARS, model="tiny/cnn", layer="0").to_pydict()
    np.testing.assert_allclose(
        undisturbed.read(LEVELS, model="tiny/cnn", layer="0")["level"].to_numpy(), levels, rtol=1e-5
    )
    meta = undisturbed.metadata(EXEMPLARS, model="tiny/cnn", layer="0")
    size = int(meta["mask_height"]), int(meta["mask_width"])
    assert size == (24, 24)
    for row in range(len(found["unit"])):
        unit, rank = found["unit"][row], found["rank"][row]
        best = np.argsort(-pooled[:, unit], kind="stable")[rank]
        assert found["image_id"][row] == best
        assert found["activation"][row] == pytest.approx(pooled[best, unit], rel=1e-5)
        mask = masks.unpack([found["mask"][row]], size)[0]
        expected = masks.upsample(maps[best, unit][None], size)[0].numpy() > levels[unit]
        assert (mask != expected).mean() < 0.01
    assert len(found["unit"]) == 6 * 4


def test_exemplars_of_all_layers_record_views_manifest_and_run(undisturbed):
    layers = [keys["layer"] for keys in undisturbed.partitions(EXEMPLARS)]
    assert layers == ["0", "2", "6"]
    assert undisturbed.read(LEVELS, model="tiny/cnn", layer="6")["exact"].to_pylist() == [True] * 4
    winners = set()
    for keys in undisturbed.partitions(EXEMPLARS):
        winners |= set(undisturbed.read(EXEMPLARS, **keys)["image_id"].to_pylist())
    (view,) = undisturbed.partitions(VIEWS)
    assert set(undisturbed.read(VIEWS, **view)["image_id"].to_pylist()) == winners
    (manifest,) = undisturbed.partitions(MANIFEST)
    assert undisturbed.read(MANIFEST, **manifest)["sha256"].null_count == 0
    runs = [undisturbed.read(RUNS, **keys).to_pylist()[0] for keys in undisturbed.partitions(RUNS)]
    assert sorted((row["layer"], row["rows"], row["images"]) for row in runs) == [
        ("0", 24, 90),
        ("2", 32, 90),
        ("6", 16, 90),
    ]
    for row in runs:
        assert row["run"] == undisturbed.config_of(EXEMPLARS, model="tiny/cnn", layer=row["layer"])
        assert row["images_per_second"] == pytest.approx(90 / (3 * row["seconds"]))  # one pass for three layers
    assert not undisturbed.files("_work")


@pytest.mark.parametrize(
    ("actors", "shard_size"), [(None, 16), (None, 500), pytest.param(2, 16, marks=pytest.mark.slow)]
)
def test_exemplars_are_identical_for_any_actors_and_shards(undisturbed, photos, tmp_path, actors, shard_size):
    other = tables(run(tmp_path, photos, replace(CONFIG, shard_size=shard_size), actors))
    expected = tables(undisturbed)
    assert other.keys() == expected.keys()
    for name, table in expected.items():
        assert other[name].equals(table), name


def copy(storage: Storage, path: Path) -> Storage:
    shutil.copytree(storage.root, path, dirs_exist_ok=True)
    return Storage(path)


def test_exemplars_run_again_does_nothing_and_changed_k_recomputes(undisturbed, photos, tmp_path):
    storage = copy(undisturbed, tmp_path)
    before = {path: os.stat(tmp_path / path).st_mtime_ns for path in storage.files("exemplars")}
    run(tmp_path, photos)
    assert {path: os.stat(tmp_path / path).st_mtime_ns for path in storage.files("exemplars")} == before
    run(tmp_path, photos, replace(CONFIG, k=3))
    assert len(storage.read(EXEMPLARS, model="tiny/cnn", layer="0")) == 6 * 3


def test_exemplars_missing_layer_alone_is_recomputed(undisturbed, photos, tmp_path):
    storage = copy(undisturbed, tmp_path)
    (tmp_path / storage.path(EXEMPLARS, model="tiny/cnn", layer="2")).unlink()
    before = os.stat(tmp_path / storage.path(EXEMPLARS, model="tiny/cnn", layer="0")).st_mtime_ns
    run(tmp_path, photos)
    assert os.stat(tmp_path / storage.path(EXEMPLARS, model="tiny/cnn", layer="0")).st_mtime_ns == before
    assert tables(storage)["exemplars {'model': 'tiny/cnn', 'layer': '2'}"].equals(
        undisturbed.read(EXEMPLARS, model="tiny/cnn", layer="2")
    )


def test_exemplars_unreadable_images_are_skipped_counted_and_listed(ray_session, photos, tmp_path):
    folder = tmp_path / "with bad ones"
    folder.mkdir()
    for file in sorted(photos.rglob("*.png"))[:30]:
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "000broken.png").write_bytes(b"not an image")
    (folder / "zz empty.png").write_bytes(b"")
    with pytest.raises(MilanError, match="2 of 32 probe images are unreadable"):
        run(tmp_path / "run", folder, replace(CONFIG, max_bad=0.01))
    storage = run(tmp_path / "run", folder)  # from the shards of the first
    skipped = storage.read(SKIPPED, model="tiny/cnn").to_pydict()
    assert skipped["image_id"] == [1, 31]
    assert skipped["path"][1].endswith("zz empty.png")
    assert 1 not in storage.read(EXEMPLARS, model="tiny/cnn", layer="0")["image_id"].to_pylist()


def test_exemplars_fewer_images_than_k_give_fewer_ranks(ray_session, photos, tmp_path):
    folder = tmp_path / "three"
    folder.mkdir()
    for file in sorted(photos.rglob("*.png"))[:3]:
        (folder / file.name).write_bytes(file.read_bytes())
    storage = run(tmp_path / "run", folder)
    assert storage.read(EXEMPLARS, model="tiny/cnn", layer="0")["rank"].to_pylist() == [0, 1, 2] * 6


def test_exemplars_killed_while_results_become_public_go_on_from_the_shards(undisturbed, photos, tmp_path, capsys):
    """What a kill between two layers leaves: all pieces, one of three layers public."""
    storage, source = Storage(tmp_path), ProbeRef((str(photos),))
    manifest, digest = stage.store_manifest(storage, source)
    (item,) = Exemplars([CNN], source, CONFIG).due(storage, digest, len(manifest))
    job = Run(storage, source, CONFIG, Resources())
    assert stage.run_shards(job, ExemplarWorker, [item], [item.parts], "exemplars")[0] == {}
    pieces = merge.finish_images(job, item, len(manifest))[2]
    assert sorted(storage.pieces_with(item.work, item.parts).values()) == list(pieces)
    assert len(storage.files(f"_work/{item.work}")) == 3  # an object a shard, whatever the number of layers
    merge.merge_layer(job, item, pieces, Cost(images=90), "2")
    run(tmp_path, photos)
    said = capsys.readouterr().err
    assert "3 of 3 shards are done already" in said
    expected, found = tables(undisturbed), tables(storage)
    assert found.keys() == expected.keys()
    assert all(found[name].equals(table) for name, table in expected.items())
    assert not storage.files("_work")


BROKEN = ModelRef("tiny/broken", plugins=(PLUGIN,))


def assert_layer_of_nan_has_no_exemplars(storage: Storage) -> None:
    assert len(storage.read(EXEMPLARS, model="tiny/broken", layer="nan")) == 0
    assert len(storage.read(EXEMPLARS, model="tiny/broken", layer="good")) == 16
    levels = storage.read(LEVELS, model="tiny/broken", layer="nan").to_pydict()
    assert np.isnan(levels["level"]).all() and levels["positions"] == [0, 0]
    assert all(count == 90 * 20 * 20 for count in levels["nonfinite"])


def test_exemplars_failing_model_is_reported_and_the_others_finish(ray_session, photos, tmp_path, capsys):
    failing = ModelRef("tiny/failing", plugins=(PLUGIN,))
    storage = Storage(tmp_path)
    unseeded = ModelRef("tiny/unseeded", plugins=(PLUGIN,))
    models = [failing, unseeded, BROKEN, CNN]
    done = Exemplars(models, ProbeRef((str(photos),)), CONFIG).run(storage, Resources())
    assert list(done.models) == ["tiny/broken", "tiny/cnn"]
    assert "does not run on a test batch of (3, 24, 24, 3) (RuntimeError" in done.failed["tiny/failing"]
    assert "random weights need a seed" in done.failed["tiny/unseeded"]
    assert {keys["model"] for keys in storage.partitions(EXEMPLARS)} == {"tiny/broken", "tiny/cnn"}
    assert_layer_of_nan_has_no_exemplars(storage)
    said = capsys.readouterr().err
    assert "layer 'nan' of tiny/broken has 72000 activations that are NaN or infinite, in 2 of 2 units" in said
    assert "layer 'good'" not in said


SATURATED = ModelRef("tiny/saturated", plugins=(PLUGIN,))
TIES = (
    "layer '1' of tiny/saturated has 4 of 4 units whose exemplars or masks mean nothing: 1 never active (no "
    "activation is above 0); 3 with their highest activation on 4 images or more, of which the first are shown; 3 "
    "without an activation above their level, so that masks show nothing; dissect another layer, or "
)


def told_ties(capsys) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if "mean nothing" in line]


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, shard_size=23), replace(CONFIG, map_budget=0)])
def test_exemplars_that_tie_are_told_once_per_layer_and_neighbours_say_nothing(
    ray_session, photos, tmp_path, capsys, config
):
    run(tmp_path, photos, config, models=(SATURATED, CNN))
    (said,) = told_ties(capsys)
    assert said.startswith(TIES)
    run(tmp_path, photos, config, models=(CNN, SATURATED))  # nothing is left to do
    assert told_ties(capsys) == [said]


def test_exemplars_that_tie_are_told_by_the_job_that_ends_what_a_killed_one_began(photos, tmp_path, capsys):
    storage, source = Storage(tmp_path), ProbeRef((str(photos),))
    manifest, digest = stage.store_manifest(storage, source)
    (item,) = Exemplars([SATURATED], source, CONFIG).due(storage, digest, len(manifest))
    job = Run(storage, source, CONFIG, Resources())
    stage.run_shards(job, ExemplarWorker, [item], [item.parts], "exemplars")
    merge.merge_layer(job, item, merge.finish_images(job, item, len(manifest))[2], Cost(images=90), "1")
    assert told_ties(capsys) == []
    run(tmp_path, photos, models=(SATURATED,))
    (said,) = told_ties(capsys)
    assert said.startswith(TIES)


@pytest.mark.filterwarnings("ignore:.*quantiz:DeprecationWarning")
def test_models_of_any_numbers_run_or_fail_alone_with_one_sentence(ray_session, photos, tmp_path):
    plugin = str(ROOT / "tests/plugins/bad_models.py")
    names = ("bad/secret", "bad/unbuilt", "bad/inputs", "bad/int8")
    models = [*(ModelRef(name, plugins=(plugin,)) for name in names), CNN]
    done = Exemplars(models, ProbeRef((str(photos),)), CONFIG).run(Storage(tmp_path), Resources())
    assert list(done.models) == ["bad/int8", "tiny/cnn"]
    assert "the weights of Secret cannot be identified" in done.failed["bad/secret"]
    assert done.failed["bad/unbuilt"] == "model bad/unbuilt cannot be built: KeyError: 'no such\\nsize'"
    assert done.failed["bad/inputs"].startswith(
        "bad/inputs does not run on a test batch of (3, 16, 16, 3) (IndexError: "
    )


@pytest.mark.slow
def test_exemplars_above_the_map_budget_are_masked_in_one_pool_whatever_model_fails(
    undisturbed, photos, tmp_path, monkeypatch
):
    plugin = str(shutil.copy(ROOT / "tests/plugins/late_models.py", tmp_path))
    pools: list[str] = []

    def watched(worker, arguments, rows, resources, **options):
        pools.append(worker.__name__)
        if worker is mask_stage.MaskWorker:
            (tmp_path / "loads").touch()
        return run_pool(worker, arguments, rows, resources, **options)

    def fails_after_the_shards(*arguments):
        (tmp_path / "fail").touch()
        return recompute(*arguments)

    monkeypatch.setattr(stage, "run_pool", watched)
    monkeypatch.setattr(mask_stage, "run_pool", watched)
    monkeypatch.setattr(stage, "recompute", fails_after_the_shards)
    storage = Storage(tmp_path / "run")
    names = [f"late/{name}" for name in ("cnn", "failing", "twin")]
    models = [ModelRef(name, plugins=(plugin,)) for name in names]
    config = replace(CONFIG, map_budget=0, shard_size=23)
    exemplars, resources = Exemplars([*models, BROKEN], ProbeRef((str(photos),)), config), Resources(actors=2)
    done = exemplars.run(storage, resources)
    assert done.failed == {"late/failing": "the model failed on a batch: RuntimeError: not now"}
    assert pools == ["ExemplarWorker", "MaskWorker"]
    loads = Counter((tmp_path / "loads").read_text().splitlines())
    assert set(loads.values()) == {1} and {line.split()[1] for line in loads} == set(names)

    def assert_as_alone(model: str, layer: str) -> None:
        for table in (EXEMPLARS, LEVELS):
            found = storage.read(table, model=model, layer=layer)
            expected = undisturbed.read(table, model="tiny/cnn", layer=layer)
            assert set(found["model"].to_pylist()) == {model}
            assert found.drop_columns("model").equals(expected.drop_columns("model"))

    for keys in (
        {"model": "late/cnn", "layer": "0"},
        {"model": "late/cnn", "layer": "2"},
        {"model": "late/twin", "layer": "0"},
    ):
        assert_as_alone(**keys)
    assert_layer_of_nan_has_no_exemplars(storage)
    assert {keys["model"] for keys in storage.partitions(EXEMPLARS)} == {"late/cnn", "late/twin", "tiny/broken"}
    # What failed goes on from its winners.
    (tmp_path / "fail").unlink()
    monkeypatch.setattr(stage, "recompute", recompute)
    assert exemplars.run(storage, resources).failed == {}
    assert pools[2:] == ["MaskWorker"]
    assert_as_alone("late/failing", "2")
    assert not storage.files("_work")
