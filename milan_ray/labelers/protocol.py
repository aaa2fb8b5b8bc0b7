"""The labeler protocol: a labeler is a method that labels units from evidence that earlier stages computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import pyarrow as pa

from milan_ray.exemplars.concepts import ConceptCounts

Kind = Literal["candidates", "contrasted", "similarity", "counts", "formulas", "concepts", "drawn"]
"""A kind of evidence: the name of a field of :class:`Evidence`."""


@dataclass(frozen=True)
class Label:
    """One label of one unit.

    Attributes:
        text: The label.
        score: The labeler's own score; higher is better.
        logp_d_given_e: log p(d|E), nats; None for labelers without one.
        logp_d: log p(d), nats; None for labelers without one.
    """

    text: str
    score: float
    logp_d_given_e: float | None = None
    logp_d: float | None = None


@dataclass(frozen=True)
class Drawn:
    """A unit's responses to the images that were generated for one candidate label.

    Attributes:
        text: The candidate.
        activations: The unit's pooled activation on each of n images, float32 (n,).
        similarities: Each image's mean cosine with the unit's exemplars, float32 (n,); None if not requested.
    """

    text: str
    activations: np.ndarray
    similarities: np.ndarray | None = None


@dataclass(frozen=True)
class Evidence:
    """Evidence about a layer's units. A field is None unless the labeler requires it.

    Attributes:
        candidates: A captioner's candidate descriptions: rows of the table of candidates, by unit and beam rank.
        contrasted: log p(d|C) of each candidate, given its unit's contrasts C, nats, float32 (rows of candidates); NaN
            where the unit has none.
        similarity: Similarity of each candidate to its unit's exemplars, float32 (rows of candidates).
        counts: Separate and joint counts of units and concepts over the whole probe.
        formulas: Unit → its formulas of concepts, as text, best first.
        concepts: Unit → the concepts of a list that match its activations over a probe best, best first.
        drawn: Unit → its candidate labels with the responses to their generated images, in the order of proposal.
    """

    candidates: pa.Table | None = None
    similarity: np.ndarray | None = None
    counts: ConceptCounts | None = None
    formulas: Mapping[int, list[Label]] | None = None
    concepts: Mapping[int, list[Label]] | None = None
    drawn: Mapping[int, list[Drawn]] | None = None
    contrasted: np.ndarray | None = None


class Labeler(Protocol):
    """A method that labels units.

    Labelers are sent to workers and label one layer at a time. Separate stages compute what a labeler needs from whole
    probes or large models, and pass it as evidence.
    """

    @property
    def name(self) -> str:
        """The labeler's name, which is also the partition of descriptions that it writes."""

    @property
    def requires(self) -> tuple[Kind, ...]:
        """The kinds of evidence that the labeler needs."""

    @property
    def lam(self) -> float | None:
        """λ; None for labelers without one."""

    def identity(self) -> dict[str, object]:
        """Everything that determines the labels, except the evidence."""

    def label(self, evidence: Evidence) -> Mapping[int, list[Label]]:
        """The labels of every unit, best first and distinct: unit → labels."""
