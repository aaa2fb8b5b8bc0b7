"""The table `pooled`: every unit on every image, exact, once, and made for itself alone."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from milan_ray import cli
from milan_ray.config import ExemplarConfig, Resources
from milan_ray.engine.references import ModelRef, ProbeRef, model, probe
from milan_ray.engine.run_log import Cost
from milan_ray.engine.status import status
from milan_ray.exemplars.pooled import matrix
from milan_ray.models.establish import establish
from milan_ray.probe.base import ImageRef, LatentProbe
from milan_ray.schema import EXEMPLARS, POOLED, RUNS
from milan_ray.stages.exemplars import Exemplars, exemplar_fingerprints, merge, store_manifest
from milan_ray.stages.exemplars.worker import ExemplarWorker, Run
from milan_ray.storage import Storage

PLUGIN = str(Path(__file__).resolve().parents[1] / "plugins/tiny_models.py")
CNN = ModelRef("tiny/cnn", plugins=(PLUGIN,))
CONFIG = ExemplarConfig(k=4, batch_size=16, shard_size=40, pooled=True)
LAYERS = {"0": 6, "2": 8, "6": 4}
BAD = 3
"""Image id of an unreadable image."""


@pytest.fixture(scope="module")
def few(photos, tmp_path_factory) -> Path:
    """Forty images, one of which is none."""
    folder = tmp_path_factory.mktemp("few")
    for file in sorted(photos.rglob("*.png"))[:40]:
        (folder / file.name).write_bytes(file.read_bytes())
    sorted(folder.iterdir())[BAD].write_bytes(b"not an image")
    return folder


def run(path: Path, few: Path, config: ExemplarConfig = CONFIG) -> Storage:
    storage = Storage(path)
    Exemplars([CNN], ProbeRef((str(few),)), config).run(storage, Resources())
    return storage


def copy(storage: Storage, path: Path) -> Storage:
    shutil.copytree(storage.root, path, dirs_exist_ok=True)
    return Storage(path)


def files(storage: Storage, table: str) -> dict[str, bytes]:
    return {path: storage.get(path) for path in storage.files(table)}


def written(storage: Storage, table: str) -> dict[str, int]:
    return {path: os.stat(storage.uri(path)).st_mtime_ns for path in storage.files(table)}


@pytest.fixture(scope="module")
def undisturbed(ray_session, few, tmp_path_factory) -> Storage:
    return run(tmp_path_factory.mktemp("undisturbed"), few)


def test_pooled_equals_a_dense_computation(undisturbed, few):
    spec = model(CNN)
    net, source = spec.load(), probe(ProbeRef((str(few),)))
    assert isinstance(net, torch.nn.Sequential) and not isinstance(source, LatentProbe)
    rows = [row for row in source.manifest().to_pylist() if row["image_id"] != BAD]
    views = np.stack(
        [spec.preprocess.view(source.read(ImageRef(r["image_id"], r["root"], r["path"])).image) for r in rows]
    )
    with torch.inference_mode():
        maps = net[:1](spec.prepare(torch.from_numpy(views))).numpy()
    found = undisturbed.read(POOLED, model="tiny/cnn", layer="0")
    assert found["image_id"].to_pylist() == [row["image_id"] for row in rows]
    np.testing.assert_allclose(matrix(found["max"]), maps.max(axis=(2, 3)), rtol=1e-5)
    np.testing.assert_allclose(matrix(found["mean"]), maps.astype(float).mean(axis=(2, 3)), rtol=1e-4, atol=1e-6)
    exemplars = undisturbed.read(EXEMPLARS, model="tiny/cnn", layer="0").to_pylist()
    place = {image: row for row, image in enumerate(found["image_id"].to_pylist())}
    largest = matrix(found["max"])
    assert [row["activation"] for row in exemplars] == [largest[place[r["image_id"]], r["unit"]] for r in exemplars]


def test_pooled_has_its_width_its_probe_and_a_run(undisturbed):
    runs = [undisturbed.read(RUNS, **keys).to_pylist()[0] for keys in undisturbed.partitions(RUNS, stage="pooled")]
    assert sorted((row["layer"], row["rows"], row["images"]) for row in runs) == [(layer, 39, 39) for layer in LAYERS]
    for layer, units in LAYERS.items():
        keys = {"model": "tiny/cnn", "layer": layer}
        meta = undisturbed.metadata(POOLED, **keys)
        assert meta["units"] == str(units)
        assert meta["probe"] == undisturbed.metadata(EXEMPLARS, **keys)["probe"]
        parts = list(undisturbed.stream(POOLED, ["max"], **keys))
        assert sum(len(part) for part in parts) == 39 and matrix(parts[0]["max"]).shape[1] == units


def test_pooled_is_the_same_file_for_any_shards(undisturbed, few, tmp_path):
    """On actors, too: tests/faults/test_actors.py."""
    other = run(tmp_path, few, replace(CONFIG, shard_size=7))
    assert files(other, "pooled") == files(undisturbed, "pooled")


def test_pooled_is_added_later_without_making_exemplars_again(undisturbed, few, tmp_path, capsys):
    storage = copy(undisturbed, tmp_path)
    storage.remove("pooled")
    before = {table: written(storage, table) for table in ("exemplars", "levels")}
    arguments = ["exemplars", "--model", "tiny/cnn", "--plugin", PLUGIN, "--probe", str(few), "--batch-size", "16"]
    arguments += ["--storage", str(tmp_path), "--no-report", "--k", "4", "--pooled"]
    capsys.readouterr()
    assert cli.main([*arguments, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [re.split(r"\s{2,}", line) for line in lines[:-1]] == [
        ["pooled", f"tiny/cnn {layer}", "missing"] for layer in LAYERS
    ]
    assert cli.main(arguments) == 0
    assert "one more pass over the probe for their pooled activations" in capsys.readouterr().err
    assert {table: written(storage, table) for table in ("exemplars", "levels")} == before
    assert files(storage, "pooled") == files(undisturbed, "pooled")
    # Nothing is due now; another k makes exemplars anew and leaves pooled activations as they are.
    made = written(storage, "pooled")
    run(tmp_path, few, replace(CONFIG, k=3))
    assert written(storage, "pooled") == made and written(storage, "exemplars") != before["exemplars"]
    assert not storage.files("_work")


def test_pooled_after_a_kill_has_every_row_once(undisturbed, few, tmp_path, capsys):
    """A shard run twice, one missing, some without pooled activations, one layer public: as kills leave them."""
    storage, source, config = Storage(tmp_path), ProbeRef((str(few),)), replace(CONFIG, shard_size=8)
    manifest, digest = store_manifest(storage, source)
    for asked, shards in ((replace(config, pooled=False), range(5)), (config, (0, 1, 1, 2, 3, 4))):
        (item,) = Exemplars([CNN], source, asked).due(storage, digest, len(manifest))
        worker = ExemplarWorker(**Run(storage, source, asked, Resources()).arguments([item]))
        for n in shards:
            (answer,) = worker({"group": 0, "models": [0], "shard": n, "start": 8 * n, "images": 8})["models"]
            assert answer["error"] is None
    job = Run(storage, source, config, Resources())
    pieces = merge.finish_images(job, item, len(manifest))[2]
    assert len(pieces) == 5 and len(storage.files(f"_work/{item.work}")) == 10
    merge.merge_pooled(job, item, pieces, Cost(images=39), "0")
    for file in storage.files(f"_work/{item.work}"):
        if file.endswith("000002.parts") or (
            file.endswith(("000000.parts", "000003.parts")) and pieces[0][:-7] in file
        ):
            storage.remove_file(file)
    capsys.readouterr()
    run(tmp_path, few, config)
    assert "2 of 5 shards are done already" in capsys.readouterr().err
    assert files(storage, "pooled") == files(undisturbed, "pooled")


def test_pooled_of_other_weights_than_the_exemplars_is_stale(undisturbed, tmp_path):
    storage = copy(undisturbed, tmp_path)
    found = {(row.table, row.keys["layer"]): row.state for row in status(storage).partitions}
    assert found["pooled", "0"] == found["exemplars", "0"] == ""
    keys = {"model": "tiny/cnn", "layer": "0"}
    view, weights = "another", "others"
    network = model(CNN).load()
    layouts = establish(model(CNN), network, model(CNN).layers)
    fingerprints = exemplar_fingerprints(model(CNN), network, weights, view, "probe", CONFIG, layouts)
    storage.write(EXEMPLARS, storage.read(EXEMPLARS, **keys).replace_schema_metadata(None), fingerprints["0"], **keys)
    found = {(row.table, row.keys["layer"]): row.state for row in status(storage).partitions}
    assert found["pooled", "0"] == "stale: exemplars have other probe, view, weights"
    assert found["pooled", "2"] == ""
