"""Compositional explanations: labels a unit with a formula of concepts, found by beam search.

Source: Mu and Andreas 2020; see docs/labelers.md.

A formula's counts follow from the counts of the formula that it extends. Let J(f, c) be the number of positions where
both a formula f and a concept c are on. Then |f ∨ c| = |f| + |c| − J, |f ∧ c| = J and |f ∧ ¬c| = |f| − J. The same
holds inside a unit's mask. So each round of the search is one counting pass: the counts of shards add up exactly, and
the masks of a whole probe are never in memory.
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
"""Formulas kept after every round; the reference's value."""

LENGTH = 3
"""Maximum number of concepts in a formula; the value in MILAN's comparison."""


@dataclass(frozen=True)
class CompExp:
    """Labels a unit with formulas of concepts.

    Attributes:
        beam_size: Number of formulas kept after every round, and of labels per unit.
        length: Maximum number of concepts in a formula.
    """

    beam_size: int = BEAM_SIZE
    length: int = LENGTH
    name: ClassVar[str] = COMPEXP
    lam: ClassVar[None] = None
    requires: ClassVar[tuple[Kind, ...]] = ("formulas",)

    def identity(self) -> dict[str, object]:
        """Everything that determines the labels, except the counts."""
        return {"compexp": 1, "beam_size": self.beam_size, "length": self.length}

    def label(self, evidence: Evidence) -> Mapping[int, list[Label]]:
        """The best formulas of every unit."""
        assert evidence.formulas is not None  # required
        return evidence.formulas


Operator = Literal["or", "and", "and not"]

Formula = tuple[tuple[Operator, int], ...]
"""Concept indices, each with the operator that joins it to everything before it; the first operator is ``or``."""


@dataclass(frozen=True)
class Scored:
    """A formula with its counts for one unit.

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
        """Sort key: highest IoU first; ties by length, then by formula."""
        return -self.iou, len(self.formula), self.formula


def canonical(formula: Formula) -> Formula:
    """Sorts the commuting operands of a formula: ``b or a`` becomes ``a or b``."""
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
    """A formula as text, read from left to right, in lower case, with spaces for underscores and no parentheses."""
    words = [f"{op} {names[concept]}" for op, concept in formula]
    return " ".join(words).removeprefix("or ").replace("_", " ").lower()


def evaluate(formula: Formula, maps: Mapping[int, np.ndarray], like: np.ndarray) -> np.ndarray:
    """The mask of the positions where a formula holds.

    Args:
        formula: The formula.
        maps: Concept → bit mask; concepts that are left out hold nowhere.
        like: A mask of the requested shape.

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
    """Joint counts of units, formulas and concepts: the mergeable state of one round of the search.

    Attributes:
        formulas: The distinct formulas.
        inside: (unit, formula) → int64 (C,): positions where unit, formula and each concept are on.
        whole: Formula → int64 (C,): positions where formula and each concept are on.
    """

    def __init__(self, wanted: Mapping[int, Sequence[Formula]], names: Sequence[str]) -> None:
        """Starts empty.

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
        # A formula holds nowhere in an image that contains none of the concepts joined by "or".
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
        """Adds the counts of another state.

        Raises:
            ValueError: The other state counts other formulas.
        """
        if self._wanted != other._wanted or self.formulas != other.formulas:
            raise ValueError("only counts of the same units' formulas can be merged")
        self.whole += other.whole
        for unit, counts in other.inside.items():
            self.inside[unit] += counts

    def extended(self, unit: int, beam: Sequence[Scored], counts: Totals, best: int) -> list[Scored]:
        """Extends the counted formulas of a unit's beam by one concept.

        For each formula and operator, the result contains at least the ``best`` highest-scoring extensions. It omits
        extensions that repeat a concept and those that hold at the same positions as the formula itself (``sky and not
        tree`` if no sky is a tree), because they would fill the beam with variants of one explanation.
        """
        extensions = []
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
                    extensions.append(Scored(formula, int(both[concept]), int(size[concept]), float(scores[concept])))
        return extensions


@dataclass(frozen=True)
class Totals:
    """Counts of single concepts over a whole probe.

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
        """Extracts the totals from the state of a whole probe."""
        names, size, both = counts.result()
        return cls(names, counts.unit, size, both)


def explain(
    units: Sequence[int],
    counts: Totals,
    images: Callable[[], Iterable[ImageMasks]],
    beam_size: int = BEAM_SIZE,
    length: int = LENGTH,
) -> dict[int, list[Scored]]:
    """Searches the best formulas of units, best first.

    Args:
        units: The units to explain.
        counts: Counts over the whole probe.
        images: Called once per round; yields every image with the masks of at least these units.
        beam_size: Formulas kept after every round.
        length: Maximum number of concepts in a formula.

    Returns:
        Unit → at most ``beam_size`` formulas; none for a unit that overlaps no concept.
    """
    beams = {unit: _primitives(unit, counts, beam_size) for unit in units}
    for size in range(1, length):
        # Only the newest formulas: extending older ones again would repeat earlier results.
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
    formulas = [
        Scored((("or", concept),), int(both[concept]), int(counts.size[concept]), float(scores[concept]))
        for concept in np.flatnonzero(scores > 0).tolist()
    ]
    return _best(formulas, beam_size)


def _best(found: Sequence[Scored], beam_size: int) -> list[Scored]:
    return sorted({scored.formula: scored for scored in found}.values(), key=lambda scored: scored.order)[:beam_size]


def labels(best: Mapping[int, Sequence[Scored]], names: Sequence[str]) -> dict[int, list[Label]]:
    """Converts formulas to labels."""
    return {
        unit: [Label(text(scored.formula, names), scored.iou) for scored in beam] or [Label(NOTHING, 0.0)]
        for unit, beam in best.items()
    }
