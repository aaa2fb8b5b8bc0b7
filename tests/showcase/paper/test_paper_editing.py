"""What is concluded from edited networks and from adversarial images: from made-up rows, where the answer is known."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from milan_ray.showcase.paper import cut_and_paste, editing
from milan_ray.studies.ablation.curves import RANDOM
from milan_ray.studies.cut_and_paste.statistics import DIFFERENT, OTHERS
from milan_ray.studies.editing.run import Edit
from milan_ray.studies.editing.statistics import EVERY, FOUND, TEST, VALIDATION, Retrieval


def network(
    found: list[float], every: list[float], random: list[float], off: float = 0.0, both: int = 8
) -> editing.Network:
    """A network whose validation accuracy keeps up for two units."""
    curves = {(TEST, FOUND): found, (TEST, EVERY): every, (TEST, RANDOM): random}
    curves |= {(VALIDATION, condition): [0.9, 0.9, 0.9, 0.8] for condition in (FOUND, EVERY, RANDOM)}
    rows = [
        {"split": split, "condition": condition, "trial": 0, "ablated": step, "accuracy": accuracy + off * step}
        for (split, condition), curve in curves.items()
        for step, accuracy in enumerate(curve)
    ]
    order = (("a", 1), ("a", 2), ("b", 0))
    return editing.Network(Edit(pl.DataFrame(rows), order, 2, 50), 0.8, Retrieval(10, 12, both, 50))


def test_editing_is_reproduced_where_found_units_gain_more_than_others():
    flat = [0.5, 0.5, 0.5, 0.5]
    better = [network([0.5, 0.55, 0.6, 0.52], flat, flat, off) for off in (0.0, 0.002, -0.002)]
    claims = editing.claims(dict(zip("abc", better, strict=True)))
    assert [claim.reproduced for claim in claims] == [True] * 5
    assert "+10.0 [" in claims[2].ours and "2, 2, 2 units removed, 20% of the errors" in claims[2].ours
    assert claims[4].ours.startswith("2, 2, 2 units: +10.0")
    assert "80.0% without words: +30.0" in claims[0].ours
    alike = [network([0.5, 0.55, 0.6, 0.5], [0.5, 0.5, 0.6, 0.5], flat, off) for off in (0.0, 0.002, -0.002)]
    assert [claim.reproduced for claim in editing.claims(dict(zip("abc", alike, strict=True)))][2:] == [
        True,
        False,
        True,
    ]
    useless = editing.claims({"a": network(flat, flat, flat, both=2)})
    assert [claim.reproduced for claim in useless] == [False] * 5  # one network has no interval, and gains nothing


def test_gains_are_means_over_trials():
    one = network([0.5, 0.6, 0.7, 0.6], [0.5] * 4, [0.5, 0.4, 0.52, 0.5])
    assert one.gain(FOUND) == pytest.approx(0.2) and one.best == 2
    assert one.gain(FOUND, 1) == pytest.approx(0.1) and one.gain(FOUND, 99) == pytest.approx(0.1)
    assert one.gain(RANDOM) == pytest.approx(0.02)


def pairs(different: float, others: float) -> pl.DataFrame:
    """Ten units each that mislead in a share of pairs; the control never does."""
    draw = np.random.default_rng(0).random
    return pl.DataFrame(
        {"layer": "l", "unit": unit, "group": group, "fooled": bool(draw() < rate), "control_fooled": False}
        for group, rate, first in ((DIFFERENT, different, 0), (OTHERS, others, 10))
        for unit in range(first, first + 10)
        for _ in range(50)
    )


def test_adversarial_images_are_reproduced_beyond_the_control():
    assert [claim.reproduced for claim in cut_and_paste.claims(pairs(0.4, 0.1), "words")] == [True, True]
    assert [claim.reproduced for claim in cut_and_paste.claims(pairs(0.3, 0.3), "words")] == [True, False]
    assert [claim.reproduced for claim in cut_and_paste.claims(pairs(0.0, 0.0), "words")] == [False, False]
    assert cut_and_paste.table(pairs(0.4, 0.1)).shape == (6, 5)
