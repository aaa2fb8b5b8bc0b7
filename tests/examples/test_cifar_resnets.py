"""The documentation's example of an own architecture, on the real weights and images that it is meant for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from milan_ray import cli
from milan_ray.errors import MilanError
from milan_ray.models.hooks import LayerTap
from milan_ray.models.registry import RANDOM
from milan_ray.models.resolve import resolve_model
from milan_ray.plugins import load_plugins
from milan_ray.probe.decode import decode

PLUGIN = str(Path(__file__).parents[2] / "examples/cifar_resnets.py")


@pytest.mark.parametrize("depth", [20, 32, 44, 56])
def test_cifar_resnet_has_the_depth_of_its_name_and_units_of_its_stages(depth: int) -> None:
    load_plugins([PLUGIN])
    spec = resolve_model(f"resnet{depth}/cifar10", RANDOM)
    model = spec.load()
    weighted = [m for m in model.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    assert len(weighted) == depth
    with LayerTap(model, spec.layers) as tap, torch.inference_mode():
        outputs = tap(spec.prepare(torch.zeros(1, 32, 32, 3, dtype=torch.uint8)))
    assert [tuple(output.shape[1:]) for output in outputs.values()] == [
        (16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8)
    ]  # fmt: skip


def test_cifar_resnet_without_weights_says_what_to_give() -> None:
    load_plugins([PLUGIN])
    with pytest.raises(MilanError, match="give --weights FILE"):
        resolve_model("resnet20/cifar10").load()


@pytest.mark.parametrize("depth", [20, 56])
def test_cifar_resnet_with_real_weights_knows_real_images(shared: Path, depth: int) -> None:
    load_plugins([PLUGIN])
    spec = resolve_model(f"resnet{depth}/cifar10", str(shared / f"data/weights/cifar10_resnet{depth}.pth"))
    files = sorted((shared / "data/images/cifar10_test_1000").iterdir())[::5]
    views = np.stack([spec.preprocess.view(decode(file.read_bytes())) for file in files])
    with torch.inference_mode():
        predicted = spec.load()(spec.prepare(torch.from_numpy(views))).argmax(dim=1).numpy()
    assert np.mean(predicted == [int(file.name.split("_")[0]) for file in files]) >= 0.75


def test_cifar_resnet_layers_are_listed_by_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "resnet20/cifar10", "--plugin", PLUGIN, "--weights", "random"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[:4] for line in lines if "*" in line] == [
        ["conv1", "Conv2d", "16×32×32", "16"],
        ["layer1", "Sequential", "16×32×32", "16"],
        ["layer2", "Sequential", "32×16×16", "32"],
        ["layer3", "Sequential", "64×8×8", "64"],
    ]
