"""Probes of tiny images made when they are read, and a network for them: many images, little of anything else."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import nn

from milan_ray.models.registry import register_model
from milan_ray.models.view import Preprocess, View
from milan_ray.probe.base import ImageRef, ProbeImage
from milan_ray.probe.manifest import Entry, build
from milan_ray.probe.registry import register_probe

SIDE = 8
SIZES = (50_000,)


@dataclass(frozen=True)
class NoiseProbe:
    size: int

    @property
    def name(self) -> str:
        return f"noise/{self.size}"

    def manifest(self) -> pa.Table:
        return build([Entry("noise:", str(index), etag="1") for index in range(self.size)])

    def read(self, ref: ImageRef) -> ProbeImage:
        pixels = np.random.default_rng(ref.image_id).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        return ProbeImage(Image.fromarray(pixels), hashlib.sha256(pixels.tobytes()).hexdigest())

    def concept_maps(self, ref: ImageRef) -> None:
        return None


def net(weights: str | None) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())


for size in SIZES:
    register_probe(f"noise/{size}", partial(NoiseProbe, size))
register_model("noise/net", net, ("0",), Preprocess(View(resize=SIDE, crop=SIDE)))
