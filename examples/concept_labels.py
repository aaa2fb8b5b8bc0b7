"""Labels from your own list of concepts (CLIP-Dissect), and a search through them: `python examples/concept_labels.py`.

Three units respond to red, green and blue. An embedder of colours stands in for CLIP; `--clip FOLDER` takes CLIP.
"""

from __future__ import annotations

import tempfile

import torch
from torch import nn

import milan_ray
from milan_ray import cli
from milan_ray.models.image_text import register_image_text
from milan_ray.models.registry import register_model
from milan_ray.models.view import Preprocess, View
from milan_ray.probe.registry import register_probe
from milan_ray.world.probe import WorldProbe

COLOURS = {"red things": (1, -1, -1), "green things": (-1, 1, -1), "blue things": (-1, -1, 1)}


class ColourEmbedder(nn.Module):
    """Embeds images by their mean colour, and the names of :data:`COLOURS` by the colour that they name."""

    width, view = 3, View(64, 64)

    def identity(self) -> dict[str, object]:
        """Returns what decides the embeddings: part of the tables' fingerprints."""
        return {"colours": 1}

    text_identity = identity

    def embed_images(self, images: torch.Tensor) -> torch.Tensor:
        """Images (N, 3, H, W) in [0, 1] as (N, 3)."""
        return nn.functional.normalize(images.mean(dim=(2, 3)) - images.mean(dim=(1, 2, 3))[:, None], dim=1)

    def embed_texts(self, texts: list[str]) -> torch.Tensor:
        """Names of colours as (N, 3)."""
        return nn.functional.normalize(torch.tensor([COLOURS[text] for text in texts]).float(), dim=1)


def build(weights: str | None) -> nn.Module:
    """Returns a network with one unit per colour; `weights` is the file of a network that has some."""
    colours = nn.Conv2d(3, 3, 1, bias=False)
    colours.weight.data = torch.tensor(list(COLOURS.values())).float()[:, :, None, None]
    return nn.Sequential(colours, nn.AvgPool2d(4), nn.ReLU())


register_model("colours", build, ["2"], Preprocess(View(64, 64), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)))
register_probe("scenes", lambda: WorldProbe("probe", 128))
register_image_text("colour-embedder", ColourEmbedder, concepts=tuple(COLOURS))  # type: ignore[arg-type]  # it has a view: no embed_maps

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as storage:
        options = ["--model", "colours", "--probe", "scenes", "--plugin", __file__, "--storage", storage]
        cli.main(["label", "--labeler", "clip-dissect", "--clip", "colour-embedder", *options])
        print(milan_ray.search(storage, "red|green|blue").select("unit", "description", "score"))
        print(f"units about red: {milan_ray.search(storage, 'red')['unit'].to_list()}")
