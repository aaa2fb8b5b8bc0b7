"""Network dissection: labels a unit with the concept whose map overlaps its mask most (Bau et al. 2017, 2020).

Uses the 2020 version's intersection over union: counts summed over the whole probe, without concept categories
(docs/labelers.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from milan_ray.exemplars.concepts import ConceptCounts, iou
from milan_ray.labelers.protocol import Evidence, Kind, Label

NETDISSECT = "netdissect"
"""The labeler's name."""

INTERPRETABLE = 0.04
"""Minimum intersection over union of an interpretable unit (in both versions of network dissection)."""

NOTHING = "none"
"""Label of a unit that overlaps no concept; its score is 0."""

N_BEST = 5


@dataclass(frozen=True)
class NetDissect:
    """Labels a unit with single concepts."""

    name: ClassVar[str] = NETDISSECT
    lam: ClassVar[None] = None
    requires: ClassVar[tuple[Kind, ...]] = ("counts",)

    def identity(self) -> dict[str, object]:
        """Everything that determines the labels, except the counts."""
        return {"netdissect": 1, "n_best": N_BEST}

    def label(self, evidence: Evidence) -> dict[int, list[Label]]:
        """The best concepts of every unit."""
        assert evidence.counts is not None  # required
        return best_concepts(evidence.counts)


def best_concepts(counts: ConceptCounts, n_best: int = N_BEST) -> dict[int, list[Label]]:
    """The concepts with the highest intersection over union for every unit; ties in the order of names.

    Args:
        counts: Counts over a whole probe.
        n_best: Maximum number of concepts per unit.
    """
    names, sizes, both = counts.result()
    scores = iou(both, counts.unit[:, None], sizes[None])
    labels_of: dict[int, list[Label]] = {}
    for unit, row in enumerate(scores):
        best = np.argsort(-row, kind="stable")[:n_best]
        labels = [Label(names[place], float(row[place])) for place in best.tolist() if row[place] > 0]
        labels_of[unit] = labels or [Label(NOTHING, 0.0)]
    return labels_of
