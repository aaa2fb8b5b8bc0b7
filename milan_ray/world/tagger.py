"""The world's captioner of images: names the concepts that its encoder, trained on image-level labels, detects."""

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
"""Maximum number of concepts in a caption."""

USUAL = 256
"""Number of scenes of the split ``train`` from which the mean logits are computed."""

BATCH_SIZE = 16


class SceneTagger:
    """Captions an image with the concepts whose logits exceed the usual level most, in plain words: “red, house, roof”.

    It is the world's counterpart of a captioning model for photographs. It is trained on labels of whole images, and
    uses no units, masks or ground truth of the image.

    Attributes:
        name: The captioner's name.
    """

    name = "world/tagger"

    def __init__(self, build: Callable[[], nn.Module]) -> None:
        """Loads the encoder.

        Args:
            build: Builds the encoder with its weights, on the CPU.
        """
        self._network = build().eval().requires_grad_(False)
        self._usual: torch.Tensor | None = None

    def identity(self) -> dict[str, object]:
        """Everything that determines the captions, except the images."""
        return {"tagger": 1, "weights": weights_digest(self._network), "world": WORLD_VERSION, "most": MOST}

    def to(self, device: torch.device) -> SceneTagger:
        """Moves the encoder to a device."""
        self._network.to(device)
        return self

    def caption(self, images: Sequence[np.ndarray]) -> list[str]:
        """Captions images, uint8 (64, 64, 3) each, with up to :data:`MOST` concepts, the most unusual first."""
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
        """Logits (N, C) of each concept's occurrence, in full batches, so that images do not affect each other."""
        device = next(self._network.parameters()).device
        logits = []
        for batch in images.split(BATCH_SIZE):
            full = torch.cat([batch, batch.new_zeros(BATCH_SIZE - len(batch), *batch.shape[1:])])
            logits.append(self._network(PREPROCESS(full.to(device)))[: len(batch), len(CLASSES) :].cpu())
        return torch.cat(logits)
