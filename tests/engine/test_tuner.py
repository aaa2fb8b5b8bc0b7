"""What a trial of Ray Tune gets of the cluster: GPUs in fractions, on a cluster that says it has one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from milan_ray.schema import DECODER_TRIALS
from milan_ray.storage import Storage

TWO_HALVES = """
import json, sys
from pathlib import Path
from milan_ray import runtime
runtime.prepare(None)
import ray
from gates import wait_until
from test_training_pipeline import tuning_job, write_layer
from milan_ray.config import Resources
from milan_ray.stages.decoder_search import DecoderTuning
from milan_ray.engine import tuner
from milan_ray.storage import Storage

def trial(config, task):
    folder = Path(task)
    own = folder / f"running-{config['n']}"
    own.touch()
    counts = []

    def met():
        counts.append(len(list(folder.glob("running-*"))))
        if counts[-1] == 2:
            (folder / "met").touch()
        return (folder / "met").exists()

    wait_until(met, "two run at the same time")
    own.unlink()
    got = ray.get_runtime_context().get_assigned_resources()
    tuner.report({"most": max(counts), "gpu": got.get("GPU", 0), "cpu": got.get("CPU", 0)})

root = Path(sys.argv[1])
halves = Resources(cpus_per_actor=1, gpus_per_actor=0.5)
ray.init(address="local", num_cpus=6, num_gpus=1, include_dashboard=False, object_store_memory=2**28)
(root / "seen").mkdir()
space = {"n": tuner.grid([0, 1, 2])}
found, errors = tuner.run_trials(trial, str(root / "seen"), str(root / "work"), space, halves)
assert not errors
print(json.dumps([{key: tried.metrics[key] for key in ("most", "gpu", "cpu")} for tried in found]))
storage = Storage(root / "run")
for model in ("a/x", "a/y", "b/x"):
    write_layer(storage, model, 12)
DecoderTuning(tuning_job("halves", trials=2, epochs=1)).run(storage, halves)
"""


@pytest.mark.slow
def test_two_trials_of_half_a_gpu_run_at_the_same_time_and_compute_where_torch_can(tmp_path: Path) -> None:
    folders = [str(Path(__file__).parents[1] / name) for name in ("stages", "helpers")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-c", TWO_HALVES, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    trials = json.loads(done.stdout.splitlines()[-1])
    assert len(trials) == 3 and {(trial["gpu"], trial["cpu"]) for trial in trials} == {(0.5, 1)}
    assert max(trial["most"] for trial in trials) == 2
    assert len(Storage(tmp_path / "run").read(DECODER_TRIALS, sweep="halves")) == 2
