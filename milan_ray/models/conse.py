"""A weak model of images and texts out of two packages, registered as ``photos/conse`` (docs/photographs.md).

It stands in for CLIP where no CLIP is to be had: an ImageNet classifier sees the images, a sentence encoder reads the
texts, and the classifier's own class names connect the two. It is computed in seconds, not trained, and is always the
same. It knows what resembles ImageNet's classes.

Source: Norouzi et al., *Zero-shot learning by convex combination of semantic embeddings* (ConSE, ICLR 2014).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from milan_ray.models.concepts import EVERYDAY, concept_list
from milan_ray.models.folders import MINILM, require_packaged
from milan_ray.models.image_text import register_image_text
from milan_ray.models.view import View
from milan_ray.models.weights import folder_digest, weights_digest

NAME = "photos/conse"

TOP, TEMPERATURE = 50, 0.5
"""ConSE: the classes that count, and the factor of their logits. Chosen by zero-shot accuracy among classes held out
(docs/photographs.md), as is the ridge's weight; all of them matter little."""

RIDGE = 10.0
"""Weight of the squared norm of the map from texts to class vectors."""


def mix_classes(logits: Tensor, classes: Tensor, top: int = TOP, temperature: float = TEMPERATURE) -> Tensor:
    """ConSE: the mean of the likeliest classes' text vectors, weighted by probability.

    Args:
        logits: Float (N, K).
        classes: Text vectors of the K classes, float (K, D).
        top: Number of classes that count.
        temperature: Factor of the logits.

    Returns:
        Float (N, D).
    """
    values, places = (temperature * logits).topk(min(top, logits.shape[1]), dim=1)
    return (values.softmax(dim=1)[:, :, None] * classes[places]).sum(dim=1)


def ridge_map(texts: Tensor, targets: Tensor, weight: float = RIDGE) -> Tensor:
    """The linear map M that minimises |texts·M − targets|² + weight·|M|².

    Args:
        texts: Float (K, D).
        targets: Float (K, E).
        weight: Of the squared norm of M.

    Returns:
        Float (D, E).
    """
    x, y = texts.double(), targets.double()
    solved: Tensor = torch.linalg.solve(x.T @ x + weight * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)
    return solved.float()


def joined(first: Tensor, second: Tensor) -> Tensor:
    """Two parts of N embeddings as one of length 1: a product is the mean of the parts' cosines."""
    return torch.cat([F.normalize(first, dim=1), F.normalize(second, dim=1)], dim=1) / 2**0.5


class Conse:
    """Implements :class:`milan_ray.models.image_text.Embedder`.

    An embedding has two parts. In MiniLM's space, an image is the mix of the class names that the classifier sees,
    and a text is its vector, both with the mean class name subtracted. In the space that the classifier reads, an image
    is its features, and a text is mapped there by a ridge regression from class names to class vectors.

    Attributes:
        name: Its registered name.
        view: The classifier's.
        width: Size of embeddings.
        device: Where it runs.
    """

    name = NAME

    def __init__(self) -> None:
        """Loads both parts on the CPU.

        Raises:
            MilanError: A package is not installed.
        """
        from milan_ray.models.efficientnet_lite import PREPROCESS, build  # imports torchvision
        from milan_ray.models.sentences import SentenceEncoder

        self._folder = minilm_folder()
        self._network = build(None).eval().requires_grad_(False)
        self._texts = SentenceEncoder(self._folder, "cpu")
        targets = self._network.fc.weight.detach()
        self._targets = targets - targets.mean(dim=0)
        self.view: View = PREPROCESS.view
        self.device = torch.device("cpu")
        self.width: int = self._texts.embed_texts([]).shape[1] + targets.shape[1]

    def identity(self) -> dict[str, object]:
        """Everything that determines embeddings of images besides the images."""
        return {"conse": 1, "top": TOP, "temperature": TEMPERATURE, **self.text_identity()}

    def text_identity(self) -> dict[str, object]:
        """Everything that determines embeddings of texts."""
        return {
            "conse-text": 1,
            "ridge": RIDGE,
            "classifier": weights_digest(self._network.cpu()),
            "texts": folder_digest(str(self._folder)),
        }

    def to(self, device: torch.device) -> Conse:
        """Moves the classifier to a device; texts are embedded on the CPU."""
        self.device = device
        self._network.to(device)
        return self

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """Embeds images (N, 3, H, W) in [0, 1], of any size, as float32 (N, D); an image does not affect others."""
        from milan_ray.models.efficientnet_lite import classified

        embedded = [torch.zeros(0, self.width)]
        for features, logits in classified(self._network, images):
            embedded.append(joined(mix_classes(logits, self._classes) - self._mean, features))
        return torch.cat(embedded)

    def embed_maps(self, maps: Sequence[Mapping[str, np.ndarray] | None]) -> Tensor:
        """Not supported: it reads pixels, not concept maps.

        Raises:
            TypeError: Always.
        """
        raise TypeError(f"{NAME} looks at pixels, not at concept maps")

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embeds texts as float32 (N, D)."""
        if not texts:
            return torch.zeros(0, self.width)
        vectors = F.normalize(self._texts.embed_texts(list(texts)) - self._mean, dim=1)
        return joined(vectors, vectors @ self._map)

    # Computed when first needed: a run that finds everything up to date needs neither.

    @cached_property
    def _classes(self) -> Tensor:
        """Text vectors of the class names, (1000, 384)."""
        return class_vectors(self._folder)

    @cached_property
    def _mean(self) -> Tensor:
        return self._classes.mean(dim=0)

    @cached_property
    def _map(self) -> Tensor:
        """From texts to class vectors, (384, 1280)."""
        return ridge_map(F.normalize(self._classes - self._mean, dim=1), self._targets)


def minilm_folder() -> Path:
    """Folder of the sentence encoder.

    Raises:
        MilanError: Its package is not installed.
    """
    return require_packaged(MINILM, f"the sentence encoder of {NAME} comes", "photos") / "model"


@cache
def class_vectors(folder: Path) -> Tensor:
    """Text vectors of ImageNet's class names, float32 (1000, D); once per process, which loads the model several times.

    Args:
        folder: The sentence encoder's.
    """
    from milan_ray.models.efficientnet_lite import CLASSES
    from milan_ray.models.sentences import SentenceEncoder

    return SentenceEncoder(folder, "cpu").embed_texts(CLASSES)


register_image_text(NAME, Conse, concept_list(EVERYDAY))
