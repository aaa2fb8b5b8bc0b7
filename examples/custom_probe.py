"""A plug-in with a probe of its own, whose images are made when they are read: `python examples/custom_probe.py`.

Jobs: `--plugin examples/custom_probe.py --model stripes/net --probe stripes`. Models: `examples/cifar_resnets.py`.
"""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import nn

import milan_ray
from milan_ray.models.registry import register_model
from milan_ray.models.view import Preprocess, View
from milan_ray.probe.base import ImageRef, ProbeImage
from milan_ray.probe.manifest import Entry, build
from milan_ray.probe.registry import register_probe

SIDE, ANGLES = 32, 36


class Stripes:
    """Grey stripes in 36 directions, 5° apart."""

    name = "stripes"

    def manifest(self) -> pa.Table:
        """Lists the images; `etag` changes whenever their content does."""
        return build([Entry("stripes:", f"{5 * step}°", etag="1") for step in range(ANGLES)])

    def read(self, ref: ImageRef) -> ProbeImage:
        """Renders one image; the digest identifies its pixels."""
        angle = np.deg2rad(float(ref.path.rstrip("°")))
        y, x = np.mgrid[:SIDE, :SIDE]
        wave = np.sin((x * np.cos(angle) + y * np.sin(angle)) * np.pi / 4)
        pixels = np.repeat((127.5 * (1 + wave)).astype(np.uint8)[..., None], 3, axis=2)
        return ProbeImage(Image.fromarray(pixels), hashlib.sha256(pixels.tobytes()).hexdigest())

    def concept_maps(self, ref: ImageRef) -> None:
        """Returns nothing: only Network Dissection needs maps of concepts."""


def build_network(weights: str | None) -> nn.Module:
    """Returns a network that responds to edges: unit 0 to vertical ones, unit 1 to horizontal ones."""
    edges, vertical = nn.Conv2d(3, 2, 3, bias=False), torch.tensor([[-1.0, 0.0, 1.0]] * 3)
    edges.weight.data = torch.stack([vertical, vertical.T])[:, None].repeat(1, 3, 1, 1)
    return nn.Sequential(edges, nn.ReLU())


register_probe(Stripes.name, Stripes)
register_model("stripes/net", build_network, ["1"], Preprocess(View(resize=SIDE, crop=SIDE)))

if __name__ == "__main__":
    dissection = milan_ray.dissect("stripes/net", "stripes", k=3, plugins=[__file__])
    for unit in (0, 1):
        print(f"unit {unit}: {dissection.exemplars.filter(unit=unit)['image'].to_list()}")
