"""Models that misbehave, each in one way. What sets them off is a white image."""

from __future__ import annotations

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


for _kind in (Values, Raises, Tuple, Shape):
    register_model(
        f"bad/{_kind.__name__.lower()}", lambda weights, kind=_kind: nn.Sequential(kind()), ("0",), PREPROCESS
    )
