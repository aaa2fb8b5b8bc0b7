"""One network under three names, which notes beside this file where it is built, and fails there under one of them.

Where a file ``loads`` lies there, every build writes a line into it; where a file ``fail`` does, passes of
``late/failing`` fail.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import torch
from torch import nn

from milan_ray.models.registry import register_model
from milan_ray.models.view import Preprocess, View

FOLDER = Path(__file__).parent


class Failing(nn.ReLU):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if (FOLDER / "fail").exists():
            raise RuntimeError("not now")
        return super().forward(x)


def cnn(name: str, between: type[nn.Module], weights: str | None) -> nn.Module:
    """The convolutions of ``tiny/cnn``."""
    if (FOLDER / "loads").exists():
        with (FOLDER / "loads").open("a") as loads:
            loads.write(f"{os.getpid()} {name}\n")
    torch.manual_seed(3)
    first, second = nn.Conv2d(3, 6, 5, stride=2, padding=2), nn.Conv2d(6, 8, 3, stride=2, padding=1)
    return nn.Sequential(first, between(), second, nn.ReLU(inplace=True))


for name, layers, between in (("cnn", ("0", "2"), nn.ReLU), ("failing", ("2",), Failing), ("twin", ("0",), nn.ReLU)):
    register_model(f"late/{name}", partial(cnn, f"late/{name}", between), layers, Preprocess(View(resize=24, crop=24)))
