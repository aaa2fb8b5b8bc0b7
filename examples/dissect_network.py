"""The exemplars of every unit of your own torch network.

    python examples/dissect_network.py [FOLDER]

FOLDER holds your images; without it, 96 scenes of the built-in world are rendered. The network here is untrained: put
your own in its place. Nothing is written but `exemplars.png` in the working folder.
"""

from __future__ import annotations

import sys

import polars as pl
import torch
from torch import nn

import milan_ray
from milan_ray.models.view import Preprocess, View
from milan_ray.world.probe import WorldProbe


def build() -> nn.Module:
    """Returns the network to dissect, for RGB images of 64 × 64 pixels."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=2),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


def main() -> None:
    """Dissects two layers, prints the strongest exemplar of each unit, and saves one unit's picture."""
    images = sys.argv[1] if len(sys.argv) > 1 else WorldProbe("probe", 96)
    preprocess = Preprocess(View(resize=64, crop=64), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    dissection = milan_ray.dissect(build(), images, layers=["0", "2"], k=5, preprocess=preprocess)

    strongest = dissection.exemplars.filter(pl.col("rank") == 0).sort("activation", descending=True)
    print(strongest.select("layer", "unit", "image", "activation", "level"))
    layer, unit = strongest.select("layer", "unit").row(0)
    dissection.lookup(layer, unit).grid().save("exemplars.png")
    print(f"{len(dissection.units())} units respond to an image; layer {layer}, unit {unit} is in exemplars.png")


if __name__ == "__main__":
    main()
