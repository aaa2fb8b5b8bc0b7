"""Training captioners: the same curve in memory and from disk, on one worker and two, and after a kill; groups."""

from __future__ import annotations

import io
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from gates import Gate, wait_until
from toys import train_here

from milan_ray import cli
from milan_ray.annotations.groups import groups_of
from milan_ray.captioner.fit import Sizes, fit, new_state
from milan_ray.config import Resources, TrainingConfig
from milan_ray.errors import MilanError
from milan_ray.schema import ANNOTATIONS, DECODER_TRIALS, ENCODINGS, EXEMPLARS, TRAINING
from milan_ray.stages.captioners import EncoderRef, load_captioner
from milan_ray.stages.decoder_search import DecoderTuning, DecoderTuningJob
from milan_ray.stages.decoder_space import (
    Budget,
    Choices,
    DecoderSetting,
    DecoderSpace,
    Range,
    read_decoder_setting,
)
from milan_ray.stages.training import (
    EPOCH,
    FEW_EXEMPLARS,
    STATE,
    Training,
    TrainingJob,
    _train_in_task,
    run_trainings,
    training_fingerprint,
)
from milan_ray.stages.training_units import UnitFeatures, write_units
from milan_ray.storage import Storage
from milan_ray.world.plugin import CLASSIFIERS, GENERATORS
from milan_ray.yaml_files import to_yaml

PLUGIN = str(Path(__file__).resolve().parents[1] / "plugins/tiny_models.py")
ENCODER = EncoderRef("tiny", plugins=(PLUGIN,))
THINGS = ("dog", "cat", "house", "tree", "sign", "boat")
COLOURS = ("red", "blue", "green", "dark")
K, SIZE = 3, 10
ONE_AT_A_TIME = Resources(actors=1)
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
MODELS = ("a/x", "a/y", "b/x")
CONFIG = TrainingConfig(
    max_epochs=15, patience=25, learning_rate=0.01, decoder_batch_size=8, lm_batch_size=8, hold_out=0.2
)


def write_layer(storage: Storage, model: str, units: int, k: int = K, size: int = SIZE) -> None:
    """Exemplars (none, but for their hash), encodings that tell thing and colour, and annotations that say them.

    The encoder "blind" has seen nothing.
    """
    rng = np.random.default_rng(len(model) + units)
    things, colours = rng.integers(len(THINGS), size=units), rng.integers(len(COLOURS), size=units)
    features = rng.normal(0, 0.1, (units, k, size)).astype(np.float32)
    features[np.arange(units), :, things] += 1
    features[np.arange(units), :, len(THINGS) + colours] += 1
    keys = {"model": model, "layer": "0"}
    storage.write(EXEMPLARS, EXEMPLARS.table({column: [] for column in EXEMPLARS.schema.names}), "drawn", **keys)
    for encoder, seen in (("tiny", features), ("blind", np.zeros_like(features))):
        encodings = {
            "encoder": [encoder] * units * k,
            "model": [model] * units * k,
            "layer": ["0"] * units * k,
            "unit": np.repeat(np.arange(units), k),
            "rank": np.tile(np.arange(k), units),
            "feature": pa.ListArray.from_arrays(np.arange(0, features.size + 1, size, dtype=np.int32), seen.ravel()),
        }
        storage.write(ENCODINGS, ENCODINGS.table(encodings), f"encoded {model}", encoder=encoder, **keys)
    texts = [f"{COLOURS[c]} {THINGS[t]}" for t, c in zip(things, colours, strict=True)]
    longer = [f"the {text}s on the left of something" for text in texts]
    annotations = {
        "source": ["people"] * 2 * units,
        "model": [model] * 2 * units,
        "layer": ["0"] * 2 * units,
        "unit": list(range(units)) * 2,
        "annotator": ["0"] * units + ["1"] * units,
        "text": texts + longer,
    }
    storage.write(ANNOTATIONS, ANNOTATIONS.table(annotations), f"said of {model}", source="people", **keys)


def job_for(name: str, *models: str, **changes: Any) -> TrainingJob:
    job = TrainingJob(
        name, "people", tuple((model, "0") for model in models or MODELS), ENCODER, CONFIG, Sizes(8, 16, dropout=0)
    )
    return replace(job, **changes)


def curve(storage: Storage, name: str, epochs: int = CONFIG.max_epochs) -> list[tuple[float, float]]:
    """(loss, validation) of the first epochs, of the language model and then of the decoder."""
    rows = storage.read(TRAINING, decoder=name).to_pylist()
    return [(row["train_loss"], row["validation"]) for row in rows if row["epoch"] < epochs]


@pytest.fixture(scope="module")
def storage(ray_session, tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """Annotated, encoded units of three models, and a captioner trained on them as a task does it."""
    storage = Storage(tmp_path_factory.mktemp("run"))
    for model, units in zip(MODELS, (31, 17, 24), strict=True):
        write_layer(storage, model, units)
    train_here(storage, job_for("plain"))
    return storage


@pytest.mark.slow
def test_training_two_workers_reading_from_disk_have_the_curve_of_one_with_all_in_memory(storage: Storage) -> None:
    short = replace(CONFIG, max_epochs=4)
    assert Training(job_for("pair", config=short, workers=2, cpus=0.5, memory_limit=0)).run(storage)
    plain = curve(storage, "plain", epochs=4)
    assert plain[0][0] > plain[3][0] and plain[4][0] > plain[7][0]
    np.testing.assert_allclose(curve(storage, "pair"), plain, rtol=2e-3)


SPACE: dict[str, Choices | Range] = {
    "learning_rate": Choices((0.06, 1e-6)),
    "embedding": Choices((8,)),
    "hidden": Choices((32,)),
    "dropout": Range(0, 0.1),
    "encoder": Choices(("tiny", "blind")),
}
BUDGET = Budget(trials=6, epochs=7, patience=25, grace=3, reduction=2, searcher="random", hold_out=0.2, seed=1)


def tuning_job(name: str, **budget: Any) -> DecoderTuningJob:
    layers = tuple((model, "0") for model in MODELS)
    return DecoderTuningJob(name, "people", layers, DecoderSpace(SPACE, replace(BUDGET, **budget)))


def tried(storage: Storage, name: str) -> list[dict]:
    return storage.read(DECODER_TRIALS, sweep=name).to_pylist()


@pytest.mark.slow
def test_decoder_tuning_stops_worse_trials_early_and_training_does_what_the_chosen_one_did(storage, capsys) -> None:
    setting = DecoderTuning(tuning_job("first")).run(storage, ONE_AT_A_TIME)
    rows = tried(storage, "first")
    assert [row["trial"] for row in rows] == list(range(BUDGET.trials))
    (best,) = (row for row in rows if row["chosen"])
    assert (
        best["bleu"] == rows[0]["bleu"] == max(row["bleu"] for row in rows)
        and best["ended"] == "epochs"
        and best["epochs"] == 7
    )
    assert (setting.learning_rate, setting.encoder) == (best["learning_rate"], best["encoder"]) == (0.06, "tiny")
    stopped = [row for row in rows if row["ended"] == "asha"]
    assert stopped and {row["epochs"] for row in stopped} <= {3, 6}
    assert all(
        row["learning_rate"] < 0.06 or row["encoder"] == "blind" or row["bleu"] < best["bleu"] for row in stopped
    )
    path = Path(storage.root, storage.path(DECODER_TRIALS, sweep="first")).with_name("setting.yaml")
    assert read_decoder_setting(path.read_text(encoding="utf-8"), "setting.yaml") == setting
    tuned = replace(job_for("tuned"), decoder=setting, config=BUDGET.config)
    assert Training(tuned).run(storage)
    epochs = [row for row in storage.read(TRAINING, decoder="tuned").to_pylist() if row["part"] == "decoder"]
    (kept,) = (row for row in epochs if row["kept"])
    assert (kept["epoch"], kept["validation"]) == (best["epoch"], pytest.approx(best["bleu"]))
    storage.put_work(storage.config_of(DECODER_TRIALS, sweep="first"), "left", pa.table({"by": ["a killed job"]}))
    assert DecoderTuning(tuning_job("first")).run(storage, ONE_AT_A_TIME) == setting
    assert "up to date" in capsys.readouterr().err and not Path(storage.root, "_work").exists()


@pytest.mark.slow
def test_decoder_tuning_by_optuna(storage) -> None:
    pytest.importorskip("optuna")
    DecoderTuning(tuning_job("by-optuna", searcher="optuna", trials=2, epochs=1)).run(storage, Resources())
    rows = tried(storage, "by-optuna")
    assert len(rows) == 2 and {row["ended"] for row in rows} == {"epochs"}
    assert len({row["dropout"] for row in rows}) == 2


@linux
@pytest.mark.slow
def test_killed_decoder_tuning_goes_on_where_it_was(storage, kill_all, tmp_path) -> None:
    gate = Gate(tmp_path, r"/states/\w+\.pt$", 2)  # one epoch of the first trial is stored, the second is not
    first = start(TUNE_AND_BE_KILLED, storage, gate)
    gate.wait(first)
    kill_all(first)
    (path,) = Path(storage.root, "_work").glob("*/states/*.pt")
    state = torch.load(path, weights_only=True)
    assert len(state["history"]) == 1 and not storage.partitions(DECODER_TRIALS, sweep="killed")
    state["history"][0]["validation"] = 1000.0  # marked, to see that this epoch is not trained again
    torch.save(state, path)
    DecoderTuning(tuning_job("killed", trials=2)).run(storage, ONE_AT_A_TIME)
    rows = tried(storage, "killed")
    assert len(rows) == 2
    assert [(row["epoch"], row["epochs"], row["chosen"]) for row in rows if row["bleu"] == 1000] == [(0, 7, True)]


def start(script: str, storage: Storage, gate: Gate) -> subprocess.Popen[bytes]:
    """Starts a script of this module, which stops at the gate."""
    environment = gate.environment
    environment["PYTHONPATH"] += f"{os.pathsep}{Path(__file__).parent}"
    command = [sys.executable, "-c", script, storage.root]
    return subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL, env=environment)


TUNE_AND_BE_KILLED = """
import sys
from milan_ray import runtime
runtime.prepare(None)
from test_training_pipeline import ONE_AT_A_TIME, tuning_job
from milan_ray.engine.cluster import connected
from milan_ray.stages.decoder_search import DecoderTuning
from milan_ray.storage import Storage
with connected(ONE_AT_A_TIME):
    DecoderTuning(tuning_job("killed", trials=2)).run(Storage(sys.argv[1]), ONE_AT_A_TIME)
"""

HALF = """
import sys
from milan_ray import runtime
runtime.prepare(None)
from test_training_pipeline import job_for
from milan_ray.config import Resources
from milan_ray.engine.cluster import connected
from milan_ray.stages import training
from milan_ray.storage import Storage
training.FEW_EXEMPLARS = 0  # with Ray Train
with connected(Resources()):
    training.Training(job_for("late", memory_limit=0)).run(Storage(sys.argv[1]))
"""


@linux
@pytest.mark.slow
def test_training_goes_on_after_worker_and_driver_are_killed_to_the_same_result(
    storage, kill_all, monkeypatch, tmp_path
) -> None:
    """Another worker of Ray Train goes on for two epochs; another job, here, for the others."""
    monkeypatch.setattr("milan_ray.stages.training.FEW_EXEMPLARS", 0)
    gate = Gate(tmp_path, rf"/{re.escape(EPOCH)}$", 3)
    first = start(HALF, storage, gate)
    gate.wait(first)
    (worker,) = gate.reached()
    assert worker != first.pid
    os.kill(worker, signal.SIGKILL)
    gate.open(to=5)
    wait_until(lambda: len(gate.reached()) > 3, "the sixth epoch is about to be noted", first)
    assert len({*gate.reached()} - {worker, first.pid}) == 1
    kill_all(first)
    assert list(Path(storage.root).glob(f"_work/*/{EPOCH}")) and not storage.partitions(TRAINING, decoder="late")
    assert Training(job_for("late", memory_limit=0)).run(storage)
    np.testing.assert_allclose(curve(storage, "late"), curve(storage, "plain"), rtol=1e-5)
    ours, theirs = (load_captioner(storage, name).decoder.state_dict() for name in ("late", "plain"))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("few", "names"),
    [
        pytest.param(FEW_EXEMPLARS, ("odd", "a", "b"), id="tasks"),
        pytest.param(0, ("odd", "a"), id="ray-train", marks=pytest.mark.slow),
    ],
)
def test_trainings_of_groups_run_side_by_side_and_survive_one_that_fails(storage, few, names, monkeypatch) -> None:
    """In tasks or by Ray Train, to the bit what a training in this process gives."""
    monkeypatch.setattr("milan_ray.stages.training.FEW_EXEMPLARS", few)
    short = replace(CONFIG, max_epochs=1, bf16=True)
    write_layer(storage, "odd/x", 5, size=12)
    groups = {"odd": ("a/x", "odd/x"), "a": ("a/x", "a/y"), "b": ("b/x",)}
    jobs = [job_for(f"{name}{few}", *groups[name], config=short, cpus=0.5) for name in names]
    with pytest.raises(MilanError, match=rf"1 of {len(names)} trainings failed\. odd{few}: units have different"):
        run_trainings(storage, jobs)
    assert not storage.partitions(TRAINING, decoder=f"odd{few}")
    for name in [f"{name}{few}" for name in names[1:]]:
        assert len(curve(storage, name)) == 2 and all(math.isfinite(loss) for loss, _ in curve(storage, name))
    train_here(storage, job_for(f"here{few}", *groups["a"], config=short))
    assert curve(storage, f"here{few}") == curve(storage, f"a{few}")
    ours, theirs = (load_captioner(storage, name).decoder.state_dict() for name in (f"here{few}", f"a{few}"))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_one_small_training_is_a_task_and_leaves_a_line_on_each_epoch(storage, monkeypatch, capsys) -> None:
    monkeypatch.setattr("milan_ray.stages.training.train_on_workers", None)  # Ray Train's way is not taken
    job = job_for("alone", "b/x", config=replace(CONFIG, max_epochs=2))
    fingerprint = Training(job).due(storage)
    assert fingerprint is not None
    run_trainings(storage, [job])
    said = capsys.readouterr().err
    assert "training alone on 24 annotated units" in said and "trained alone in " in said
    assert len(curve(storage, "alone")) == 4 and not Path(storage.root, "_work", fingerprint.hash).exists()
    line = f"_work/{fingerprint.hash}/{EPOCH}"
    monkeypatch.setattr("milan_ray.stages.training._publish", lambda *_: storage.get(line).decode())
    trained, last = _train_in_task(storage, (job, fingerprint))
    assert trained and last.startswith("decoder, epoch 2, ")
    storage.remove_work(fingerprint.hash)


def test_trainings_in_tasks_go_on_where_they_were(storage, capsys) -> None:
    jobs = [job_for("resumed"), job_for("other", config=replace(CONFIG, max_epochs=1))]
    begin(storage, jobs[0], epochs=3)
    run_trainings(storage, jobs)
    resumed = curve(storage, "resumed")
    assert resumed[0][1] == 1000 and resumed[1:] == curve(storage, "plain")[1:]
    run_trainings(storage, jobs)
    assert "training of resumed: up to date" in capsys.readouterr().err


class Killed(Exception):
    pass


def begin(storage: Storage, job: TrainingJob, epochs: int) -> None:
    """The first epochs of a training whose task was then killed; the first is marked, so that one sees it is kept."""
    encodings = [storage.config_of(ENCODINGS, **keys) for keys in job.encodings]
    work = training_fingerprint(storage, job, encodings).hash
    units = write_units(storage, work, job.source, "tiny", job.layers)

    def report(state: dict) -> None:
        if len(state["history"]) == epochs:
            state["history"][0]["validation"] = 1000.0
            buffer = io.BytesIO()
            torch.save(state, buffer)
            storage.put(f"_work/{work}/{STATE}", buffer.getvalue())
            raise Killed

    with pytest.raises(Killed):
        fit(units, job.plans, new_state(units.texts), report)


def test_train_command_plans_a_captioner_per_group_and_refuses_what_is_not_clear(tmp_path, capsys) -> None:
    for model in MODELS:
        write_layer(Storage(tmp_path), model, 5)
    command = ["train", "--annotations", "people", "--encoder", "tiny", "--plugin", PLUGIN]
    command += ["--storage", str(tmp_path), "--dry-run"]
    assert cli.main([*command, "--group", "mine=a/x,a/y", "b/x"]) == 0
    planned = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("training")]
    assert planned == ["mine", "b-x"]
    assert cli.main([*command, "--name", "one", "--group", "b/x", "a/x"]) == 1
    assert "--name is for one captioner" in capsys.readouterr().err
    assert cli.main(command) == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("training")] == [
        "people"
    ]


def test_train_command_all_groups_of_the_world_are_fourteen_captioners(tmp_path, capsys) -> None:
    for model in (*CLASSIFIERS.values(), *GENERATORS.values()):
        write_layer(Storage(tmp_path), model, 5)
    command = ["train", "--groups", "all", "--annotations", "people", "--encoder", "tiny", "--plugin", PLUGIN]
    assert cli.main([*command, "--storage", str(tmp_path), "--dry-run"]) == 0
    planned = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("training")]
    assert planned == [f"world-{group}" for group in groups_of(CLASSIFIERS, GENERATORS)] and len(planned) == 14


def test_tune_command_knows_what_a_file_tunes(tmp_path, capsys) -> None:
    write_layer(Storage(tmp_path), "a/x", 5)
    configs = Path(__file__).resolve().parents[2] / "tune_configs"
    common = ["--annotations", "people", "--storage", str(tmp_path)]
    for file, options, says in (
        ("decoder.yaml", ["--decoder", "x"], "tunes how a decoder is trained: leave out --decoder"),
        ("decoder.yaml", ["--encoder-weights", "w.pth"], "--encoder-weights is for one encoder"),
        ("rerank.yaml", [], "tunes how a captioner decodes: give --decoder or --milan"),
    ):
        assert cli.main(["tune", "--config", str(configs / file), *options, *common]) == 1
        assert says in capsys.readouterr().err


def test_tune_command_takes_its_options_from_the_file_too_and_plans(tmp_path, capsys) -> None:
    write_layer(Storage(tmp_path), "a/x", 5)
    file = tmp_path / "space.yaml"
    file.write_text(f"tunes: decoder\nencoder: [tiny]\ntrials: 7\nannotations: people\nplugin: {PLUGIN}\n")
    assert cli.main(["tune", "--config", str(file), "--storage", str(tmp_path), "--dry-run"]) == 0
    encodings, trials, counted = capsys.readouterr().out.splitlines()
    assert encodings.split()[:4] == ["encodings", "tiny", "a/x", "0"] and counted.startswith("2 tables would be made")
    assert trials.split()[1] == "space" and "7 trials of at most 100 epochs" in trials
    file.write_text("tunes: decoder\nanotations: people\n")
    assert cli.main(["tune", "--config", str(file), "--annotations", "people", "--storage", str(tmp_path)]) == 1
    assert "unknown key" in capsys.readouterr().err
    assert cli.main(["tune", "--annotations", "people", "--storage", str(tmp_path)]) == 1
    assert "--config" in capsys.readouterr().err


def test_train_command_takes_a_tuned_setting(tmp_path, capsys) -> None:
    write_layer(Storage(tmp_path), "a/x", 5)
    file = tmp_path / "setting.yaml"
    file.write_text(to_yaml(DecoderSetting(hidden=8, encoder="tiny"), "chosen by nobody"))
    command = ["train", "--annotations", "people", "--name", "one", "--plugin", PLUGIN, "--storage", str(tmp_path)]
    assert cli.main([*command, "--setting", str(file), "--dry-run"]) == 0
    assert "encodings     tiny a/x 0" in capsys.readouterr().out
    assert cli.main([*command, "--setting", str(tmp_path / "none.yaml"), "--dry-run"]) == 1
    file.write_text("hiden: 8")
    assert cli.main([*command, "--setting", str(file), "--dry-run"]) == 1
    assert "nearest: hidden" in capsys.readouterr().err


TRAIN = """
import sys
from pathlib import Path
import torch
from milan_ray.captioner.fit import FitConfig, Sizes, fit, new_state
from milan_ray.config import TrainingConfig
from milan_ray.stages.training_units import UnitFeatures
from milan_ray.storage import Storage
def peak():  # resource.getrusage would count the process that started this one
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])
torch.set_num_threads(1)
units = UnitFeatures(Storage(sys.argv[1]), "w")
plan = FitConfig(TrainingConfig(max_epochs=1, decoder_batch_size=8), Sizes(8, 16))
class Few:
    texts, size, take = units.texts[:24], units.size, units.take
fit(Few, {"decoder": plan}, new_state(units.texts), lambda state: None)
before = peak()
fit(units, {"decoder": plan}, new_state(units.texts), lambda state: None)
print(units.nbytes, peak() - before)
"""


@linux
@pytest.mark.slow
def test_training_on_units_read_from_disk_never_has_them_in_memory_together(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    write_layer(storage, "big/x", 300, k=15, size=3904)
    write_units(storage, "w", "people", "tiny", [("big/x", "0")])
    units = UnitFeatures(storage, "w")
    rows = [299, 3, 256, 3]
    read = units.take(rows)
    units.keep()
    assert torch.equal(read, units.take(rows)) and read.shape == (4, 15, 3904)
    found = subprocess.run([sys.executable, "-c", TRAIN, storage.root], capture_output=True, text=True, check=True)
    size, grown = map(int, found.stdout.split())
    assert size > 66 * 2**20 and grown < 25 * 2**20
