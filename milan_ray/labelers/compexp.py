"""Compositional explanations: a formula of concepts per unit, by beam search (Mu and Andreas 2020; docs/labelers.md).

A formula's counts follow from those of what it extends. With J(f, c) the positions where a formula f and a concept c
are both on, |f ∨ c| = |f| + |c| − J, |f ∧ c| = J and |f ∧ ¬c| = |f| − J, and the same holds inside a unit's mask. A
round of the search is therefore one more pass of counting: shards add up exactly, and no mask of a whole probe is ever
in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from milan_ray.exemplars.concepts import ConceptCounts, ImageMasks, iou, shared
from milan_ray.labelers.netdissect import NOTHING
from milan_ray.labelers.protocol import Evidence, Kind, Label

COMPEXP = "compexp"
"""The labeler's name."""

BEAM_SIZE = 5
"""Formulas kept after every round: the reference's."""

LENGTH = 3
"""Concepts in a formula at most: what MILAN was compared with."""


@dataclass(frozen=True)
class CompExp:
    """Explains a unit by a formula of concepts.

    Attributes:
        beam_size: Formulas kept after every round, and how many labels a unit gets.
        length: Concepts in a formula at most.
    """

    beam_size: int = BEAM_SIZE
    length: int = LENGTH
    name: ClassVar[str] = COMPEXP
    lam: ClassVar[None] = None
    requires: ClassVar[tuple[Kind, ...]] = ("formulas",)

    def identity(self) -> dict[str, object]:
        """All that decides its labels besides the counts."""
        return {"compexp": 1, "beam_size": self.beam_size, "length": self.length}

    def label(self, evidence: Evidence) -> Mapping[int, list[Label]]:
        """The best formulas of every unit."""
        assert evidence.formulas is not None  # required
        return evidence.formulas


Operator = Literal["or", "and", "and not"]

Formula = tuple[tuple[Operator, int], ...]
"""Concepts by number, each with what joins it to all that stands before it; the first one's operator is ``or``."""


@dataclass(frozen=True)
class Scored:
    """A formula beside a unit.

    Attributes:
        formula: The formula, in canonical order.
        both: Positions where the formula holds and the unit is on.
        size: Positions where the formula holds.
        iou: Intersection over union.
    """

    formula: Formula
    both: int
    size: int
    iou: float

    @property
    def order(self) -> tuple[float, int, Formula]:
        """Best first; of equal ones the shorter, then the one that sorts first."""
        return -self.iou, len(self.formula), self.formula


def canonical(formula: Formula) -> Formula:
    """The same formula with what commutes in a fixed order: ``b or a`` is ``a or b``."""
    (_, head), rest = formula[0], list(formula[1:])
    done: list[tuple[Operator, int]] = []
    while rest:
        either = rest[0][0] == "or"
        count = next((n for n, (op, _) in enumerate(rest) if (op == "or") != either), len(rest))
        run, rest = rest[:count], rest[count:]
        if not done:
            run.append(("or" if either else "and", head))
        done += sorted(run)
    return (("or", head),) if not done else (("or", done[0][1]), *done[1:])


def text(formula: Formula, names: Sequence[str]) -> str:
    """A formula in words, read from left to right, lower case, underscores as spaces, no parentheses."""
    words = [f"{op} {names[concept]}" for op, concept in formula]
    return " ".join(words).removeprefix("or ").replace("_", " ").lower()


def evaluate(formula: Formula, maps: Mapping[int, np.ndarray], like: np.ndarray) -> np.ndarray:
    """Where a formula holds.

    Args:
        formula: The formula.
        maps: Concept → bit mask; concepts left out show nowhere.
        like: A mask of the shape wanted.

    Returns:
        Bit mask of that shape.
    """
    holds = np.zeros_like(like)
    for op, concept in formula:
        shown = maps.get(concept)
        if op == "or":
            holds = holds if shown is None else holds | shown
        elif op == "and":
            holds = np.zeros_like(like) if shown is None else holds & shown
        elif shown is not None:
            holds = holds & ~shown
    return holds


class JointCounts:
    """How often units' formulas and concepts are on together: the state of one round of the search.

    Attributes:
        formulas: The distinct formulas.
        inside: (unit, formula) → int64 (C,): positions where unit, formula and each concept are on.
        whole: Formula → int64 (C,): positions where formula and each concept are on.
    """

    def __init__(self, wanted: Mapping[int, Sequence[Formula]], names: Sequence[str]) -> None:
        """Starts with nothing seen.

        Args:
            wanted: Unit → the formulas of its beam to extend.
            names: All C concepts.
        """
        self.formulas = sorted({formula for beam in wanted.values() for formula in beam})
        self._row = {formula: number for number, formula in enumerate(self.formulas)}
        self._wanted = {unit: [self._row[formula] for formula in beam] for unit, beam in wanted.items() if beam}
        self._number = {name: number for number, name in enumerate(names)}
        self.whole = np.zeros((len(self.formulas), len(names)), np.int64)
        self.inside = {unit: np.zeros((len(beam), len(names)), np.int64) for unit, beam in self._wanted.items()}

    def update(self, seen: ImageMasks) -> None:
        """Counts one image."""
        numbers = np.array([self._number[name] for name in seen.names], np.int64)
        if not len(numbers) or not self.formulas:
            return
        maps = dict(zip(numbers.tolist(), seen.concepts, strict=True))
        like = seen.concepts[0]
        # A formula holds nowhere in an image that shows none of the concepts that it could start from.
        holds = np.zeros((len(self.formulas), len(like)), np.uint64)
        for place, formula in enumerate(self.formulas):
            if any(op == "or" and concept in maps for op, concept in formula):
                holds[place] = evaluate(formula, maps, like)
        on = np.flatnonzero(holds.any(axis=1))
        self.whole[on[:, None], numbers] += shared(holds[on], seen.concepts)
        for unit, mask in zip(seen.units.tolist(), seen.masks, strict=True):
            if unit in self._wanted:
                self.inside[unit][:, numbers] += shared(holds[self._wanted[unit]] & mask, seen.concepts)

    def merge(self, other: JointCounts) -> None:
        """Adds what another state has counted.

        Raises:
            ValueError: It is of other formulas.
        """
        if self._wanted != other._wanted or self.formulas != other.formulas:
            raise ValueError("only counts of the same units' formulas can be merged")
        self.whole += other.whole
        for unit, counts in other.inside.items():
            self.inside[unit] += counts

    def extended(self, unit: int, beam: Sequence[Scored], counts: Totals, best: int) -> list[Scored]:
        """Formulas one concept longer than those of a unit's beam that this state has counted.

        Of each formula and operator at least the best few are there. Left out are those that repeat a concept and
        those that hold exactly where what they extend holds (``sky and not tree`` where no sky is a tree): they would
        fill the beam with one explanation in many words.
        """
        found = []
        rows = {row: place for place, row in enumerate(self._wanted.get(unit, ()))}
        for known in beam:
            row = self._row.get(known.formula)
            if row not in rows:
                continue
            inside, whole = self.inside[unit][rows[row]], self.whole[row]
            both_or, size_or = known.both + counts.both[unit] - inside, known.size + counts.size - whole
            sides: tuple[tuple[Operator, np.ndarray, np.ndarray], ...] = (
                ("or", both_or, size_or),
                ("and", inside, whole),
                ("and not", known.both - inside, known.size - whole),
            )
            used = [concept for _, concept in known.formula]
            for op, both, size in sides:
                scores = np.where(size != known.size, iou(both, counts.unit[unit], size), 0)
                scores[used] = 0
                least = np.partition(scores, -best)[-best] if best < len(scores) else 0
                for concept in np.flatnonzero((scores > 0) & (scores >= least)).tolist():
                    formula = canonical((*known.formula, (op, concept)))
                    found.append(Scored(formula, int(both[concept]), int(size[concept]), float(scores[concept])))
        return found


@dataclass(frozen=True)
class Totals:
    """Counts of concepts alone.

    Attributes:
        names: C concepts.
        unit: |M|, int64 (U,).
        size: |L|, int64 (C,).
        both: |M ∧ L|, int64 (U, C).
    """

    names: tuple[str, ...]
    unit: np.ndarray
    size: np.ndarray
    both: np.ndarray

    @classmethod
    def of(cls, counts: ConceptCounts) -> Totals:
        """From the state of a whole probe."""
        names, size, both = counts.result()
        return cls(names, counts.unit, size, both)


def explain(
    units: Sequence[int],
    counts: Totals,
    images: Callable[[], Iterable[ImageMasks]],
    beam_size: int = BEAM_SIZE,
    length: int = LENGTH,
) -> dict[int, list[Scored]]:
    """The best formulas of units, best first.

    Args:
        units: Which units.
        counts: Of the whole probe.
        images: Yields every image again, with at least these units' masks: once per round.
        beam_size: Formulas kept after every round.
        length: Concepts in a formula at most.

    Returns:
        Unit → at most ``beam_size`` formulas; none for a unit that meets no concept.
    """
    beams = {unit: _primitives(unit, counts, beam_size) for unit in units}
    for size in range(1, length):
        # What was extended before would only bring back what has already competed.
        joint = JointCounts(
            {u: [s.formula for s in b if len(s.formula) == size] for u, b in beams.items()}, counts.names
        )
        if not joint.formulas:
            break
        for seen in images():
            joint.update(seen)
        for unit, beam in beams.items():
            beams[unit] = _best([*beam, *joint.extended(unit, beam, counts, beam_size)], beam_size)
    return beams


def _primitives(unit: int, counts: Totals, beam_size: int) -> list[Scored]:
    both = counts.both[unit]
    scores = iou(both, counts.unit[unit], counts.size)
    found = [
        Scored((("or", concept),), int(both[concept]), int(counts.size[concept]), float(scores[concept]))
        for concept in np.flatnonzero(scores > 0).tolist()
    ]
    return _best(found, beam_size)


def _best(found: Sequence[Scored], beam_size: int) -> list[Scored]:
    return sorted({scored.formula: scored for scored in found}.values(), key=lambda scored: scored.order)[:beam_size]


def labels(best: Mapping[int, Sequence[Scored]], names: Sequence[str]) -> dict[int, list[Label]]:
    """Formulas as labels."""
    return {
        unit: [Label(text(scored.formula, names), scored.iou) for scored in beam] or [Label(NOTHING, 0.0)]
        for unit, beam in best.items()
    }
