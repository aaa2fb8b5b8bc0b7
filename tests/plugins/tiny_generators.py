"""A user's plug-in of generators: a tiny one that needs every hook, and the reference's toy by its weights file."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from milan_ray.models.registry import register_model
from milan_ray.models.view import Preprocess, View
from milan_ray.probe.registry import register_probe
from milan_ray.world.generator import CodeProbe
from milan_ray.world.probe import WorldProbe

CLASSES = 3


@dataclass
class Hidden:
    """What layers pass on, as BigGAN's do: the maps and the class beside them."""

    h: torch.Tensor
    y: torch.Tensor


class Layer(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(inputs, outputs, 4, 2, 1)
        self.shift = nn.Linear(CLASSES, outputs)

    def forward(self, hidden: Hidden) -> Hidden:
        return Hidden(torch.tanh(2 * self.up(hidden.h) + self.shift(hidden.y)[:, :, None, None]), hidden.y)


class TinyGenerator(nn.Module):
    """z (B, 6) and y (B, 3) → {"image": (B, 3, 16, 16) in [0, 1]}."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5 * 16)
        self.layer0, self.layer1 = Layer(5, 7), Layer(7, 4)
        self.last = nn.Conv2d(4, 3, 1)

    def forward(self, z: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = Hidden(self.first(z).view(-1, 5, 4, 4), y)
        return {"image": torch.sigmoid(self.last(self.layer1(self.layer0(hidden)).h))}


def tiny(weights: str | None) -> nn.Module:
    torch.manual_seed(int(weights is not None) + 7)  # any file of weights makes another generator
    return TinyGenerator()


def one_hot(z: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"z": z, "y": nn.functional.one_hot(y, CLASSES).float()}


def golden(weights: str | None) -> nn.Module:
    source = importlib.util.spec_from_file_location("golden_models", Path(str(weights)).parent / "models.py")
    assert source is not None and source.loader is not None
    module = importlib.util.module_from_spec(source)
    source.loader.exec_module(module)
    model = module.ToyGenerator()
    model.load_state_dict(torch.load(str(weights), weights_only=True))
    return model


register_model(
    "tiny/generator",
    tiny,
    ("layer0", "layer1"),
    Preprocess(View(resize=(24, 24), crop=None, interpolation="nearest"), mean=(0, 0, 0), std=(1, 1, 1)),
    inputs=one_hot,
    images=lambda outputs: outputs["image"],
    hidden=lambda hidden: hidden.h,
)
register_model("golden/generator", golden, ("layer0", "layer1"), images=lambda outputs: outputs)
register_probe("tiny/codes", lambda: CodeProbe(WorldProbe("probe", 40)))
