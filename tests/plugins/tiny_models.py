"""A user's plug-in, as small as can be: a CNN, a network that fails, and one without weights."""

from __future__ import annotations

import torch
from torch import nn

from milan_ray.captioner.encoder import register_encoder
from milan_ray.errors import MilanError
from milan_ray.models.registry import register_model
from milan_ray.models.view import Preprocess, View

PREPROCESS = Preprocess(View(resize=24, crop=24))


def tiny_cnn(weights: str | None) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 6, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(5, 2, 3)  # expects five channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


def no_weights(weights: str | None) -> nn.Module:
    raise MilanError("no weights file at /nowhere/w.pth for tiny/unweighted: give --weights FILE.")


class Broken(nn.Module):
    """Two layers, one of which puts out nothing but NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.good, self.nan = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)
        nn.init.constant_(self.nan.weight, torch.nan)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.nan(self.good(x))


def broken(weights: str | None) -> nn.Module:
    torch.manual_seed(4)
    return Broken()


class Cut(nn.Module):
    """Cuts all units off at 6, but for unit 0, which is dead."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([0 * x[:, :1], x[:, 1:].abs().mul(30).clamp(max=6)], dim=1)


def saturated(weights: str | None) -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Conv2d(3, 4, 5), Cut())


register_model("tiny/saturated", saturated, ("0", "1"), PREPROCESS)
register_model("tiny/broken", broken, ("good", "nan"), PREPROCESS)
register_model("tiny/cnn", tiny_cnn, ("0", "2", "6"), PREPROCESS)
register_model("tiny/twin", tiny_cnn, ("0",), PREPROCESS)


def failing(weights: str | None) -> nn.Module:
    torch.manual_seed(6)
    return Failing()


register_model("tiny/failing", failing, ("conv",), PREPROCESS)


def unseeded(weights: str | None) -> nn.Module:
    torch.seed()
    return nn.Sequential(nn.Conv2d(3, 2, 3))


register_model("tiny/unseeded", unseeded, ("0",), PREPROCESS)
register_model("tiny/unweighted", no_weights, ("conv",), PREPROCESS)


def tiny_encoder(weights: str | None) -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2, padding=1))


register_encoder("tiny", tiny_encoder, ("0", "2"), size=24)
