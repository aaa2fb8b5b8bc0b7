"""MILAN+CLIP: a wide beam of candidates, re-ranked by an image-text model such as CLIP (docs/clip.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from milan_ray.captioner.captioner import Captioner
from milan_ray.captioner.rerank import CHOICE_VERSION
from milan_ray.labelers.milan import N_BEST, rank
from milan_ray.labelers.protocol import Evidence, Kind, Label
from milan_ray.models.image_text import ImageText, ImageTextRef

CLIP = "milan+clip"
"""The labeler's name."""

CLIP_CONTRAST = "milan+clip-contrast"
"""The name of the same labeler where it sets exemplars against contrasts (docs/contrast.md)."""

BEAM_SIZE = 1000
"""Candidates per unit: the reference implementation's default."""


@dataclass(frozen=True)
class Clip(ImageTextRef):
    """Parameters of the re-ranking.

    Attributes:
        folder: The image-text model, as :func:`milan_ray.models.image_text.find_image_text` returns it.
        z: Weight of whole images; masked regions have weight 1 − z.
        beam_size: Candidates per unit; None takes 1000, the reference's default, or the vocabulary's size if smaller.
        lam: λ of the beam search, which subtracts λ·log p(d) token by token (0.5 in the reference).
        gamma: γ, weight of the unit's contrasts against its exemplars; 0 for none.
    """

    z: float = 0.5
    beam_size: int | None = None
    lam: float = 0.5
    gamma: float = 0.0

    def load(self) -> ImageText:
        """Loads the image-text model on the CPU.

        Raises:
            MilanError: The model is missing or damaged.
        """
        return ImageText(self.folder)

    def beams(self, captioner: Captioner) -> int:
        """Width of the beam search."""
        return self.beam_size or min(BEAM_SIZE, captioner.decoder.config.ids.total)

    def mi_lam(self, captioner: Captioner) -> float | None:
        """λ of the beam search; None for a captioner without a language model, which is searched by log p(d|E)."""
        return None if captioner.lm is None else self.lam

    def labeler(self, plain_choice: bool = False) -> ClipSimilarity:
        """The labeler with these parameters."""
        return ClipSimilarity(self.z, self.load().text_identity(), plain_choice, self.gamma)


@dataclass(frozen=True)
class ClipSimilarity:
    """Ranks candidates by their similarity to the exemplars in an image-text model (docs/clip.md).

    Attributes:
        z: Weight of whole images; masked regions have weight 1 − z.
        model: Identity of the image-text model.
        plain_choice: The reference's choice, see :class:`milan_ray.captioner.quirks.Quirks`.
        gamma: γ: the score is the similarity to the exemplars less γ times that to the contrasts.
    """

    z: float
    model: Mapping[str, object]
    plain_choice: bool = False
    gamma: float = 0.0
    lam: None = field(default=None, init=False)
    requires: tuple[Kind, ...] = field(default=("candidates", "similarity"), init=False)

    @property
    def name(self) -> str:
        """The labeler's name: another with contrasts, so that both can stand in one run directory."""
        return CLIP_CONTRAST if self.gamma else CLIP

    def identity(self) -> dict[str, object]:
        """Everything that determines the labels, except candidates and embeddings of exemplars and contrasts."""
        version = 1 if self.plain_choice else CHOICE_VERSION
        identity = {"similarity": version, "z": self.z, "clip": dict(self.model), "n_best": N_BEST}
        return identity | {"gamma": self.gamma} if self.gamma else identity

    def label(self, evidence: Evidence) -> dict[int, list[Label]]:
        """The best candidates of every unit."""
        assert evidence.candidates is not None and evidence.similarity is not None  # required
        return rank(evidence.candidates, evidence.similarity, self.plain_choice)


def query(features: np.ndarray, z: float) -> np.ndarray:
    """The query vector of a unit, to which texts are compared: the mean of (1 − z) · region + z · image.

    The product of two unit vectors is their cosine, and the mean of products equals the product with the mean. So one
    vector represents all exemplars of a unit. The reference uses the sum instead of the mean.

    Args:
        features: Embeddings of k exemplars, each the region's followed by the image's: (k, 2 D).
        z: Weight of the whole image.

    Returns:
        (D,).
    """
    regions, images = np.split(features, 2, axis=1)
    return ((1 - z) * regions + z * images).mean(axis=0, dtype=np.float32)


def contrasted_query(features: np.ndarray, contrasts: np.ndarray | None, z: float, gamma: float) -> np.ndarray:
    """The query vector of a unit less γ times that of its contrasts, so that a text's product with it is its score.

    Args:
        features: Embeddings of k exemplars, as in :func:`query`.
        contrasts: The same of its contrasts; None for a unit without.
        z: Weight of the whole image.
        gamma: γ.

    Returns:
        (D,).
    """
    own = query(features, z)
    return own if contrasts is None or not gamma else own - np.float32(gamma) * query(contrasts, z)


def similarity(texts: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Mean cosines of texts (N, D) with units' queries (N, D), row by row: float32 (N,)."""
    # Not a matrix product: the last bits of a row must not depend on the other rows.
    return np.einsum("nd,nd->n", texts, queries)
