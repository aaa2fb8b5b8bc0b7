"""Compositional explanations: what a dense search over every formula finds, from counts alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import pytest

from milan_ray.exemplars.concepts import ConceptCounts, ImageMasks, pack_words
from milan_ray.labelers.compexp import Formula, JointCounts, Totals, canonical, explain, labels, text

SIZE = (4, 9)


def world(units: int, concepts: int, images: int, seed: int) -> tuple[np.ndarray, np.ndarray, list[ImageMasks], Totals]:
    """Masks (U, N·P) and concept maps (C, N·P), bool, and the same as the search takes them."""
    rng = np.random.default_rng(seed)
    masks = rng.random((images, units, 36)) < 0.25
    masks[rng.random((images, units)) < 0.3] = False
    shown = rng.random((images, concepts, 36)) < rng.random(concepts)[:, None]
    shown[rng.random((images, concepts)) < 0.4] = False
    masks[:, 0] = (shown[:, 1] | shown[:, 0]) & ~shown[:, 2]  # a unit that is a formula
    masks[:, 1] = False
    seen = []
    for mask, there in zip(masks, shown, strict=True):
        on, names = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(there.any(axis=1))
        seen.append(ImageMasks([f"c{n:02d}" for n in names], pack_words(there[names]), on, pack_words(mask[on]), 36))
    counts = ConceptCounts(units)
    for image in seen:
        counts.update(image)
    flat = [maps.transpose(1, 0, 2).reshape(maps.shape[1], -1) for maps in (masks, shown)]
    return flat[0], flat[1], seen, Totals.of(counts)


def dense(mask: np.ndarray, maps: np.ndarray, beam_size: int, length: int) -> list[tuple[Formula, float]]:
    """The search as its authors describe it, over boolean arrays."""

    def holds(formula: Formula) -> np.ndarray:
        found = np.zeros_like(mask)
        for op, c in formula:
            found = found | maps[c] if op == "or" else found & maps[c] if op == "and" else found & ~maps[c]
        return found

    def iou(formula: Formula) -> float:
        return float((holds(formula) & mask).sum() / max((holds(formula) | mask).sum(), 1))

    def best(formulas: set[Formula]) -> list[Formula]:
        return sorted((f for f in formulas if iou(f) > 0), key=lambda f: (-iou(f), len(f), f))[:beam_size]

    beam = best({(("or", c),) for c in range(len(maps))})
    for _ in range(length - 1):
        longer = set(beam)
        for formula in beam:
            for op in ("or", "and", "and not"):
                for c in set(range(len(maps))) - {c for _, c in formula}:
                    new = canonical((*formula, (op, c)))
                    if (holds(new) != holds(formula)).any():
                        longer.add(new)
        beam = best(longer)
    return [(formula, iou(formula)) for formula in beam]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("beam_size", "length"), [(5, 3), (2, 4), (30, 2)])
def test_search_equals_a_dense_one(seed, beam_size, length):
    masks, maps, images, counts = world(4, 6, 12, seed)
    found = explain(range(4), counts, lambda: images, beam_size, length)
    for unit, mask in enumerate(masks):
        assert [(s.formula, s.iou) for s in found[unit]] == dense(mask, maps, beam_size, length)


def test_a_unit_that_is_a_formula_is_found_exactly():
    counts, images = world(4, 6, 30, 1)[3], world(4, 6, 30, 1)[2]
    found = labels(explain(range(4), counts, lambda: images), counts.names)
    assert (found[0][0].text, found[0][0].score) == ("c00 or c01 and not c02", 1.0)
    assert [label.text for label in found[1]] == ["none"] and found[1][0].score == 0


def test_units_are_independent_of_their_block():
    counts, images = world(5, 6, 12, 2)[3], world(5, 6, 12, 2)[2]
    whole = explain(range(5), counts, lambda: images)
    for unit in range(5):
        assert explain([unit], counts, lambda: images)[unit] == whole[unit]


def test_rounds_add_up_over_shards():
    _, _, images, counts = world(3, 5, 10, 3)
    wanted: dict[int, Sequence[Formula]] = {
        0: [(("or", 0),), (("or", 1), ("and", 2))],
        2: [(("or", 1), ("and", 2)), (("or", 3), ("and not", 0))],
    }
    whole, left, right = (JointCounts(wanted, counts.names) for _ in range(3))
    for n, image in enumerate(images):
        whole.update(image)
        (left if n % 3 else right).update(image)
    right.merge(left)
    np.testing.assert_array_equal(right.whole, whole.whole)
    for unit in wanted:
        np.testing.assert_array_equal(right.inside[unit], whole.inside[unit])
    with pytest.raises(ValueError, match="same units' formulas"):
        right.merge(JointCounts({0: [(("or", 0),)]}, counts.names))


@pytest.mark.parametrize(
    ("formula", "expected"),
    [
        ("or 3, or 1", "or 1, or 3"),
        ("or 3, or 1, or 2", "or 1, or 2, or 3"),
        ("or 3, and not 0, and 1", "or 1, and 3, and not 0"),
        ("or 3, and not 0, or 1", "or 3, and not 0, or 1"),
        ("or 3, or 1, and not 0", "or 1, or 3, and not 0"),
        ("or 3, and 1, or 2, or 0", "or 1, and 3, or 0, or 2"),
        ("or 3", "or 3"),
    ],
)
def test_what_commutes_is_written_in_one_order(formula, expected):
    def parse(written: str) -> Formula:
        steps = (step.rpartition(" ") for step in written.split(", "))
        return cast(Formula, tuple((operator, int(concept)) for operator, _, concept in steps))

    assert canonical(parse(formula)) == parse(expected)


def test_formulas_read_as_the_comparison_with_milan_writes_them():
    names = ["Swimming_pool", "Blue", "Sky"]
    assert text((("or", 0), ("or", 2), ("and not", 1)), names) == "swimming pool or sky and not blue"
