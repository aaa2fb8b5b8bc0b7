"""The labeler ``dnd``: selects the candidate whose generated images activate a unit most and resemble its exemplars."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from milan_ray.errors import MilanError, unknown_name
from milan_ray.labelers.dnd.scoring import COMPARING, SCORINGS, order
from milan_ray.labelers.protocol import Drawn, Evidence, Kind, Label
from milan_ray.names import checked_name

DND = "dnd"
"""The labeler's name without a tag; with a tag, the name is ``dnd-TAG``."""

N_BEST = 5


@dataclass(frozen=True)
class DescribeAndDissect:
    """Ranks candidate labels by the images generated for them.

    Attributes:
        scoring: A key of :data:`milan_ray.labelers.dnd.scoring.SCORINGS`.
        tag: Suffix of the name that distinguishes several configurations; "" for none.
    """

    scoring: str = "topk-compare"
    tag: str = ""

    lam: ClassVar[None] = None
    requires: ClassVar[tuple[Kind, ...]] = ("drawn",)

    def __post_init__(self) -> None:
        if self.scoring not in SCORINGS:
            raise unknown_name("scoring function", self.scoring, SCORINGS)
        if not re.fullmatch(r"[\w.+-]*", self.tag):
            raise MilanError(f"{self.tag!r} cannot be a tag: give letters, digits, '.', '_', '+' and '-' alone.")
        checked_name("a labeler", self.name)

    @property
    def name(self) -> str:
        """The labeler's name, which is also the partition of descriptions that it writes."""
        return f"{DND}-{self.tag}" if self.tag else DND

    @property
    def compares(self) -> bool:
        """Whether the labeler needs similarities of generated images to exemplars."""
        return self.scoring in COMPARING

    def identity(self) -> dict[str, object]:
        """Everything that determines the labels, except the generated images."""
        return {"dnd": 1, "scoring": self.scoring, "n_best": N_BEST}

    def label(self, evidence: Evidence) -> dict[int, list[Label]]:
        """The best candidates of every unit."""
        assert evidence.drawn is not None  # required
        return {unit: best(self.scoring, drawn) for unit, drawn in evidence.drawn.items()}


def best(scoring: str, drawn: Sequence[Drawn], n_best: int = N_BEST) -> list[Label]:
    """The best candidates of one unit."""
    none = [np.zeros(0, np.float32)] * len(drawn)
    similarities = [one.similarities for one in drawn if one.similarities is not None] or none
    ranking = order(scoring, [one.activations for one in drawn], similarities)
    return [Label(drawn[place].text, score) for place, score in ranking[:n_best]]
