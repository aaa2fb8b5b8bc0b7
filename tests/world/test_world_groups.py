"""Groups of sets on the world, small: two groups, untrained networks, 40 scenes, one epoch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from milan_ray.schema import TRAINING
from milan_ray.stages.captioners import load_captioner
from milan_ray.storage import Storage

ROOT = Path(__file__).resolve().parents[2]
GROUPS = ("world-base", "world-not-cnn-objects")
"""The command for all 14 is planned in tests/stages/test_training_pipeline.py; each takes half a minute to start."""

SMALL = """
import sys
from milan_ray import runtime
runtime.prepare(None)
from safetensors.torch import save_file
from milan_ray.config import ExemplarConfig, Resources, TrainingConfig
from milan_ray.engine.cluster import connected
from milan_ray.showcase.demo import SETS, run_groups
from milan_ray.engine.references import ProbeRef
from milan_ray.storage import Storage
from milan_ray.world.encoder import EncoderNet
from milan_ray.world.generator import SceneGenerator
from milan_ray.world.networks import PLACES, PlainNet, ResidualNet
from milan_ray.world.plugin import weights_dir

networks = {
    "cnn": PlainNet(), "cnn-places": PlainNet(len(PLACES)), "resnet": ResidualNet(),
    "resnet-places": ResidualNet(len(PLACES)), "generator": SceneGenerator(), "generator-places": SceneGenerator(),
    "encoder": EncoderNet(),
}
weights_dir().mkdir(parents=True)
for name, network in networks.items():
    save_file(network.state_dict(), weights_dir() / f"{name}.safetensors")
few = {
    ProbeRef((probe.sources[0].replace("world/", "tiny/"),), plugins=(sys.argv[2],)): names
    for probe, names in SETS.items()
}
small = ExemplarConfig(k=2, batch_size=40)
with connected(Resources()):
    for _ in range(2):
        run_groups(Storage(sys.argv[1]), Resources(), few, small, TrainingConfig(max_epochs=1), sys.argv[3:])
"""


@pytest.mark.slow
def test_groups_of_the_world_train_side_by_side_and_only_once(tmp_path: Path) -> None:
    environment = {**os.environ, "MILAN_MODELS_DIR": str(tmp_path / "models")}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-c", SMALL, str(tmp_path / "run"), str(ROOT / "tests/plugins/tiny_world.py"), *GROUPS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    storage = Storage(tmp_path / "run")
    assert {keys["decoder"] for keys in storage.partitions(TRAINING)} == set(GROUPS)
    assert "training 2 captioners" in done.stderr
    for name in GROUPS:
        assert done.stderr.count(f"trained {name} in") == 1 and f"training of {name}: up to date" in done.stderr
        assert load_captioner(storage, name).lm is not None
