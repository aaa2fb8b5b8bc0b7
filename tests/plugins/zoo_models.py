"""A zoo of 24 networks that are built in no time: 12 shapes, for plain and for face-blurred scenes, and some that fail.

Where a file ``loads`` lies beside this one, every build writes a line into it.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import torch
from torch import nn

from milan_ray.models.registry import register_model
from milan_ray.models.view import Preprocess, View
from milan_ray.models.weights import WeightsFile
from milan_ray.probe.registry import register_probe
from milan_ray.world.probe import WorldProbe

PREPROCESS = Preprocess(View(resize=24, crop=24))
LOADS = Path(__file__).with_name("loads")
SHAPES = tuple((width, kernel, stride) for width in (3, 4, 5) for kernel in (3, 5) for stride in (1, 2))


def net(name: str, weights: str | None) -> nn.Sequential:
    if LOADS.exists():
        with LOADS.open("a") as log:
            log.write(f"{os.getpid()} {name}\n")
    number, _, data = name.partition("/")
    width, kernel, stride = SHAPES[int(number.removeprefix("net"))]
    torch.manual_seed(int(number.removeprefix("net")) + 100 * data.endswith("blurred"))
    return nn.Sequential(nn.Conv2d(3, width, kernel, stride), nn.ReLU(), nn.Conv2d(width, 4, 3, 2), nn.ReLU())


class Raises(nn.Module):
    """Fails on the first batch that has a bright image in it, as one with an assertion might."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("this batch is not to my taste")


def raises(weights: str | None) -> nn.Module:
    if LOADS.exists():
        with LOADS.open("a") as log:
            log.write(f"{os.getpid()} bad-batch\n")
    return Raises()


def unbuildable(weights: str | None) -> nn.Module:
    raise RuntimeError("out of order")


for index in range(len(SHAPES)):
    for data in ("scenes", "scenes-blurred"):
        name = f"net{index:02d}/{data}"
        register_model(name, partial(net, name), ("0", "2"), PREPROCESS)

register_model("bad-batch/bad", raises, ("conv",), PREPROCESS)
register_model("unbuildable/bad", unbuildable, ("conv",), PREPROCESS)
register_model(
    "unfetched/bad",
    unbuildable,
    ("conv",),
    PREPROCESS,
    published={"V1": WeightsFile("unfetched-0.pth", "https://example.invalid/unfetched-0.pth")},
)
register_probe("scenes", partial(WorldProbe, "probe", 48, blur_faces=True))
