"""Training captioners: the same curve in memory and from disk, on one worker and two, and after a kill; groups."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from milan_ray import cli
from milan_ray.config import TrainingConfig
from milan_ray.errors import MilanError
from milan_ray.pipelines.captioners import EncoderRequest, load_captioner
from milan_ray.pipelines.train import EPOCH, Sizes, TrainingJob, run_training, run_trainings
from milan_ray.pipelines.training_units import UnitFeatures, write_units
from milan_ray.schema import ANNOTATIONS, ENCODINGS, EXEMPLARS, TRAINING
from milan_ray.storage import Storage

PLUGIN = str(Path(__file__).resolve().parents[1] / "plugins/tiny_models.py")
ENCODER = EncoderRequest("tiny", plugins=(PLUGIN,))
THINGS = ("dog", "cat", "house", "tree", "sign", "boat")
COLOURS = ("red", "blue", "green", "dark")
K, SIZE = 3, 10
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
MODELS = ("a/x", "a/y", "b/x")
CONFIG = TrainingConfig(
    max_epochs=25, patience=25, learning_rate=0.01, decoder_batch_size=8, lm_batch_size=8, hold_out=0.2
)


def write_layer(storage: Storage, model: str, units: int, k: int = K, size: int = SIZE) -> None:
    """Exemplars (none, but for their hash), encodings that tell thing and colour, and annotations that say them."""
    rng = np.random.default_rng(len(model) + units)
    things, colours = rng.integers(len(THINGS), size=units), rng.integers(len(COLOURS), size=units)
    features = rng.normal(0, 0.1, (units, k, size)).astype(np.float32)
    features[np.arange(units), :, things] += 1
    features[np.arange(units), :, len(THINGS) + colours] += 1
    keys = {"model": model, "layer": "0"}
    storage.write(EXEMPLARS, EXEMPLARS.table({column: [] for column in EXEMPLARS.schema.names}), "drawn", **keys)
    encodings = {
        "encoder": ["tiny"] * units * k,
        "model": [model] * units * k,
        "layer": ["0"] * units * k,
        "unit": np.repeat(np.arange(units), k),
        "rank": np.tile(np.arange(k), units),
        "feature": pa.ListArray.from_arrays(np.arange(0, features.size + 1, size, np.int32), features.ravel()),
    }
    storage.write(ENCODINGS, ENCODINGS.table(encodings), f"encoded {model}", encoder="tiny", **keys)
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


def job_for(name: str, *models: str, **changes: object) -> TrainingJob:
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
    """Annotated, encoded units of three models, and a captioner trained on them by one worker, in memory."""
    storage = Storage(tmp_path_factory.mktemp("run"))
    for model, units in zip(MODELS, (31, 17, 24), strict=True):
        write_layer(storage, model, units)
    assert run_training(storage, job_for("plain"))
    return storage


def test_training_two_workers_reading_from_disk_have_the_curve_of_one_with_all_in_memory(storage: Storage) -> None:
    short = replace(CONFIG, max_epochs=4)
    assert run_training(storage, job_for("pair", config=short, workers=2, cpus=0.5, memory_limit=0))
    plain = curve(storage, "plain", epochs=4)
    assert plain[0][0] > plain[3][0] and plain[4][0] > plain[7][0]
    np.testing.assert_allclose(curve(storage, "pair"), plain, rtol=2e-3)


def done(storage: Storage) -> list[str]:
    """The newest epoch of every training under way."""
    return [path.read_text() for path in Path(storage.root).glob(f"_work/*/{EPOCH}")]


def child_of(pid: int, name: str) -> int | None:
    """A process below another one whose command line has a text in it."""
    parents, commands = {}, {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                commands[int(path.name)] = (path / "cmdline").read_text()
            except OSError:  # ended meanwhile
                continue
    for child, command in commands.items():
        above = child
        while above in parents and above != pid:
            above = parents[above]
        if above == pid and name in command:
            return child
    return None


HALF = """
import sys
from milan_ray import runtime
runtime.prepare(None)
from test_training_pipeline import job_for
from milan_ray.config import Resources
from milan_ray.pipelines.cluster import connected
from milan_ray.pipelines.train import run_training
from milan_ray.storage import Storage
with connected(Resources()):
    run_training(Storage(sys.argv[1]), job_for("late"))
"""


@linux
def test_training_goes_on_after_driver_and_worker_are_killed_to_the_same_result(storage: Storage) -> None:
    command = [sys.executable, "-c", HALF, storage.root]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    environment.pop("RAY_ADDRESS", None)
    first = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL, env=environment)
    while not done(storage) and first.poll() is None:
        time.sleep(0.01)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    before = done(storage)
    assert before and not storage.partitions(TRAINING, decoder="late")
    killed: list[int] = []

    def kill_in_the_middle() -> None:
        worker = None
        while worker is None or done(storage) == before:
            worker = worker or child_of(os.getpid(), "RayTrainWorker")
            if stop.wait(0.01):
                return
        os.kill(worker, signal.SIGKILL)
        killed.append(worker)

    stop = threading.Event()
    killer = threading.Thread(target=kill_in_the_middle)
    killer.start()
    assert run_training(storage, job_for("late", memory_limit=0))
    stop.set()
    killer.join()
    assert killed
    np.testing.assert_allclose(curve(storage, "late"), curve(storage, "plain"), rtol=1e-5)
    ours, theirs = (load_captioner(storage, name).decoder.state_dict() for name in ("late", "plain"))
    torch.testing.assert_close(ours, theirs)


def test_trainings_of_groups_run_side_by_side_and_survive_one_that_fails(storage: Storage) -> None:
    short = replace(CONFIG, max_epochs=1, bf16=True)
    write_layer(storage, "odd/x", 5, size=12)
    groups = {"odd": ("a/x", "odd/x"), "a": ("a/x", "a/y"), "b": ("b/x",)}
    jobs = [job_for(name, *models, config=short, cpus=0.5) for name, models in groups.items()]
    with pytest.raises(MilanError, match=r"1 of 3 trainings failed\. odd: units have different"):
        run_trainings(storage, jobs)
    assert not storage.partitions(TRAINING, decoder="odd")
    for name in ("a", "b"):
        assert len(curve(storage, name)) == 2 and all(math.isfinite(loss) for loss, _ in curve(storage, name))


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
    assert cli.main(command) == 1
    assert "give --group, or --name" in capsys.readouterr().err


READ = """
import sys
from pathlib import Path
import numpy as np
from milan_ray.pipelines.training_units import UnitFeatures
from milan_ray.storage import Storage
def peak():  # resource.getrusage would count the process that started this one
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])
units = UnitFeatures(Storage(sys.argv[1]), "w")
units.take([0])
before = peak()
rows = np.random.default_rng(0).permutation(len(units)).tolist()
for start in range(0, len(rows), 16):
    units.take(rows[start : start + 16])
print(units.nbytes, peak() - before)
"""


@linux
def test_units_read_from_disk_never_are_in_memory_together(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    write_layer(storage, "big/x", 300, k=15, size=3904)
    write_units(storage, "w", "people", "tiny", [("big/x", "0")])
    units = UnitFeatures(storage, "w")
    rows = [299, 3, 256, 3]
    read = units.take(rows)
    units.keep()
    assert torch.equal(read, units.take(rows)) and read.shape == (4, 15, 3904)
    found = subprocess.run([sys.executable, "-c", READ, storage.root], capture_output=True, text=True, check=True)
    size, grown = map(int, found.stdout.split())
    assert size > 66 * 2**20 and grown < 25 * 2**20
