"""The world's captioner of images: what it names, and that neighbours do not matter."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from milan_ray.world.encoder import EncoderNet
from milan_ray.world.lexicon import NAMES, concepts_in
from milan_ray.world.networks import CLASSES
from milan_ray.world.scenes import SIDE
from milan_ray.world.tagger import BATCH_SIZE, MOST, SceneTagger


class Brightness(nn.Module):
    """Says “night” of dark images, “day” of bright ones, and “sky” of all."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = torch.full((len(images), len(CLASSES) + len(NAMES)), -9.0)
        bright = self.scale * images.mean(dim=(1, 2, 3))
        for name, value in (("night", -5 * bright), ("day", 5 * bright), ("sky", torch.full_like(bright, 9.0))):
            logits[:, len(CLASSES) + NAMES.index(name)] = value
        return logits


def test_what_is_unusual_comes_first():
    dark, bright = np.zeros((SIDE, SIDE, 3), np.uint8), np.full((SIDE, SIDE, 3), 255, np.uint8)
    assert SceneTagger(Brightness).caption([dark, bright]) == ["night, sky", "clear sky, sky"]


def untrained() -> EncoderNet:
    torch.manual_seed(0)
    return EncoderNet()


def test_captions_do_not_depend_on_neighbours():
    rng = np.random.default_rng(0)
    images = list(rng.integers(0, 256, (BATCH_SIZE + 3, SIDE, SIDE, 3), dtype=np.uint8))
    tagger = SceneTagger(untrained)
    together = tagger.caption(images)
    assert [tagger.caption([image])[0] for image in images] == together
    for caption in together:
        assert caption == "shapes" or 0 < len(caption.split(", ")) <= MOST
        assert caption == "shapes" or concepts_in(caption)
    other = SceneTagger(Brightness).identity()
    assert SceneTagger(untrained).identity() == tagger.identity() != other
