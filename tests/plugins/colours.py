"""A network that sees colours in the world's scenes, and a captioner that names the colours of pixels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from milan_ray.models.image_captions import register_image_captioner
from milan_ray.models.image_text import register_image_text
from milan_ray.models.registry import register_model
from milan_ray.models.view import Preprocess, View
from milan_ray.probe.registry import register_probe
from milan_ray.world.probe import WorldProbe

SEEN = ("red", "green", "blue")
"""What units 0 to 2 of layer ``seen`` fire for; unit 3 is dead."""

SCENES = 96


class Watcher(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(3, 4, 1)
        with torch.no_grad():
            weights = torch.tensor([[1, -1, -1], [-1, 1, -1], [-1, -1, 1], [0, 0, 0]], dtype=torch.float32)
            self.mix.weight.copy_(900 * weights.view(4, 3, 1, 1))  # far above what eight bits hold
            assert self.mix.bias is not None
            self.mix.bias.zero_()
        self.pool = nn.AvgPool2d(4)
        self.seen = nn.ReLU()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.seen(self.pool(self.mix(images)))


class ColourNames:
    """Says which colour stands out the most: “a green thing”."""

    name = "colours/names"

    def identity(self) -> dict[str, object]:
        return {"colours": 1}

    def to(self, device: torch.device) -> ColourNames:
        return self

    def caption(self, images: Sequence[np.ndarray]) -> list[str]:
        captions = []
        for image in images:
            pixels = image.reshape(-1, 3).astype(np.float32)
            excess = pixels - (pixels.sum(axis=1, keepdims=True) - pixels)
            captions.append(f"a {SEEN[int(np.maximum(excess, 0).mean(axis=0).argmax())]} thing")
        return captions


class ColourGrid(nn.Module):
    """Embeds images by the mean colours of 4 × 4 fields."""

    name, width, view = "colours/grid", 48, View(64, 64)

    def identity(self) -> dict[str, object]:
        return {"grid": 1}

    text_identity = identity

    def embed_images(self, images: torch.Tensor) -> torch.Tensor:
        fields = nn.functional.adaptive_avg_pool2d(images - 0.5, 4).flatten(1)
        return nn.functional.normalize(fields, dim=1)

    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """A text is an image of the colours that it names."""
        fields = [[[[float(colour in text)]] for colour in SEEN] for text in texts]
        return self.embed_images(torch.tensor(fields).expand(-1, -1, 4, 4))


def watcher(weights: str | None) -> nn.Module:
    return Watcher()


register_model("colours/watcher", watcher, ("seen",), Preprocess(View(64, 64), (0, 0, 0), (1, 1, 1)))
register_probe("colours", lambda: WorldProbe("probe", SCENES))
register_image_text("colours/grid", ColourGrid)  # type: ignore[arg-type]  # it has a view: no embed_maps
register_image_captioner("colours/names", ColourNames)
