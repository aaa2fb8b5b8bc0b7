"""``--dry-run`` of the experiments: what would be made, and why, from an empty folder on; and nothing is written.

What it says of finished ones stands beside the tests of these, in tests/stages/.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from toys import toy_captioner

from milan_ray import cli
from milan_ray.engine.references import ModelRef, ProbeRef
from milan_ray.engine.stage import Known
from milan_ray.schema import ANNOTATIONS, CLAIMS, DESCRIPTIONS, EXEMPLARS, PASTED
from milan_ray.stages.captioners import load_captioner, save_captioner
from milan_ray.storage import Storage
from milan_ray.studies.cut_and_paste.run import CutAndPaste, CutAndPasteConfig
from milan_ray.studies.spacy_pipeline import language_name

PLUGINS = Path(__file__).resolve().parents[1] / "plugins"
TINY, FLAGS, WORLD = (str(PLUGINS / f"{name}.py") for name in ("tiny_models", "flags", "tiny_world"))

DryRun = Callable[..., dict[str, str]]

WITHOUT = {
    "models", "export", "search", "diff", "annotations", "report", "doctor", "plan", "status", "benchmark", "features",
}  # fmt: skip
"""Verbs without a dry run, with the reason in docs/command-line.md."""


@pytest.fixture(autouse=True)
def models(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of models of its own."""
    folder = tmp_path_factory.mktemp("models")
    monkeypatch.setenv("MILAN_MODELS_DIR", str(folder))
    return folder


def test_every_verb_has_a_dry_run_or_the_documentation_says_why_not() -> None:
    (verbs,) = (a for a in cli.build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert {name for name, verb in verbs.choices.items() if "--dry-run" not in verb._option_string_actions} == WITHOUT
    page = (Path(__file__).parents[2] / "docs/command-line.md").read_text(encoding="utf-8")
    told = page[page.index("## What would be made") :]
    assert all(f"`{name}`" in told for name in WITHOUT)


def describe(storage: Storage, model: str, layer: str, texts: list[str]) -> None:
    keys = {"labeler": "milan", "model": model, "layer": layer}
    rows = [{**keys, "unit": unit, "description": text, "score": 0.0, "n_best": []} for unit, text in enumerate(texts)]
    table = DESCRIPTIONS.table({column.name: [row.get(column.name) for row in rows] for column in DESCRIPTIONS.columns})
    storage.write(DESCRIPTIONS, table, f"d{layer}", **keys)


def annotate(storage: Storage, model: str, layer: str, units: int) -> None:
    keys = {"source": "people", "model": model, "layer": layer}
    rows = [{**keys, "unit": unit, "annotator": "0", "text": "a red house"} for unit in range(units)]
    table = ANNOTATIONS.table({column.name: [row[column.name] for row in rows] for column in ANNOTATIONS.columns})
    storage.write(ANNOTATIONS, table, f"said of {model}", **keys)


def test_demo_begins_with_its_networks(tmp_path, dry_run: DryRun) -> None:
    said = dry_run(str(tmp_path / "run"), "demo")
    networks = {f"networks {name}": "missing" for name in ("encoder", "planted", "resnet", "vit", "cnn")}
    assert {key: said.pop(key) for key in networks} == networks
    assert {key.split()[0] for key in said} == {
        "exemplars", "annotations", "encodings", "training", "descriptions", "trials", "scores",
    }  # fmt: skip
    assert set(said.values()) == {"not known before: networks"}
    assert "networks superposed" not in said
    more = dry_run(str(tmp_path / "run"), "demo", "--clip", "--generator", "--groups", "--superposed")
    assert {"networks superposed", "exemplars world/superposed"} <= set(more)
    assert {"networks clip/model", "networks generator", "networks cnn-places", "training of every group"} <= set(more)
    assert not (tmp_path / "run").exists()


SMALL = """
import sys
from dataclasses import replace
from milan_ray import runtime
runtime.prepare(None)
from safetensors.torch import save_file
from milan_ray.config import ExemplarConfig, TrainingConfig
from milan_ray.stages.tuning_statistics import Sweep
from milan_ray.showcase import demo
from milan_ray.showcase.demo import plan_demo
from milan_ray.engine.references import ProbeRef
from milan_ray.plugins import load_plugins
from milan_ray.storage import Storage
from milan_ray.world.encoder import EncoderNet
from milan_ray.world.networks import ARCHITECTURES, PlantedNet
from milan_ray.world.plugin import weights_dir

load_plugins()
networks = {name: architecture.build() for name, architecture in ARCHITECTURES.items()}
weights_dir().mkdir(parents=True)
for name, network in {**networks, "planted": PlantedNet(), "encoder": EncoderNet()}.items():
    save_file(network.state_dict(), weights_dir() / f"{name}.safetensors")
few = {"plugins": (sys.argv[2],)}
demo.PROBE, demo.HELD_OUT_SCENES = ProbeRef(("tiny/probe",), **few), ProbeRef(("tiny/train",), **few)
demo.EXEMPLARS, demo.TRAINING = ExemplarConfig(k=2, batch_size=40), TrainingConfig(max_epochs=1)
demo.SEARCH, demo.SWEEP = replace(demo.SEARCH, beam_size=2), Sweep((2,), (0.0, 0.2), metric="rouge-l-f")
demo.minilm_directory = lambda: None
storage = Storage(sys.argv[1])
print(plan_demo(storage).text())
"""
"""The demo with untrained networks and 40 scenes, planned; tests/test_demo.py plans a finished one."""


@pytest.mark.slow
def test_demo_says_which_layers_where_its_networks_are_there(tmp_path) -> None:
    environment = {**os.environ, "MILAN_MODELS_DIR": str(tmp_path / "models")}
    command = [sys.executable, "-c", SMALL, str(tmp_path / "run"), WORLD]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    *lines, closing = done.stdout.splitlines()
    said = {f"{row[0]} {row[1]}": row[2] for row in (re.split(r"\s{2,}", line) for line in lines) if len(row) == 3}
    assert said["exemplars world/planted planted"] == said["encodings world world/planted planted"] == "missing"
    assert said["annotations world world/planted planted"] == "missing"
    assert not [key for key in said if key.startswith(("networks", "annotations world world/resnet-random"))]
    assert said["training world"] == "not known before: exemplars, annotations"
    assert said["descriptions the demo's networks"] == "not known before: training"
    assert closing.startswith("47 networks and tables would be made, 5 are up to date, 4 depend on them;")
    assert not (tmp_path / "run").exists()


def test_paper_stands_on_the_demo_and_finds_its_claims_anew(tmp_path, dry_run: DryRun) -> None:
    storage = Storage(tmp_path / "run")
    storage.write(CLAIMS, CLAIMS.table({column.name: [] for column in CLAIMS.columns}), "c", experiment="audit")
    said = dry_run(storage.root, "paper", "--only", "audit,analysis")
    assert said["claims analysis"] == "missing" and said["claims audit"].startswith("found anew by every run")
    assert {"networks planted", "networks generator", "networks cnn-places"} <= set(said)
    assert "networks generator" not in dry_run(storage.root, "paper", "--small")


def test_paste_says_what_is_missing(photos, tmp_path, dry_run: DryRun) -> None:
    storage = Storage(tmp_path / "run")
    describe(storage, "tiny/cnn", "2", ["lines"] * 8)
    rows: dict[str, list[object]] = {column.name: [] for column in EXEMPLARS.columns}
    storage.write(EXEMPLARS, EXEMPLARS.table(rows), "e", model="tiny/cnn", layer="2")
    command = ["paste", "--model", "tiny/cnn", "--layers", "2", "--plugin", TINY, "--probe", str(photos)]
    assert dry_run(storage.root, *command) == {"pasted cut-and-paste tiny/cnn": "missing"}
    request, images = ModelRef("tiny/cnn", layers=("2",), plugins=(TINY,)), ProbeRef((str(photos),))
    config = CutAndPasteConfig(units=3, originals=4, distractors=5)
    (output,) = CutAndPaste(request, images, language_name(None), config).outputs(Known(storage))
    fingerprint = output.fingerprint
    rows = {column.name: [] for column in PASTED.columns}
    storage.write(PASTED, PASTED.table(rows), fingerprint, experiment="cut-and-paste", model="tiny/cnn")
    same = {"--each": "3", "--originals": "4", "--distractors": "5"}
    assert dry_run(storage.root, *command, *(part for option in same.items() for part in option)) == {}
    for left_out in same:
        others = (part for option in same.items() if option[0] != left_out for part in option)
        assert dry_run(storage.root, *command, *others) == {"pasted cut-and-paste tiny/cnn": "pasting changed"}


def test_generalize_knows_its_units_when_encodings_are_there(tmp_path, dry_run: DryRun) -> None:
    storage = Storage(tmp_path / "run")
    rows: dict[str, list[object]] = {column.name: [] for column in EXEMPLARS.columns}
    for model in ("mine/a", "mine/b"):
        storage.write(EXEMPLARS, EXEMPLARS.table(rows), "e", model=model, layer="0")
        annotate(storage, model, "0", 4)
    command = ["generalize", "--annotations", "people", "--split", "mine/a:mine/b", "--encoder", "tiny"]
    said = dry_run(storage.root, *command, "--plugin", TINY)
    later = "not known before: encodings"
    assert said == {
        "encodings tiny mine/a 0": "missing",
        "encodings tiny mine/b 0": "missing",
        **{
            f"{table} generalization": later for table in ("splits", "training", "held_out", "generalization", "scores")
        },
    }


@pytest.fixture
def toy(tmp_path: Path) -> Storage:
    """A run directory with a captioner of tiny encodings."""
    storage = Storage(tmp_path / "run")
    save_captioner(storage, "toy", toy_captioner(length=5, beam_size=6), "A toy.")
    return storage


@pytest.mark.usefixtures("ray_session")
def test_baselines_from_nothing_to_done(toy: Storage, dry_run: DryRun) -> None:
    storage = toy
    annotate(storage, "flags/watcher", "seen", 5)
    command = ["baselines", "--model", "flags/watcher", "--layers", "seen", "--probe", "flags", "--decoder", "toy"]
    command += ["--plugin", FLAGS, "--plugin", TINY, "--k", "3", "--no-report", "--device", "cpu"]
    of_layer = ("exemplars", "encodings tiny", "candidates toy", "descriptions milan", "descriptions milan-pdE")
    labels = ("descriptions netdissect", "descriptions compexp")
    later = "not known before: exemplars, encodings, candidates, descriptions"
    of_network, every = "scores baselines of flags/watcher", "scores baselines"
    assert dry_run(storage.root, *command) == {
        **{f"{table} flags/watcher seen": "missing" for table in (*of_layer, *labels)},
        of_network: later,
        every: "not known before: scores",
    }
    assert cli.main([*command, "--storage", storage.root]) == 0
    assert dry_run(storage.root, *command) == {}
    save_captioner(storage, "other", load_captioner(storage, "toy"), "Another.")
    candidates = "candidates toy flags/watcher seen"
    for option, table, reason in (
        (["--decoder", "other"], "candidates other flags/watcher seen", "missing"),
        (["--beam-size", "3"], candidates, "beam_size changed"),
        (["--length", "3"], candidates, "length changed"),
        (["--bertscore", toy.root], of_network, "labels, annotations or scores changed"),
        (["--name", "mine"], "scores mine", ""),
        (["--reference-quirks"], "exemplars flags/watcher seen", "view changed"),
    ):
        found = dry_run(storage.root, *command, *option)
        assert any(key.startswith(table) and reason in why for key, why in found.items()), (option, found)
    label = ["label", *command[1:7], *command[9:]]
    for option in (["--formula-beam-size", "2"], ["--formula-length", "2"]):
        assert list(dry_run(storage.root, *label, *option)) == ["descriptions compexp flags/watcher seen"]
    one = dry_run(storage.root, *label, "--grid", "5", "--labeler", "netdissect")
    assert list(one) == ["descriptions netdissect flags/watcher seen"]
    annotate(storage, "flags/watcher", "seen", 4)
    again = dry_run(storage.root, *command)
    assert set(again) == {of_network, every} and again[of_network].endswith("labels, annotations or scores changed")


def test_audit_waits_for_descriptions_where_it_makes_them(photos, toy: Storage, dry_run: DryRun) -> None:
    pair = ["audit", "--pair", "tiny/cnn", "tiny/twin"]
    describing = ["--decoder", "toy", "--probe", str(photos), "--layers", "0", "--plugin", TINY]
    said = dry_run(toy.root, *pair, *describing)
    assert said.pop("audits faces") == "not known before: descriptions"
    assert set(said.values()) == {"missing"} and "descriptions milan tiny/twin 0" in said
    for model in ("tiny/cnn", "tiny/twin"):
        describe(toy, model, "0", ["a face"] * 6)
    assert dry_run(toy.root, *pair) == {"audits faces": "missing"}


@pytest.mark.slow
def test_dry_runs_start_no_ray(tmp_path) -> None:
    script = "import sys, ray; from milan_ray import cli; s = cli.main(sys.argv[1:]); print(ray.is_initialized(), s)"
    command = ["demo", "--groups", "--storage", str(tmp_path / "run"), "--dry-run"]
    done = subprocess.run([sys.executable, "-c", script, *command], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False 0" and not (tmp_path / "run").exists()
