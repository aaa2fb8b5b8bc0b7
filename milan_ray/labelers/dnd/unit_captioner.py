"""Uses a captioner of units as a captioner of images: each whole image is the only exemplar of a separate unit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from milan_ray.captioner.captioner import Captioner
from milan_ray.captioner.checkpoints import digest
from milan_ray.captioner.encoder import PyramidEncoder
from milan_ray.captioner.rerank import CHOICE_VERSION
from milan_ray.device import to_device

BATCH_SIZE = 16


class WholeImages:
    """Captions whole images with a captioner that was trained on masked regions of units' exemplars.

    Attributes:
        name: The captioner's name.
    """

    def __init__(self, name: str, captioner: Captioner, encoder: PyramidEncoder) -> None:
        """Stores a captioner and the encoder that it was trained with, both on the CPU."""
        self.name = name
        self._captioner, self._encoder = captioner, encoder

    def identity(self) -> dict[str, object]:
        """Everything that determines the captions, except the images."""
        return {"captioner": digest(self._captioner), "encoder": self._encoder.identity(), "choice": CHOICE_VERSION}

    def to(self, device: torch.device) -> WholeImages:
        """Moves the captioner and its encoder to a device."""
        self._captioner.to(str(device))
        self._encoder.to(device)
        return self

    def caption(self, images: Sequence[np.ndarray]) -> list[str]:
        """Captions images of one size, uint8 (H, W, 3) each; takes the best text by log p(d|E) − λ·log p(d)."""
        lam = None if self._captioner.lm is not None else 0.0
        captions: list[str] = []
        for start in range(0, len(images), BATCH_SIZE):
            some = np.stack(images[start : start + BATCH_SIZE])
            full = np.concatenate([some, np.repeat(some[:1], BATCH_SIZE - len(some), axis=0)])
            pixels = to_device(torch.from_numpy(full), self._encoder.mean.device).permute(0, 3, 1, 2).float() * (
                1 / 255
            )
            features = self._encoder(self._encoder.fit(pixels))[:, None]
            described = self._captioner.describe(features, lam)[: len(some)]
            captions += [best[0].text for best in described]
        return captions
