"""What a labeler is: a method that names units from evidence that the stages before it have gathered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import pyarrow as pa

from milan_ray.exemplars.concepts import ConceptCounts

Kind = Literal["candidates", "similarity", "counts", "formulas", "concepts", "drawn"]
"""A piece of evidence, as :class:`Evidence` names it."""


@dataclass(frozen=True)
class Label:
    """One label of one unit.

    Attributes:
        text: The label.
        score: The labeler's own score, higher is better.
        logp_d_given_e: log p(d|E), nats; None for labelers without one.
        logp_d: log p(d), nats; None for labelers without one.
    """

    text: str
    score: float
    logp_d_given_e: float | None = None
    logp_d: float | None = None


@dataclass(frozen=True)
class Drawn:
    """What a unit makes of the images that were drawn for one candidate label.

    Attributes:
        text: The candidate.
        activations: The unit's pooled activation on each of n images, float32 (n,).
        similarities: Each image's mean cosine with the unit's exemplars, float32 (n,); None where none was asked for.
    """

    text: str
    activations: np.ndarray
    similarities: np.ndarray | None = None


@dataclass(frozen=True)
class Evidence:
    """What is known of a layer's units.

    Attributes:
        candidates: Descriptions that a captioner proposes: rows of the table of candidates, by unit and beam rank. Like
            all evidence, None unless it is required.
        similarity: How well each candidate fits its unit's exemplars, float32 (rows of candidates); by row.
        counts: How often units and concepts are on, apart and together, over the whole probe.
        formulas: Unit → the formulas of concepts found for it, in words, best first.
        concepts: Unit → the concepts of a list that its activations over a probe follow best, best first.
        drawn: Unit → its candidate labels with the images drawn for them, in the order in which they were proposed.
    """

    candidates: pa.Table | None = None
    similarity: np.ndarray | None = None
    counts: ConceptCounts | None = None
    formulas: Mapping[int, list[Label]] | None = None
    concepts: Mapping[int, list[Label]] | None = None
    drawn: Mapping[int, list[Drawn]] | None = None


class Labeler(Protocol):
    """A way to label units.

    Labelers travel to workers and label a layer at a time; what they need of whole probes or big models is made by
    stages of its own, and is evidence.
    """

    @property
    def name(self) -> str:
        """The partition of descriptions that it writes."""

    @property
    def requires(self) -> tuple[Kind, ...]:
        """The evidence that it needs."""

    @property
    def lam(self) -> float | None:
        """λ; None for labelers without one."""

    def identity(self) -> dict[str, object]:
        """All that decides its labels besides the evidence."""

    def label(self, evidence: Evidence) -> Mapping[int, list[Label]]:
        """The labels of every unit, best first, no two alike: unit → labels."""
