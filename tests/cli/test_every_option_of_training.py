"""Options of descriptions, labels, scores, trainings and experiments: dry runs name what each of them changes.

Rows of tests/cli/test_every_option.py speak of these tests.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import spacy

from milan_ray import cli
from milan_ray.captioner.captioner import Captioner
from milan_ray.captioner.fit import split_units
from milan_ray.config import TrainingConfig
from milan_ray.engine.references import ModelRef, ProbeRef
from milan_ray.engine.stage import Known
from milan_ray.errors import MilanError
from milan_ray.schema import ANNOTATIONS, DESCRIPTIONS, EXEMPLARS, HELD_OUT, PASTED, TRAINING, TRIALS
from milan_ray.stages.captioners import load_captioner, save_captioner
from milan_ray.stages.tuning import Tuning
from milan_ray.stages.tuning_statistics import read_sweep
from milan_ray.stages.tuning_trial import TuningJob
from milan_ray.storage import Storage
from milan_ray.studies.cut_and_paste.run import CutAndPaste, CutAndPasteConfig
from milan_ray.studies.spacy_pipeline import language_name

TESTS = Path(__file__).resolve().parents[1]
TINY = str(TESTS / "plugins/tiny_models.py")
FED = """
from torch import nn
from milan_ray.captioner.encoder import register_encoder
from milan_ray.errors import MilanError

def build(weights):
    if weights is not None:
        raise MilanError(f"fed with {weights}")
    return nn.Sequential(nn.Conv2d(3, 10, 3))

register_encoder("fed", build, ("0",), size=24)
"""
"""An encoder that says which weights it was given."""

Commands = dict[str, list[str]]


@pytest.fixture(scope="module")
def done(ray_session: None, save_clip: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Commands:
    """Verb → what has been done: two networks described, labelled, scored, compared, audited, trained on."""
    place = tmp_path_factory.mktemp("done")
    small = runpy.run_path(str(TESTS / "helpers/damage.py"))
    storage = small["build"](place, save_clip)
    save_clip(place / "clip2")
    save_captioner(storage, "other", small["captioner"](), "Another.")
    commands: Commands = {name: [*arguments] for name, arguments in small["commands"](place).items()}
    at = ["--annotations", "people", "--plugin", TINY, "--storage", storage.root, "--encoder", "tiny"]
    at += ["--epochs", "1", "--hidden", "8", "--embedding", "6"]
    commands["train"] = ["train", *at, "--group", "tiny/cnn", "tiny/twin"]
    splits = ["--split", "tiny/cnn", "tiny/cnn:tiny/twin", "--trials", "1", "--beam-size", "2"]
    commands["generalize"] = ["generalize", *at, *splits, "--no-report"]
    clip = ["--clip", str(place / "clip"), "--clip-beam-size", "6", "--layers", "0"]
    commands["describe"] = [*commands["describe"], *clip]
    # Re-ranked descriptions come later; neither scores nor comparisons are to miss them.
    commands["score"] += ["--labeler", "milan,milan-pdE,clip-dissect"]
    commands["compare"] += ["--labeler", "milan", "clip-dissect", "milan-pdE"]
    for verb in ("describe", "train", "generalize"):
        assert cli.main(commands[verb]) == 0, verb
    return commands


def due(capsys: pytest.CaptureFixture[str], command: list[str], *options: str) -> dict[str, str]:
    """What a dry run would make: table and partition → reason."""
    capsys.readouterr()
    assert cli.main([*command, *options, "--dry-run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)["planned"]
    return {" ".join([step["table"], *step["keys"]]): step["reason"] for step in planned}


WITHIN, ACROSS = "training generalization-within-tiny-cnn-0", "training generalization-tiny-cnn-to-tiny-twin-0"

NAMED = {
    "describe": {
        "--decoder other": ("candidates other tiny/cnn 0", "missing"),
        "--beam-size 3": ("candidates toy tiny/cnn 0", "beam_size changed"),
        "--length 3": ("candidates toy tiny/cnn 0", "length changed"),
        "--reference-quirks": ("candidates toy tiny/cnn 0", "quirks"),
        "--clip {clip2}": ("encodings clip2 tiny/cnn 0", "missing"),
        "--clip-z 0.25": ("descriptions milan+clip tiny/cnn 0", "z changed"),
        "--clip-beam-size 5": ("candidates toy+clip tiny/cnn 0", "beam_size changed"),
        "--clip-lam 0.25": ("candidates toy+clip tiny/cnn 0", "lam changed"),
    },
    "label": {
        "--clip {clip2}": ("image_embeddings clip2", "missing"),
        "--pooling max": ("descriptions clip-dissect tiny/cnn 0", "pooling changed"),
        "--hold-out 0.2": ("descriptions clip-dissect tiny/cnn 0", "hold_out changed"),
        "--reference-quirks": ("exemplars tiny/cnn 0", "view changed"),
    },
    "score": {
        "--clip {clip2}": ("unit_scores clip2 milan tiny/cnn 0", "missing"),
        "--pooling max": ("unit_scores clip milan tiny/cnn 0", "config changed"),
        "--held-out 0.5": ("unit_scores clip milan tiny/cnn 0", "config changed"),
        "--seed 2": ("unit_scores clip milan tiny/cnn 0", "config changed"),
    },
    "compare": {
        "--labeler milan clip-dissect": ("scores comparison", "milan, clip-dissect on 24 units: labels"),
        "--bertscore {clip2}": ("scores comparison", "labels, annotations or scores changed"),
        "--name mine": ("scores mine", "missing"),
    },
    "audit": {
        "--labeler milan-pdE": ("audits faces", "descriptions"),
        "--name mine": ("audits mine", "missing"),
    },
    "train": {
        "--epochs 2": ("training tiny-cnn", "max_epochs changed"),
        "--patience 3": ("training tiny-cnn", "patience changed"),
        "--hold-out 0.5": ("training tiny-cnn", "hold_out changed"),
        "--stop-by loss": ("training tiny-cnn", "stop_by"),
        "--hidden 9": ("training tiny-cnn", "hidden changed"),
        "--embedding 9": ("training tiny-cnn", "embedding changed"),
        "--bf16": ("training tiny-cnn", "bf16 changed"),
        "--seed 2": ("training tiny-cnn", "seed changed"),
        "--reference-quirks": ("training tiny-cnn", "keep_last_weights changed"),
    },
    "generalize": {
        "--epochs 2": (ACROSS, "max_epochs changed"),
        "--patience 3": (ACROSS, "patience changed"),
        "--within-patience 3": (WITHIN, "patience changed"),
        "--share 0.4": (WITHIN, "units changed"),
        "--hold-out 0.5": (ACROSS, "hold_out changed"),
        "--stop-by loss": (ACROSS, "stop_by"),
        "--hidden 9": (ACROSS, "hidden changed"),
        "--embedding 9": (ACROSS, "embedding changed"),
        "--bf16": (ACROSS, "bf16 changed"),
        "--seed 2": (ACROSS, "seed changed"),
        "--trials 2": (ACROSS.replace("-0", "-1"), "missing"),
        "--beam-size 3": ("held_out generalization tiny-cnn-to-tiny-twin 0", "beam_size changed"),
        "--reference-quirks": ("held_out generalization tiny-cnn-to-tiny-twin 0", "quirks"),
        "--bertscore {clip2}": ("generalization generalization tiny-cnn-to-tiny-twin", "bertscore changed"),
        "--name mine": (ACROSS.replace("generalization", "mine"), "missing"),
    },
}
"""Verb → options → a table that is stale with them, and why."""


@pytest.mark.parametrize("verb", NAMED)
def test_dry_runs_of_what_is_done_name_what_an_option_changes(done, verb, capsys) -> None:
    assert due(capsys, done[verb]) == {}
    clip2 = str(Path(done["describe"][done["describe"].index("--clip") + 1]).with_name("clip2"))
    wrong = {}
    for options, (table, reason) in NAMED[verb].items():
        found = due(capsys, done[verb], *options.format(clip2=clip2).split())
        if not any(key.startswith(table) and reason in why for key, why in found.items()):
            wrong[options] = found
    assert not wrong


def test_patience_of_one_kind_of_split_leaves_the_other_alone(done, capsys) -> None:
    for option, stale, current in (("--patience", ACROSS, WITHIN), ("--within-patience", WITHIN, ACROSS)):
        found = due(capsys, done["generalize"], option, "3")
        assert stale in found and current not in found


def test_audits_describe_with_the_options_of_describing(done, capsys) -> None:
    describe = done["describe"]
    clip2 = str(Path(describe[describe.index("--clip") + 1]).with_name("clip2"))
    command = ["audit", "--pair", "tiny/cnn", "tiny/twin", "--words", "red", *describe[1:]]
    assert not [key for key in due(capsys, command) if not key.startswith("audits")]
    for options, (table, reason) in NAMED["describe"].items():
        found = due(capsys, command, *options.format(clip2=clip2).split())
        assert any(key.startswith(table) and reason in why for key, why in found.items()), (options, found)
    exemplars = [
        "exemplars",
        *(part for part in describe[1 : describe.index("--decoder")]),
        "--pooled",
        "--layers",
        "0",
    ]
    found = due(capsys, [*exemplars, "--k", "3", "--batch-size", "16"], "--reference-quirks")
    assert found["exemplars tiny/cnn 0"] == "view changed"


def test_scores_and_searches_of_one_labeler_leave_the_others_alone(done, capsys) -> None:
    stale = due(capsys, done["score"], "--seed", "2", "--labeler", "milan")
    assert stale and all(" milan " in key for key in stale)
    storage = done["search"][-2:]
    assert cli.main([*done["search"], "--labeler", "milan-pdE", "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert found and {row["labeler"] for row in found} == {"milan-pdE"}
    for verb in (["diff", "tiny/cnn", "tiny/twin"], ["search", "dog"]):
        assert cli.main([*verb, *storage, "--labeler", "nobody"]) == 1
        assert "nobody" in capsys.readouterr().err


def test_trainings_have_the_epochs_and_sizes_asked_for(done) -> None:
    storage = Storage(done["train"][done["train"].index("--storage") + 1])
    assert storage.count(TRAINING, decoder="tiny-cnn") == 2  # an epoch of each part
    decoder = load_captioner(storage, "tiny-cnn").decoder
    assert (decoder.config.hidden_size, decoder.config.embedding_size) == (8, 6)


@pytest.mark.parametrize("verb", ["train", "generalize"])
def test_more_training_workers_than_there_is_room_for_are_refused(done, verb, capsys) -> None:
    assert cli.main([*done[verb], "--workers", "999", "--seed", "5"]) == 1
    assert "999 training workers" in capsys.readouterr().err


def test_generalize_with_the_references_defects_counts_past_stop(done, capsys) -> None:
    command = [*done["generalize"], "--name", "defects", "--reference-quirks"]
    assert cli.main(command) == 0
    assert due(capsys, command) == {}
    storage = Storage(done["train"][done["train"].index("--storage") + 1])
    keys = {"experiment": "defects", "split": "tiny-cnn-to-tiny-twin", "trial": "0"}
    assert storage.count(HELD_OUT, **keys) == 4 * 6


@pytest.mark.parametrize(
    ("split", "option", "says"),
    [
        ("tiny/cnn:tiny/twin", "--share", "where no split divides"),
        ("tiny/cnn:tiny/twin", "--within-patience", "where no split divides"),
        ("tiny/cnn", "--patience", "where every split divides"),
    ],
)
def test_options_of_splits_that_are_not_asked_for_are_refused(done, split, option, says, capsys) -> None:
    command = done["generalize"]
    place = command.index("--split")
    assert cli.main([*command[:place], "--split", split, *command[place + 3 :], option, "1"]) == 1
    said = capsys.readouterr().err
    assert says in said and f"{option} would do nothing" in said


def test_cluster_options_of_verbs_that_run_nothing_there_are_refused(done, capsys) -> None:
    for verb, option in (
        ("compare", ["--device", "cpu"]),
        ("audit", ["--address", "h:1"]),
        ("audit", ["--actors", "2"]),
    ):
        assert cli.main([*done[verb], *option]) == 1
        assert f"{option[0]} would do nothing" in capsys.readouterr().err


@pytest.fixture
def fed(tmp_path: Path) -> Callable[..., int]:
    """A captioner with an encoder that says its weights, and one network's annotations."""
    plugin = tmp_path / "fed.py"
    plugin.write_text(FED)
    storage = Storage(tmp_path / "run")
    toy: Captioner = runpy.run_path(str(TESTS / "helpers/damage.py"))["captioner"]()
    state = {"0.bias": toy.decoder.state_dict().popitem()[1].flatten()[:10].clone()}
    save_captioner(storage, "toy", Captioner(toy.indexer, toy.decoder, toy.lm, "fed", state, 4, 5), "Fed.")
    rows: dict[str, list[object]] = {column: [] for column in EXEMPLARS.schema.names}
    said = {"source": "people", "model": "tiny/cnn", "layer": "0", "unit": 0, "annotator": "A", "text": "red dogs"}
    keys = {"model": "tiny/cnn", "layer": "0"}
    storage.write(EXEMPLARS, EXEMPLARS.table(rows), "e", **keys)
    storage.write(ANNOTATIONS, ANNOTATIONS.table({k: [v] for k, v in said.items()}), "a", source="people", **keys)
    (tmp_path / "sweep.yaml").write_text("beam_sizes: [2]\nlams: [0.2]\nmetric: bleu-2\n")
    common = ["--storage", storage.root, "--plugin", str(plugin), "--plugin", TINY]
    return lambda *command: cli.main([*command, *common])


WEIGHTS = {
    "describe": "describe --model tiny/cnn --layers 0 --decoder toy",
    "train": "train --annotations people --name one --encoder fed --dry-run",
    "export": "export {folder}/milan.pth --decoder toy",
    "tune": "tune --annotations people --decoder toy --config {folder}/sweep.yaml --dry-run",
    "generalize": "generalize --annotations people --split tiny/cnn --encoder fed --dry-run",
    "baselines": "baselines --model tiny/cnn --layers 0 --decoder toy --probe {few} --dry-run",
    "audit": "audit --pair tiny/cnn tiny/twin --layers 0 --decoder toy --probe {few} --dry-run",
    "plan": "plan --model tiny/cnn --layers 0 --images 9 --sample 4 --decoder toy",
}


@pytest.mark.parametrize("verb", WEIGHTS)
def test_encoder_weights_reach_the_encoder_even_of_a_captioner_that_brings_its_own(
    fed, verb, photos, tmp_path, capsys
) -> None:
    command = WEIGHTS[verb].format(folder=tmp_path, few=photos / "class 0").split(" --")
    words = [
        part for number, option in enumerate(command) for part in (f"--{option}" if number else option).split(" ", 1)
    ]
    words = [word for part in words for word in ([part] if str(photos) in part else part.split())]
    assert fed(*words, "--encoder-weights", str(tmp_path / "mine.pth")) == 1
    assert f"fed with {tmp_path / 'mine.pth'}" in capsys.readouterr().err
    if "toy" in words:  # and the captioner is the one asked for
        words[words.index("toy")] = "nobody"
        assert fed(*words) == 1
        assert "no captioner 'nobody'" in capsys.readouterr().err


def test_options_of_pasting_are_those_of_its_fingerprint(photos, tmp_path, capsys) -> None:
    storage, source = Storage(tmp_path / "run"), ProbeRef((str(photos),))
    keys = {"model": "tiny/cnn", "layer": "2"}
    storage.write(EXEMPLARS, EXEMPLARS.table({column: [] for column in EXEMPLARS.schema.names}), "e", **keys)
    for labeler in ("milan", "other"):
        rows = {"unit": [*range(8)], "description": ["lines"] * 8, "score": [0.0] * 8, "n_best": [[]] * 8}
        rows |= {name: [value] * 8 for name, value in {"labeler": labeler, **keys}.items()}
        rows |= {column: [None] * 8 for column in DESCRIPTIONS.schema.names if column not in rows}
        storage.write(DESCRIPTIONS, DESCRIPTIONS.table(rows), f"d {labeler}", labeler=labeler, **keys)
    model, config = ModelRef("tiny/cnn", layers=("2",), plugins=(TINY,)), CutAndPasteConfig(units=3, pool=9, seed=4)
    (output,) = CutAndPaste(model, source, language_name(), config).outputs(Known(storage))
    empty = PASTED.table({column: [] for column in PASTED.schema.names})
    storage.write(PASTED, empty, output.fingerprint, experiment="cut-and-paste", model="tiny/cnn")
    command = ["paste", "--model", "tiny/cnn", "--layers", "2", "--plugin", TINY, "--probe", str(photos)]
    command += ["--storage", storage.root, "--each", "3", "--pool", "9", "--seed", "4"]
    assert due(capsys, command) == {}
    for option in (["--pool", "8"], ["--seed", "3"]):
        assert list(due(capsys, command, *option).values()) == ["pasting changed"]
    (reason,) = due(capsys, command, "--labeler", "other").values()
    assert "descriptions" in reason


def test_trainings_that_would_hold_out_every_unit_say_so() -> None:
    with pytest.raises(MilanError, match="of 5 annotated units 5 would be held out to stop early"):
        split_units(5, TrainingConfig(hold_out=1.0))


@pytest.mark.parametrize(
    "command",
    [
        ["generalize", "--seed", "-1"],
        ["generalize", "--within-patience", "-1"],
        ["analyze", "--model", "m", "--probe", "p", "--ties", "-1"],
        ["annotations", "import", "x.csv", "--annotation-count", "-1"],
    ],
)
def test_counts_and_seeds_are_not_below_zero(command, capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main(command)
    assert "-1 is not at least 0" in capsys.readouterr().err


ADDRESS = """
import sys, json
from milan_ray import cli
for command in json.loads(sys.stdin.read()):
    print(json.dumps([command[0], cli.main([*command, "--address", "127.0.0.1:1"])]), file=sys.stderr, flush=True)
"""


@pytest.mark.slow
def test_address_is_where_ray_is_looked_for(photos, tmp_path) -> None:
    storage = Storage(tmp_path / "run")
    toy = runpy.run_path(str(TESTS / "helpers/damage.py"))["captioner"]()
    save_captioner(storage, "toy", toy, "A toy.")
    models = ("tiny/cnn", "tiny/twin")
    for model in models:
        keys = {"model": model, "layer": "0"}
        annotation = {"source": "people", **keys, "unit": 0, "annotator": "A", "text": "red dogs"}
        table = ANNOTATIONS.table({name: [value] for name, value in annotation.items()})
        storage.write(ANNOTATIONS, table, "a", source="people", **keys)
        row = {"labeler": "milan", **keys, "unit": 0, "description": "dogs", "score": 0.0, "n_best": []}
        columns = {name: [row.get(name)] for name in DESCRIPTIONS.schema.names}
        storage.write(DESCRIPTIONS, DESCRIPTIONS.table(columns), "d", labeler="milan", **keys)
    (tmp_path / "sweep.yaml").write_text("beam_sizes: [2]\nlams: [0.2]\nmetric: bleu-2\n")
    spacy.blank("en").to_disk(tmp_path / "en")
    flags, colours = (str(TESTS / f"plugins/{name}.py") for name in ("flags", "colours"))
    at = ["--storage", storage.root, "--plugin", TINY, "--plugin", flags, "--plugin", colours]
    network = ["--model", "tiny/cnn", "--layers", "0", "--probe", str(photos), *at]
    flag = ["--model", "flags/watcher", "--layers", "seen", "--probe", "flags", *at]
    people, english = ["--annotations", "people", *at], ["--language", str(tmp_path / "en")]
    dnd = ["--model", "colours/watcher", "--probe", "colours", "--llm", "frequent", "--captioner", "colours/names"]
    dnd += ["--generator", "world/painter", "--scoring", "mean"]
    commands = [
        ["exemplars", *network],
        ["describe", *network, "--decoder", "toy"],
        ["label", *flag],
        ["train", *people, "--name", "one", "--encoder", "tiny"],
        ["dnd", *dnd, *at],
        ["tune", *people, "--decoder", "toy", "--config", str(tmp_path / "sweep.yaml")],
        ["demo", "--storage", storage.root],
        ["score", *network, "--clip", "flags/truth"],
        ["generalize", *people, "--split", "tiny/cnn:tiny/twin", "--encoder", "tiny", *english],
        ["baselines", *flag, "--decoder", "toy"],
        ["compare", *at],
        ["analyze", *network, *english],
        ["edit", *network],
        ["audit", "--pair", *models, "--layers", "0", "--probe", str(photos), "--decoder", "toy", *at],
        ["paste", *network, *english],
        ["paper", "--small", "--storage", storage.root],
        ["doctor", *at],
    ]
    environment = {**os.environ, "MILAN_MODELS_DIR": str(tmp_path / "models"), "PYTHONPATH": str(TESTS.parent)}
    environment.pop("RAY_ADDRESS", None)
    job = subprocess.run(
        [sys.executable, "-c", ADDRESS],
        input=json.dumps(commands),
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    said: dict[str, str] = {}
    lines: list[str] = []
    for line in job.stderr.splitlines():
        lines.append(line)
        if line.startswith('["'):
            verb, status = json.loads(line)
            said[verb] = f"{status}: " + " ".join(lines[:-1])
            lines = []
    assert list(said) == [command[0] for command in commands]
    doctor = said.pop("doctor")
    reached = {verb for verb, text in said.items() if "1: " in text and "Ray cluster at 127.0.0.1:1" in text}
    assert reached == set(said), {verb: said[verb][-400:] for verb in set(said) - reached}
    assert "127.0.0.1:1" in doctor + job.stdout


def test_language_model_of_tuning_is_part_of_what_decides(done, tmp_path, capsys) -> None:
    storage = Storage(done["train"][done["train"].index("--storage") + 1])
    file = tmp_path / "sweep.yaml"
    file.write_text("beam_sizes: [2]\nlams: [0.2]\nmetric: bleu-2\n")
    layers = tuple((keys["model"], keys["layer"]) for keys in storage.partitions(ANNOTATIONS, source="people"))
    sweep, folder = read_sweep(file.read_text(), "sweep"), str(tmp_path / "mine")
    job = TuningJob("sweep", "toy", "people", layers, sweep, folder)
    (output,) = Tuning(job).outputs(Known(storage))
    empty = TRIALS.table({column: [] for column in TRIALS.schema.names})
    storage.write(TRIALS, empty, output.fingerprint, decoder="toy", sweep="sweep")
    command = [*done["tune"][:-1], "--config", str(file)]
    assert due(capsys, command, "--bert-model", folder) == {}
    (reason,) = due(capsys, command, "--bert-model", str(tmp_path / "other")).values()
    assert reason.endswith("bert_model changed")


def test_agreement_takes_the_language_model_asked_for(done, tmp_path, capsys) -> None:
    absent = str(tmp_path / "absent")
    assert cli.main([*done["annotations statistics"], "--bertscore", absent]) == 1
    assert absent in capsys.readouterr().err
