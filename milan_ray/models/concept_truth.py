"""Uses the probe's own concept maps in place of a model of images and texts: an oracle for testing judges."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor


class ConceptTruth:
    """Images by the concepts that show, texts by the concepts that they name.

    The product of an image's and a text's embedding is the share of the named concepts that show: 0 to 1, and 0 for a
    text that names none. It takes the place of a cosine.

    Attributes:
        names: All concepts.
        width: How many they are.
        view: None: it looks at concept maps, not at pixels.
    """

    view = None

    def __init__(self, names: Sequence[str], named: Callable[[str], Collection[str]], digest: str) -> None:
        """Takes the words of a probe.

        Args:
            names: All concepts, as the probe's concept maps name them.
            named: Text → the concepts that it names.
            digest: Tells versions of both apart.
        """
        self.names, self._named, self._digest = tuple(names), named, digest

    @property
    def width(self) -> int:
        """Size of embeddings."""
        return len(self.names)

    def identity(self) -> dict[str, object]:
        """All that decides embeddings of images besides their concept maps."""
        return {"truth": self._digest, "names": self.names}

    def text_identity(self) -> dict[str, object]:
        """All that decides embeddings of texts."""
        return self.identity()

    def to(self, device: torch.device) -> ConceptTruth:
        """Itself: there is nothing to move."""
        return self

    def embed_images(self, images: Tensor) -> Tensor:
        """Not supported: this model reads concept maps, not pixels.

        Raises:
            TypeError: Always.
        """
        raise TypeError("the truth of an image is in its concept maps, not in its pixels")

    def embed_maps(self, maps: Sequence[Mapping[str, np.ndarray] | None]) -> Tensor:
        """Which concepts show in some images, by at least one pixel.

        Args:
            maps: Concept → bool (H, W) of N images; None and what is left out do not show.

        Returns:
            float32 (N, D), 0 or 1.
        """
        shown = [
            [bool(found is not None and name in found and found[name].any()) for name in self.names] for found in maps
        ]
        return torch.tensor(shown, dtype=torch.float32).view(len(maps), self.width)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Which concepts some texts name, each by its share: float32 (N, D), rows sum to 1, or to 0 without any."""
        named = torch.tensor([[float(name in found) for name in self.names] for found in map(self._named, texts)]).view(
            len(texts), self.width
        )
        return named / named.sum(dim=1, keepdim=True).clamp(min=1)
