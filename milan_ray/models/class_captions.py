"""Captions in a classifier's words, registered as ``photos/classes``: what an image shows, of ImageNet's 1,000 classes.

It stands in for a captioner where none is to be had: it names things and animals, and neither colours nor textures.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from milan_ray.models.image_captions import register_image_captioner
from milan_ray.models.weights import weights_digest

NAME = "photos/classes"

MOST, SHARE = 3, 0.5
"""A caption names up to 3 classes: the likeliest, and others that are at least half as probable."""


class ClassNames:
    """Implements :class:`milan_ray.models.image_captions.ImageCaptioner` by EfficientNet-lite0.

    Attributes:
        name: Its registered name.
    """

    name = NAME

    def __init__(self) -> None:
        """Loads the classifier on the CPU.

        Raises:
            MilanError: Its package is not installed.
        """
        from milan_ray.models.efficientnet_lite import build  # imports torchvision

        self._network = build(None).eval().requires_grad_(False)

    def identity(self) -> dict[str, object]:
        """Everything that determines its captions besides the images."""
        return {"class names": 1, "most": MOST, "share": SHARE, "classifier": weights_digest(self._network.cpu())}

    def to(self, device: torch.device) -> ClassNames:
        """Moves the classifier to a device and returns it."""
        self._network.to(device)
        return self

    @torch.inference_mode()
    def caption(self, images: Sequence[np.ndarray]) -> list[str]:
        """One caption per image, uint8 (H, W, 3) each, all of one size: “tabby or tiger cat”."""
        from milan_ray.models.efficientnet_lite import CLASSES, classified

        if not images:
            return []
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() * (1 / 255)
        captions: list[str] = []
        for _, logits in classified(self._network, pixels):
            shares, places = logits.softmax(dim=1).topk(MOST, dim=1)
            for row, of_row in zip(shares.tolist(), places.tolist(), strict=True):
                likely = [CLASSES[place] for share, place in zip(row, of_row, strict=True) if share >= SHARE * row[0]]
                captions.append(" or ".join(likely))
        return captions


register_image_captioner(NAME, ClassNames)
