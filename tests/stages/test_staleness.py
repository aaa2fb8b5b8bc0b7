"""What changes is made again, and only that; a dry run says so beforehand, status afterwards."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from toys import toy_captioner

from milan_ray import cli
from milan_ray.captioner.captioner import Captioner
from milan_ray.schema import CANDIDATES, DESCRIPTIONS, ENCODINGS, EXEMPLARS
from milan_ray.stages.captioners import save_captioner
from milan_ray.storage import Storage

KNOBS = {"seed": 1, "mean": 0.5, "crop": 16, "kernel": 3, "encoder": 2}

PLUGIN = """
import torch
from torch import nn
from milan_ray.captioner.encoder import register_encoder
from milan_ray.models.registry import register_model
from milan_ray.models.view import Preprocess, View

def net(seed, kernel):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 3, kernel, 2), nn.ReLU(), nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.Conv2d(4, 2, 1))

changing = Preprocess(View(resize=16, crop={crop}), mean=({mean}, 0.5, 0.5), std=(0.5, 0.5, 0.5))
constant = Preprocess(View(resize=16, crop=16))
register_model("stale/changing", lambda weights: net({seed}, {kernel}), ("0", "2"), changing)
register_model("stale/constant", lambda weights: net(0, 3), ("0",), constant)

def encoder(weights):
    torch.manual_seed({encoder})
    return nn.Conv2d(3, 4, 3, 2)

register_encoder("stale", lambda weights: nn.Sequential(encoder(weights)), ("0",), size=16)
"""


def captioner(seed: int) -> Captioner:
    return toy_captioner("stale", sizes=(4, 4, 6), seed=seed)


def describe(folder: Path, photos: Path, *options: str, **knobs: float) -> list[str]:
    """The job's arguments, with a plug-in of its own: the last one loaded counts, in every process."""
    plugin = folder / "plugin.py"
    plugin.write_text(PLUGIN.format(**{**KNOBS, **knobs}))
    arguments = ["describe", "--model", "stale/changing", "stale/constant", "--plugin", str(plugin), "--decoder", "toy"]
    arguments += ["--probe", str(photos), "--storage", str(folder / "run"), "--no-report"]
    return [*arguments, "--k", "2", "--beam-size", "3", "--length", "4", "--lam", "0.3", *options]


@pytest.fixture(scope="module")
def few_photos(photos, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("few")
    for file in sorted(photos.rglob("*.png"))[:12]:
        shutil.copy2(file, folder)
    return folder


@pytest.fixture(scope="module")
def original(ray_session, few_photos, tmp_path_factory) -> Path:
    """A folder with the run directory of a finished job."""
    folder = tmp_path_factory.mktemp("original")
    save_captioner(Storage(folder / "run"), "toy", captioner(0), "A toy.")
    assert cli.main(describe(folder, few_photos)) == 0
    return folder


@pytest.fixture
def folder(original, tmp_path) -> Path:
    shutil.copytree(original / "run", tmp_path / "run")
    return tmp_path


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, str]:
    """What a dry run says: table and partition → reason."""
    before = written(arguments)
    assert cli.main([*arguments, "--dry-run"]) == 0
    assert written(arguments) == before
    *lines, closing = capsys.readouterr().out.splitlines()
    assert closing.startswith(f"{len(lines)} tables would be made, ")
    found = {}
    for line in lines:
        table, partition, reason = re.split(r"\s{2,}", line)
        found[f"{table} {partition}"] = reason
    return found


def written(arguments: tuple[str, ...]) -> dict[str, int]:
    """File → when it was written, ns, of every file of the run directory."""
    storage = Storage(arguments[arguments.index("--storage") + 1])
    return {path: os.stat(f"{storage.root}/{path}").st_mtime_ns for path in storage.files("")}


def chain(model: str, layers: str, first: str) -> Iterator[tuple[str, str]]:
    """What a change of a model's exemplars entails."""
    for layer in layers:
        yield f"exemplars {model} {layer}", first
        yield f"encodings stale {model} {layer}", "exemplars changed"
        yield f"candidates toy {model} {layer}", "encodings changed"
        for labeler in ("milan", "milan-pdE"):
            yield f"descriptions {labeler} {model} {layer}", "candidates changed"


def everywhere(rows: dict[str, str]) -> dict[str, str]:
    """The same for all three layers."""
    layers = ("stale/changing 0", "stale/changing 2", "stale/constant 0")
    return {f"{table} {layer}": reason for table, reason in rows.items() for layer in layers}


DESCRIBED = {"descriptions milan": "candidates changed", "descriptions milan-pdE": "candidates changed"}
ALL = [("stale/changing", "02"), ("stale/constant", "0")]

CASES: dict[str, tuple[tuple[str, ...], dict[str, float], dict[str, str]]] = {
    "nothing": ((), {}, {}),
    "shard size": (("--shard-size", "5"), {}, {}),
    "some units of what is there": (("--units", "0,2"), {}, {}),
    "weights": ((), {"seed": 9}, dict(chain("stale/changing", "02", "weights changed"))),
    "architecture": ((), {"kernel": 5}, dict(chain("stale/changing", "02", "weights, structure changed"))),
    "normalisation": ((), {"mean": 0.4}, dict(chain("stale/changing", "02", "inputs changed"))),
    "view": ((), {"crop": 14}, dict(chain("stale/changing", "02", "view, inputs changed"))),
    "k": (("--k", "3"), {}, dict(row for pair in ALL for row in chain(*pair, "k changed"))),
    "quantile": (("--quantile", "0.9"), {}, dict(row for pair in ALL for row in chain(*pair, "quantile changed"))),
    "batch": (("--batch-size", "4"), {}, dict(row for pair in ALL for row in chain(*pair, "batch_size changed"))),
    "encoder": (
        (),
        {"encoder": 3},
        everywhere({"encodings stale": "weights changed", "candidates toy": "encodings changed", **DESCRIBED}),
    ),
    "beam": (("--beam-size", "4"), {}, everywhere({"candidates toy": "beam_size changed", **DESCRIBED})),
    "length": (("--length", "3"), {}, everywhere({"candidates toy": "length changed", **DESCRIBED})),
    "λ": (("--lam", "0.5"), {}, everywhere({"descriptions milan": "lam changed"})),
}


@pytest.mark.parametrize("case", CASES)
def test_dry_run_names_what_a_change_makes_stale_and_nothing_else(case, folder, few_photos, capsys):
    options, knobs, expected = CASES[case]
    assert planned(capsys, *describe(folder, few_photos, *options, **knobs)) == expected


def test_dry_run_names_a_new_layer_alone(folder, few_photos, capsys):
    found = planned(capsys, *describe(folder, few_photos, "--layers", "0", "2", "4"))
    assert set(found.values()) == {"missing"}
    assert sorted(name for name in found if name.startswith("exemplars")) == [
        "exemplars stale/changing 4",
        "exemplars stale/constant 2",
        "exemplars stale/constant 4",
    ]
    assert len(found) == 3 * 5


def test_dry_run_names_a_changed_probe(folder, few_photos, tmp_path, capsys):
    more = tmp_path / "more"
    shutil.copytree(few_photos, more)
    moved = planned(capsys, *describe(folder, more))
    assert moved == dict(row for pair in ALL for row in chain(*pair, "probe changed"))


def test_dry_run_names_a_changed_captioner(folder, few_photos, capsys):
    save_captioner(Storage(folder / "run"), "toy", captioner(1), "Another toy.")
    found = planned(capsys, *describe(folder, few_photos))
    assert found == everywhere({"candidates toy": "captioner changed", **DESCRIBED})


def test_dry_run_starts_no_ray_and_lists_models_that_would_be_skipped(folder, few_photos):
    script = "import sys, ray; from milan_ray import cli; s = cli.main(sys.argv[1:]); print(ray.is_initialized(), s)"
    arguments = describe(folder, few_photos, "--dry-run", "--layers", "2", "9")
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False 1"
    assert re.search(r"skipped +stale/changing +.*layer '9'", done.stdout)


def test_run_makes_again_what_the_dry_run_named_and_nothing_else(folder, few_photos, capsys):
    arguments = describe(folder, few_photos, "--lam", "0.5", seed=9)
    due = planned(capsys, *arguments)
    before = written(tuple(arguments))
    assert cli.main(arguments) == 0
    after = written(tuple(arguments))
    storage = Storage(folder / "run")
    made = set()
    for table in (EXEMPLARS, ENCODINGS, CANDIDATES, DESCRIPTIONS):
        for keys in storage.partitions(table):
            path = storage.path(table, **keys)
            if after[path] != before.get(path):
                made.add(" ".join([table.name, *keys.values()]))
    assert made == set(due)
    assert due["descriptions milan stale/constant 0"] == "lam changed"
    assert planned(capsys, *arguments) == {}


def test_units_alone_are_described_and_do_not_pass_for_the_whole_layer(folder, few_photos, capsys):
    storage = Storage(folder / "run")
    some = describe(folder, few_photos, "--units", "0,2", seed=9)
    assert cli.main(some) == 0
    keys = {"model": "stale/changing", "layer": "0"}
    assert len(storage.read(EXEMPLARS, **keys)) == 3 * 2
    for labeler in ("milan", "milan-pdE"):
        assert storage.read(DESCRIPTIONS, labeler=labeler, **keys)["unit"].to_pylist() == [0, 2]
    assert planned(capsys, *some) == {}
    assert cli.main(["report", "--storage", storage.root, "--report", str(folder / "report")]) == 0
    # The layers that had not changed hold all their units still.
    assert storage.count(DESCRIPTIONS, labeler="milan", model="stale/constant", layer="0") == 3
    whole = planned(capsys, *describe(folder, few_photos, seed=9))
    assert whole["encodings stale stale/changing 0"] == "units changed"
    assert whole["descriptions milan stale/changing 2"] == "units changed"
    assert not [name for name in whole if name.startswith("exemplars") or "constant" in name]


def test_units_that_a_layer_has_not_are_refused(folder, few_photos, capsys):
    assert cli.main(describe(folder, few_photos, "--units", "0-3")) == 1
    assert "stale/changing 0 has 3 units, numbered from 0, and --units asks for 3" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(describe(folder, few_photos, "--units", "one"))


def status(capsys: pytest.CaptureFixture[str], folder: Path) -> dict[str, list[dict]]:
    capsys.readouterr()
    assert cli.main(["status", "--storage", str(folder / "run"), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_status_lists_partitions_with_rows_age_and_hash(original, capsys):
    found = status(capsys, original)
    storage = Storage(original / "run")
    assert [work["config"] for work in found["work"]] == []
    assert len(found["partitions"]) == 3 * 5
    for row in found["partitions"]:
        table = {table.name: table for table in (EXEMPLARS, ENCODINGS, CANDIDATES, DESCRIPTIONS)}[row["table"]]
        assert row["rows"] == len(storage.read(table, **row["keys"]))
        assert row["config"] == storage.config_of(table, **row["keys"])
        assert row["state"] == row["units"] == "" and row["written"].startswith("20")
    assert cli.main(["status", "--storage", str(original / "run")]) == 0
    text = capsys.readouterr().out
    assert "3 layers of 2 models; 0 tables stale or orphaned" in text


def test_status_tells_stale_orphaned_and_unfinished(original, folder, capsys):
    storage = Storage(folder / "run")
    changing = {"model": "stale/changing", "layer": "0"}
    table = storage.read(EXEMPLARS, **changing)
    storage.write(EXEMPLARS, table.replace_schema_metadata(None), "another", **changing)
    storage.remove("exemplars/model=stale%2Fconstant")
    storage.put_work("feed", "images/000000", table)
    storage.put_work("feed", "images/000001", table)
    found = status(capsys, folder)
    states = {(row["table"], row["keys"]["model"], row["keys"]["layer"]): row["state"] for row in found["partitions"]}
    assert states["encodings", "stale/changing", "0"] == "stale: exemplars have changed"
    assert states["descriptions", "stale/changing", "0"] == "stale: exemplars have changed"
    assert states["encodings", "stale/constant", "0"] == "orphaned: exemplars are gone"
    assert states["candidates", "stale/changing", "2"] == ""
    (work,) = found["work"]
    assert (work["config"], work["files"]) == ("feed", 2) and work["bytes"] > 0
