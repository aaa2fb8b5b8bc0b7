"""A zoo of 24 networks of the world, plain and face-blurred, and three that fail, described in one job."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import polars as pl
import pytest
from toys import toy_captioner

from milan_ray import cli
from milan_ray.errors import MilanError
from milan_ray.models.registry import match_models
from milan_ray.plugins import load_plugins
from milan_ray.schema import AUDITS, DESCRIPTIONS, EXEMPLARS, MANIFEST, RUNS
from milan_ray.stages.captioners import save_captioner
from milan_ray.storage import Storage

PLUGINS = Path(__file__).resolve().parents[1] / "plugins"
NETWORKS = [f"{architecture}{seed}" for architecture in ("cnn", "resnet", "vit") for seed in range(4)]
MODELS = sorted(f"{network}/{data}" for network in NETWORKS for data in ("scenes", "scenes-blurred"))
LAYERS = {"cnn": ("conv1", "conv3"), "resnet": ("layer2", "stem"), "vit": ("blocks.2", "stem")}
UNITS = 8
"""Units of every layer that are described; exemplars are always of all."""
BROKEN = ("bad-batch/bad", "unbuildable/bad", "unfetched/bad")
SHARDS = 6


def layers_of(model: str) -> tuple[str, ...]:
    return LAYERS[model.split("/")[0].rstrip("0123456789")]


@pytest.fixture(scope="module")
def plugin(tmp_path_factory) -> Path:
    """The zoo's plug-in, beside its networks' weights and a file in which it notes what is built where."""
    folder = tmp_path_factory.mktemp("zoo")
    (folder / "loads").touch()
    path = Path(shutil.copy(PLUGINS / "zoo_models.py", folder))
    spec = importlib.util.spec_from_file_location("zoo_weights", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.train()
    return path


@pytest.fixture(scope="module")
def described(ray_session, plugin, tmp_path_factory) -> tuple[Storage, int, str]:
    """(the run directory, the job's exit status, what it said)."""
    storage = Storage(tmp_path_factory.mktemp("run"))
    save_captioner(storage, "toy", toy_captioner(), "A toy.")
    zoo = [
        "--zoo",
        "scenes,scenes-blurred,bad",
        "--plugin",
        str(plugin),
        "--plugin",
        str(PLUGINS / "tiny_models.py"),
    ]
    options = ["--probe", "scenes", "--decoder", "toy", "--beam-size", "3", "--k", "3", "--batch-size", "8"]
    options += [
        "--units",
        f"0-{UNITS - 1}",
        "--shard-size",
        str(48 // SHARDS),
        "--storage",
        storage.root,
        "--no-report",
        "--actors",
        "2",
    ]
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        status = cli.main(["describe", *zoo, *options])
    return storage, status, said.getvalue()


@pytest.mark.slow
def test_zoo_is_described_in_one_job(described):
    storage, _, said = described
    for labeler in ("milan", "milan-pdE"):
        assert sorted(keys["model"] for keys in storage.partitions(DESCRIPTIONS, labeler=labeler)) == sorted(MODELS * 2)
    frame = pl.scan_parquet(f"{storage.root}/descriptions/**/*.parquet", hive_partitioning=True)
    units = frame.filter(pl.col("labeler") == "milan").group_by("model", "layer").len().collect()
    assert sorted(units.rows()) == [(model, layer, UNITS) for model in MODELS for layer in layers_of(model)]
    for stage in ("encodings", "descriptions"):
        lines = [line for line in said.splitlines() if line.startswith(f"  {stage}: ")]
        assert lines[-1].endswith("(24/24 models, 48/48 layers)")
    # Every image once, 32 at a time, for all models of the view: two chunks at most.
    assert re.search(r"  encodings: (1/1|2/2) chunks of images in", said)


@pytest.mark.slow
def test_zoo_with_failing_models_says_so_and_finishes_the_others(described):
    storage, status, said = described
    assert status == 1
    assert {keys["model"] for keys in storage.partitions(EXEMPLARS)} == set(MODELS)
    closing = said[said.index("descriptions: 48 layers of 24 models in ") :].splitlines()
    assert storage.root in closing[0]
    reasons = dict(line.removeprefix("skipped ").split(": ", 1) for line in closing[1:])
    assert set(reasons) == set(BROKEN)
    assert "does not run on a test batch" in reasons["bad-batch/bad"]
    assert "ValueError: this batch is not to my taste" in reasons["bad-batch/bad"]
    assert "cannot be built: RuntimeError: out of order" in reasons["unbuildable/bad"]
    assert "unfetched-0.pth" in reasons["unfetched/bad"]


@pytest.mark.slow
def test_zoo_builds_every_model_once_per_process(described, plugin):
    loads = Counter(plugin.with_name("loads").read_text().splitlines())
    assert set(loads.values()) == {1}
    assert len({line.split()[0] for line in loads}) <= 3  # the driver, two actors
    assert {line.split()[1] for line in loads} == {*MODELS, "bad-batch"}


@pytest.mark.slow
def test_zoo_has_a_run_for_every_stage_model_and_layer(described):
    storage, _, _ = described
    runs = [storage.read(RUNS, **keys).to_pylist()[0] for keys in storage.partitions(RUNS)]
    expected = [(model, layer) for model in MODELS for layer in layers_of(model)]
    for stage in ("exemplars", "encodings", "candidates"):
        assert sorted((row["model"], row["layer"]) for row in runs if row["stage"] == stage) == expected
    for row in runs:
        assert row["seconds"] > 0 and row["rows"] > 0
        assert set(json.loads(row["versions"])) == {"milan_ray", "torch", "ray"}
    for row in runs:
        if row["stage"] == "exemplars":
            whole = row["seconds"] * len(layers_of(row["model"]))
            assert row["images"] == 48 and row["images_per_second"] == pytest.approx(48 / whole)
            assert row["run"] == storage.config_of(EXEMPLARS, model=row["model"], layer=row["layer"])


@pytest.mark.slow
def test_zoo_of_plain_and_blurred_networks_is_dissected_on_the_same_plain_images(described):
    storage, _, _ = described
    (probe,) = {storage.metadata(EXEMPLARS, **keys)["probe"] for keys in storage.partitions(EXEMPLARS)}
    assert set(storage.read(MANIFEST, probe=probe)["root"].to_pylist()) == {"world:probe"}
    for network in NETWORKS:
        layer = layers_of(network)[0]
        plain, blurred = (
            storage.read(EXEMPLARS, ["activation"], model=f"{network}/{data}", layer=layer)
            for data in ("scenes", "scenes-blurred")
        )
        assert not plain.equals(blurred)


@pytest.mark.slow
def test_zoo_is_audited_pair_by_pair(described):
    storage, _, _ = described
    assert cli.main(["audit", "--words", "dog|house", "--storage", storage.root, "--no-report"]) == 0
    pairs = pl.DataFrame(pl.from_arrow(storage.read(AUDITS, audit="faces")))
    assert pairs.select("model", "other").rows() == [(f"{n}/scenes", f"{n}/scenes-blurred") for n in NETWORKS]
    assert set(pairs["images"]) == {"world:probe"} and set(pairs["of"]) == set(pairs["other_of"]) == {2 * UNITS}
    frame = pl.scan_parquet(f"{storage.root}/descriptions/**/*.parquet", hive_partitioning=True)
    said = frame.filter(pl.col("labeler") == "milan", pl.col("description").str.contains(r"(?i)\b(dogs?|houses?)\b"))
    units = dict(said.group_by("model").len().collect().iter_rows())
    for model, other, mine, theirs in pairs.select("model", "other", "units", "other_units").iter_rows():
        assert (mine, theirs) == (units.get(model, 0), units.get(other, 0))


def test_match_models_by_pattern_of_whole_names_or_of_what_follows():
    load_plugins([str(PLUGINS / "zoo_models.py")])
    assert match_models("cnn3/scenes") == ["cnn3/scenes"]
    assert match_models("scenes") == [f"{network}/scenes" for network in NETWORKS]
    assert match_models("scenes*") == MODELS
    assert match_models("vit[12]/*-blurred") == ["vit1/scenes-blurred", "vit2/scenes-blurred"]
    with pytest.raises(MilanError, match="unknown model 'scene'"):
        match_models("scene")
