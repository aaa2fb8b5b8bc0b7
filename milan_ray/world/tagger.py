"""The world's captioner of images: what its image encoder, trained on image-level labels alone, finds in one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from milan_ray.models.weights import weights_digest
from milan_ray.world.lexicon import CONCEPT, NAMES
from milan_ray.world.networks import CLASSES
from milan_ray.world.scenes import WORLD_VERSION
from milan_ray.world.training import PREPROCESS, images_of

MOST = 5
"""Concepts that a caption names at most."""

USUAL = 256
"""Scenes of the split ``train`` that say what is usual."""

BATCH_SIZE = 16


class SceneTagger:
    """Names what an image shows more surely than most images do: “red, houses, roofs” (in the lexicon's plain words).

    It is to the world what a captioning model is to photographs: it learned what images show, from labels of whole
    images, and knows nothing of units, masks or the truth behind the image at hand.

    Attributes:
        name: Its name.
    """

    name = "world/tagger"

    def __init__(self, build: Callable[[], nn.Module]) -> None:
        """Loads the encoder.

        Args:
            build: Builds it with its weights, on the CPU.
        """
        self._network = build().eval().requires_grad_(False)
        self._usual: torch.Tensor | None = None

    def identity(self) -> dict[str, object]:
        """All that decides its captions besides the images."""
        return {"tagger": 1, "weights": weights_digest(self._network), "world": WORLD_VERSION, "most": MOST}

    def to(self, device: torch.device) -> SceneTagger:
        """The tagger, moved."""
        self._network.to(device)
        return self

    def caption(self, images: Sequence[np.ndarray]) -> list[str]:
        """One caption per image, uint8 (64, 64, 3) each: up to :data:`MOST` concepts, the most unusual first."""
        if self._usual is None:
            self._usual = self._occurs(images_of("train", 0, USUAL)).mean(dim=0)
        logits = self._occurs(torch.from_numpy(np.stack(images)))
        captions = []
        for row, surprise in zip(logits, logits - self._usual, strict=True):
            order = surprise.argsort(descending=True, stable=True).tolist()
            named = [NAMES[place] for place in order if row[place] > 0][:MOST]
            captions.append(", ".join(CONCEPT[name].synonyms[0] for name in named) or "shapes")
        return captions

    @torch.inference_mode()
    def _occurs(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (N, C) of “it occurs”, by full batches: an image's do not depend on its neighbours."""
        device = next(self._network.parameters()).device
        found = []
        for batch in images.split(BATCH_SIZE):
            full = torch.cat([batch, batch.new_zeros(BATCH_SIZE - len(batch), *batch.shape[1:])])
            found.append(self._network(PREPROCESS(full.to(device)))[: len(batch), len(CLASSES) :].cpu())
        return torch.cat(found)
