"""MILAN+CLIP: a wide beam of candidates, ranked by a model of images and texts (docs/clip.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from milan_ray.captioner.captioner import Captioner
from milan_ray.labelers.milan import N_BEST, rank
from milan_ray.labelers.protocol import Evidence, Kind, Label
from milan_ray.models.image_text import ImageText, ImageTextRef

CLIP = "milan+clip"
"""The labeler's name."""

BEAM_SIZE = 1000
"""Candidates per unit: the reference's."""


@dataclass(frozen=True)
class Clip(ImageTextRef):
    """How to re-rank.

    Attributes:
        folder: The model of images and texts, as :func:`milan_ray.models.image_text.find_image_text` gives it.
        z: Weight of whole images against their masked regions.
        beam_size: Candidates per unit; None takes 1000, the reference's, or what the vocabulary has room for.
        lam: λ of the search for candidates, which subtracts λ·log p(d) token by token (the reference's .5).
    """

    z: float = 0.5
    beam_size: int | None = None
    lam: float = 0.5

    def load(self) -> ImageText:
        """The model, on the CPU.

        Raises:
            MilanError: It is missing or damaged.
        """
        return ImageText(self.folder)

    def beams(self, captioner: Captioner) -> int:
        """Width of the search for candidates."""
        return self.beam_size or min(BEAM_SIZE, captioner.decoder.config.ids.total)

    def mi_lam(self, captioner: Captioner) -> float | None:
        """λ of the search; None for a captioner without a language model, whose log p(d|E) alone is searched for."""
        return None if captioner.lm is None else self.lam

    def labeler(self) -> ClipSimilarity:
        """What ranks."""
        return ClipSimilarity(self.z, self.load().text_identity())


@dataclass(frozen=True)
class ClipSimilarity:
    """Ranks by how well a model of images and texts finds a candidate to fit the exemplars (docs/clip.md).

    Attributes:
        z: Weight of whole images against their masked regions.
        model: Identity of the model of images and texts.
    """

    z: float
    model: Mapping[str, object]
    name: str = field(default=CLIP, init=False)
    lam: None = field(default=None, init=False)
    requires: tuple[Kind, ...] = field(default=("candidates", "similarity"), init=False)

    def identity(self) -> dict[str, object]:
        """All that decides its labels besides candidates and embeddings of exemplars."""
        return {"similarity": 1, "z": self.z, "clip": dict(self.model), "n_best": N_BEST}

    def label(self, evidence: Evidence) -> dict[int, list[Label]]:
        """The best candidates of every unit."""
        assert evidence.candidates is not None and evidence.similarity is not None  # required
        return rank(evidence.candidates, evidence.similarity)


def query(features: np.ndarray, z: float) -> np.ndarray:
    """What texts are compared with to see how well they fit a unit: the mean of (1 − z) · region + z · image.

    Products of unit vectors are cosines, and the mean of products is the product with the mean: one vector stands for
    all of a unit's exemplars (with the mean in place of the reference's sum).

    Args:
        features: Of k exemplars, each the region's embedding, then the image's: (k, 2 D).
        z: Weight of the whole image.

    Returns:
        (D,).
    """
    regions, images = np.split(features, 2, axis=1)
    return ((1 - z) * regions + z * images).mean(axis=0, dtype=np.float32)


def similarity(texts: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Mean cosines of texts (N, D) with units' queries (N, D), row by row: float32 (N,)."""
    # Not a matrix product: a row's last bits must not depend on which rows are its neighbours.
    return np.einsum("nd,nd->n", texts, queries)
