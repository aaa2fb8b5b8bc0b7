"""Feature sets of tiny/cnn, as a user's plug-in registers them."""

from __future__ import annotations

import tiny_models  # noqa: F401  (registers tiny/cnn)
import torch
from torch import nn

from milan_ray.models.features.sets import register_features

COUNT = 20
DEAD = 7


class Rectified(nn.Module):
    """Random directions behind a rectifier; one feature never fires."""

    directions: torch.Tensor
    bias: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.register_buffer("directions", torch.randn(COUNT, 6, generator=generator))
        self.register_buffer("bias", torch.full((COUNT,), -0.3).index_fill_(0, torch.tensor([DEAD]), -1e6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ self.directions.T + self.bias)


RECTIFIED = Rectified()


def same(x: torch.Tensor) -> torch.Tensor:
    return x


def broken(x: torch.Tensor) -> torch.Tensor:
    return x[:, :2]


def failing(x: torch.Tensor) -> torch.Tensor:
    raise ValueError("no such thing")


def nowhere(x: torch.Tensor) -> torch.Tensor:
    return torch.full_like(x, torch.nan)


def opposite(x: torch.Tensor) -> torch.Tensor:
    return -9 * x


register_features("same", "tiny/cnn", "0", same, 6, decode=same, directions=torch.eye(6))
register_features("rectified", "tiny/cnn", "0", RECTIFIED, COUNT, rectified=True, directions=RECTIFIED.directions)
register_features("broken", "tiny/cnn", "0", broken, 6)
register_features("failing", "tiny/cnn", "0", failing, 6)
register_features("nan", "tiny/cnn", "0", nowhere, 6)
register_features("unfit", "tiny/cnn", "0", same, 6, decode=opposite)
register_features("other", "tiny/cnn", "0", same, 6, directions=torch.eye(6)[:, :5])
register_features("signed", "tiny/cnn", "0", same, 6, rectified=True)
