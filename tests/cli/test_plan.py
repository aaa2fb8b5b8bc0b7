"""`jobs.plan` beside the run it speaks of: what it says of rows and bytes is what the tables then have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from toys import toy_captioner

from milan_ray import cli
from milan_ray.engine import cluster
from milan_ray.schema import TABLES
from milan_ray.stages.captioners import save_captioner
from milan_ray.storage import Storage

PLUGIN = str(Path(__file__).parents[1] / "plugins/tiny_models.py")
K = "5"


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """A run directory with a captioner."""
    found = Storage(tmp_path_factory.mktemp("plan") / "run")
    save_captioner(found, "toy", toy_captioner(length=5, beam_size=6), "A toy.")
    return found


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert cli.main(["plan", "--plugin", PLUGIN, "--device", "cpu", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_plan_of_a_small_run_is_what_the_run_then_makes(storage, photos, capsys) -> None:
    run = ["--model", "tiny/cnn", "--layers", "0", "2", "--probe", str(photos), "--k", K, "--decoder", "toy"]
    found = plan(capsys, *run, "--storage", storage.root, "--sample", "45")
    assert found["wanted"]["images"] == 90 and found["units"] == 14
    arguments = [*run, "--plugin", PLUGIN, "--device", "cpu", "--storage", storage.root, "--no-report"]
    assert cli.main(["describe", *arguments]) == 0
    capsys.readouterr()
    tables = {table.name: table for table in TABLES}
    for estimate in found["tables"]:
        table = tables[estimate["name"]]
        files = storage.partitions(table)
        rows = sum(storage.count(table, **keys) for keys in files)
        bytes_ = sum(storage.stat(table.name)[storage.path(table, **keys)].size for keys in files)
        if table.name == "views":  # an estimate from above: units share images
            assert rows <= estimate["rows"] <= 90
            assert estimate["bytes"] / estimate["rows"] == pytest.approx(bytes_ / rows, rel=0.3)
            continue
        assert rows == estimate["rows"], table.name
        assert estimate["bytes"] == pytest.approx(bytes_, rel=0.2), table.name
    assert {"manifest", "exemplars", "levels", "views", "encodings", "candidates", "descriptions"} == {
        estimate["name"] for estimate in found["tables"]
    }


def test_plan_needs_no_images_and_multiplies_models(capsys) -> None:
    small = ("--model", "tiny/cnn", "--layers", "2", "--sample", "4", "--images", "1000000")
    found = plan(capsys, *small, "--copies", "1000", "--actors", "50", "--price", "1.5")
    assert found["models"] == 1000 and found["units"] == 8000
    passes = {line["what"]: line["count"] for line in found["work"]}
    assert passes["forward passes, exemplars and levels"] == 10**9
    assert found["elapsed"] == pytest.approx(found["hours"] / 50)
    assert found["price"] == pytest.approx(found["hours"] * 1.5)


def test_plan_has_the_shards_of_the_actors_devices(capsys, monkeypatch) -> None:
    small = ("--model", "tiny/cnn", "--layers", "2", "--sample", "4", "--images", "1000000", "--actors", "8")
    on_cpus = plan(capsys, *small)
    monkeypatch.setattr(cluster, "on_gpus", lambda resources: True)
    on_gpus = plan(capsys, *small)
    assert (on_cpus["wanted"]["shard_size"], on_gpus["wanted"]["shard_size"]) == (256, 1024)
    assert on_gpus["partials"] != on_cpus["partials"]
    assert plan(capsys, *small, "--shard-size", "64")["wanted"]["shard_size"] == 64


def test_plan_leaves_out_what_cannot_run_and_says_why(capsys) -> None:
    arguments = ["plan", "--plugin", PLUGIN, "--model", "tiny/cnn", "tiny/failing", "--images", "10", "--sample", "2"]
    assert cli.main([*arguments, "--device", "cpu", "--layers", "outputs"]) == 1
    out, err = capsys.readouterr()
    assert "not measured: tiny/failing" in err and "tiny/cnn" in out and "actor-hours" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--images", "5", "--speed-up", "0"], "--speed-up"), ([], "--images")],
)
def test_plan_says_what_is_missing(arguments: list[str], said: str, capsys) -> None:
    assert cli.main(["plan", "--model", "tiny/cnn", "--plugin", PLUGIN, *arguments]) == 1
    assert said in capsys.readouterr().err
