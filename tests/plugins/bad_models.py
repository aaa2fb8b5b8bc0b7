"""Models that misbehave, each in one way. What sets them off is a white image."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from milan_ray.models.registry import register_model
from milan_ray.models.view import Preprocess, View

PREPROCESS = Preprocess(View(resize=16, crop=16), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def white(x: torch.Tensor) -> torch.Tensor:
    return (x == 1).flatten(1).all(dim=1)


class Values(nn.Module):
    """Units: 0 sound; 1 dead; 2 NaN everywhere; 3 infinite on white images, elsewhere as unit 0."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sound = x.mean(dim=1)
        endless = sound.masked_fill(white(x)[:, None, None], torch.inf)
        return torch.stack([sound, torch.zeros_like(sound), torch.full_like(sound, torch.nan), endless], dim=1)


class Raises(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if white(x).any():
            raise RuntimeError("too bright\nfor this model")
        return x


class Tuple(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[None, dict[str, torch.Tensor]]:
        return None, {"maps": x, "other": x[:, :1]}


class Shape(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[..., :8] if white(x).any() else x


def build(kind: type[nn.Module], weights: str | None) -> nn.Module:
    return nn.Sequential(kind())


for _kind in (Values, Raises, Tuple, Shape):
    register_model(f"bad/{_kind.__name__.lower()}", partial(build, _kind), ("0",), PREPROCESS)


class Wide(nn.Module):
    """A convolution and a linear layer: what is commonly made small."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.features, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x).mean((2, 3)))


class Secret(Wide):
    """Keeps something whose content cannot be told."""

    def get_extra_state(self) -> object:
        return object()


def _broken(weights: str | None) -> nn.Module:
    raise KeyError("no such\nsize")


register_model(
    "bad/int8",
    lambda weights: torch.ao.quantization.quantize_dynamic(Wide(), {nn.Linear}, dtype=torch.qint8),
    ("features", "head"),
    PREPROCESS,
)
register_model("bad/secret", lambda weights: Secret(), ("features",), PREPROCESS)
register_model("bad/unbuilt", _broken, ("features",), PREPROCESS)
register_model(
    "bad/inputs", lambda weights: Wide(), ("features",), PREPROCESS, inputs=lambda views: views.permute(0, 9, 1, 2)
)
