"""A network that puts out how it is run: what a worker makes of its options can be read in the tables."""

from __future__ import annotations

import os

import torch
from torch import nn

from milan_ray.models.registry import register_model
from milan_ray.models.view import Preprocess, View

SAYS = ("bits of a number", "channels last", "threads")
"""What each unit's activation is; of every image, at every position. One more unit tells the images apart."""

PASSES = "MILAN_WITNESS_PASSES"
"""A file that is told how many images each pass takes. No activation may depend on that."""


class Witness(nn.Module):
    """A convolution of 64 channels, and units that tell how it computed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 64, 3, padding=1)
        self.says = nn.Identity()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.conv(images)
        last = self.conv.weight.is_contiguous(memory_format=torch.channels_last)
        bits = {torch.float32: 32, torch.bfloat16: 16, torch.float16: 17}[maps.dtype]
        told = torch.tensor([bits, last, torch.get_num_threads()], dtype=torch.float32)
        if PASSES in os.environ:
            with open(os.environ[PASSES], "a", encoding="utf-8") as file:
                file.write(f"{len(images)}\n")
        told = told[None, :, None, None].expand(len(images), -1, *maps.shape[2:])
        return self.says(torch.cat([told, maps[:, :1].float()], 1))


def witness(weights: str | None) -> nn.Module:
    torch.manual_seed(1)
    return Witness()


register_model("witness", witness, ("says",), Preprocess(View(8, 8), (0, 0, 0), (1, 1, 1)))
