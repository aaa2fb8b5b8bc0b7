"""Uses the probe's own concept maps in place of a model of images and texts: an oracle for testing judges."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor


class ConceptTruth:
    """Embeds images by the concepts that they show, and texts by the concepts that they name.

    The product of an image's and a text's embedding is the share of the named concepts that the image shows: 0 to 1,
    and 0 for a text that names none. It replaces the cosine.

    Attributes:
        names: All concepts.
        width: Number of concepts.
        view: None: it reads concept maps, not pixels.
    """

    view = None

    def __init__(self, names: Sequence[str], named: Callable[[str], Collection[str]], digest: str) -> None:
        """Stores the concepts of a probe.

        Args:
            names: All concepts, as the probe's concept maps name them.
            named: Text → the concepts that it names.
            digest: Identifies the version of both.
        """
        self.names, self._named, self._digest = tuple(names), named, digest

    @property
    def width(self) -> int:
        """Size of embeddings."""
        return len(self.names)

    def identity(self) -> dict[str, object]:
        """Everything that determines embeddings of images besides their concept maps."""
        return {"truth": self._digest, "names": self.names}

    def text_identity(self) -> dict[str, object]:
        """Everything that determines embeddings of texts."""
        return self.identity()

    def to(self, device: torch.device) -> ConceptTruth:
        """Returns itself: there is nothing to move."""
        return self

    def embed_images(self, images: Tensor) -> Tensor:
        """Not supported: this model reads concept maps, not pixels.

        Raises:
            TypeError: Always.
        """
        raise TypeError("the truth of an image is in its concept maps, not in its pixels")

    def embed_maps(self, maps: Sequence[Mapping[str, np.ndarray] | None]) -> Tensor:
        """Marks the concepts that each image shows in at least one pixel.

        Args:
            maps: Concept → bool (H, W) of N images; None, and concepts left out, count as not shown.

        Returns:
            float32 (N, D), 0 or 1.
        """
        shown = [
            [bool(found is not None and name in found and found[name].any()) for name in self.names] for found in maps
        ]
        return torch.tensor(shown, dtype=torch.float32).view(len(maps), self.width)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """The share of each named concept per text: float32 (N, D); rows sum to 1, or to 0 without named concepts."""
        named = torch.tensor([[float(name in found) for name in self.names] for found in map(self._named, texts)]).view(
            len(texts), self.width
        )
        return named / named.sum(dim=1, keepdim=True).clamp(min=1)
