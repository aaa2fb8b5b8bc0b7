"""A plug-in that leaves a note on which process read images and which ran the network."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from milan_ray.exemplars import forward
from milan_ray.models.registry import register_model
from milan_ray.models.view import Preprocess, View

FOLDER = "MILAN_TEST_SEEN"
"""Environment variable: the folder for the notes."""


def note(did: str) -> None:
    Path(os.environ[FOLDER], f"{did}-{os.getpid()}").touch()


class Noting(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        note("ran")
        return x


def build(weights: str | None) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 6, 5), nn.ReLU(), Noting())


_decoded = forward._read


def _noting(*arguments):
    note("read")
    return _decoded(*arguments)


forward._read = _noting
register_model("seen/by", build, ("1",), Preprocess(View(resize=24, crop=24)))
