"""Network dissection: a unit is named after the concept whose map its mask meets best (Bau et al. 2017, 2020).

The new style's intersection over union: sums of counts over the whole probe, no categories (docs/labelers.md).
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
"""Intersection over union from which a unit counts as interpretable (both styles of network dissection)."""

NOTHING = "none"
"""Label of a unit that meets no concept at all; its score is 0."""

N_BEST = 5


@dataclass(frozen=True)
class NetDissect:
    """Names a unit after one concept."""

    name: ClassVar[str] = NETDISSECT
    lam: ClassVar[None] = None
    requires: ClassVar[tuple[Kind, ...]] = ("counts",)

    def identity(self) -> dict[str, object]:
        """All that decides its labels besides the counts."""
        return {"netdissect": 1, "n_best": N_BEST}

    def label(self, evidence: Evidence) -> dict[int, list[Label]]:
        """The best concepts of every unit."""
        assert evidence.counts is not None  # required
        return best_concepts(evidence.counts)


def best_concepts(counts: ConceptCounts, n_best: int = N_BEST) -> dict[int, list[Label]]:
    """The concepts that every unit meets best, with their intersection over union; equal ones by name.

    Args:
        counts: Of a whole probe.
        n_best: How many at most.
    """
    names, sizes, both = counts.result()
    scores = iou(both, counts.unit[:, None], sizes[None])
    found: dict[int, list[Label]] = {}
    for unit, row in enumerate(scores):
        best = np.argsort(-row, kind="stable")[:n_best]
        labels = [Label(names[place], float(row[place])) for place in best.tolist() if row[place] > 0]
        found[unit] = labels or [Label(NOTHING, 0.0)]
    return found
