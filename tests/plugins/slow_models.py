"""A network that takes its time and says where it runs: for jobs that tests disturb."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from torch import nn

from milan_ray.captioner.encoder import register_encoder
from milan_ray.models.registry import register_model
from milan_ray.models.view import Preprocess, View

SECONDS = "MILAN_TEST_SECONDS"
"""Environment variable: seconds per forward pass."""

WHERE = "MILAN_TEST_WHERE"
"""Environment variable with a file to which every pass adds the node that it runs on."""


class Slow(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(float(os.environ.get(SECONDS, "0.05")))
        if where := os.environ.get(WHERE):
            import ray

            with Path(where).open("a") as log:
                log.write(f"{ray.get_runtime_context().get_node_id()}\n")
        return x


def slow_cnn(weights: str | None) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        Slow(), nn.Conv2d(3, 6, 5, stride=2, padding=2), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2, padding=1)
    )


def slow_encoder(weights: str | None) -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2, padding=1))


register_model("slow/cnn", slow_cnn, ("1", "3"), Preprocess(View(resize=24, crop=24)))
register_model("slow/other", slow_cnn, ("3",), Preprocess(View(resize=24, crop=24)))
register_encoder("slow", slow_encoder, ("0", "2"), size=24)
