"""What the audit of the world's networks says, from counts made up for it."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from milan_ray.showcase.paper.auditing import Truth, claims, follow_up, judge
from milan_ray.studies.auditing.run import Audit
from milan_ray.studies.auditing.statistics import compare_sides, count_pairs
from milan_ray.world.scenes import make_scene

PAIRS = [(f"world/cnn-{number}", f"world/cnn-{number}-blurred") for number in range(1, 7)]
UNITS = 10


def audit_of(found: dict[str, dict[int, str]]) -> Audit:
    rows = [
        {"model": model, "layer": "conv4", "unit": unit, "description": text, "verdict": "", "note": ""}
        for model, units in found.items()
        for unit, text in units.items()
    ]
    units = pl.DataFrame(rows).with_columns(pl.col("unit").cast(pl.Int32))
    counts = count_pairs(PAIRS, units, {name: UNITS for pair in PAIRS for name in pair})
    return Audit(counts, units, compare_sides(counts))


def truth_of(faces: dict[str, set[int]], scenes: int = 40) -> Truth:
    """Units that are for faces, and activations by which unit 0 of every network prefers some colour of hair."""
    every = [make_scene("heldout", index) for index in range(3000) if make_scene("heldout", index).label == "face"][
        :scenes
    ]
    rows = [
        {
            "model": name,
            "layer": "conv4",
            "unit": unit,
            "concept": "face" if unit in faces.get(name, ()) else "sky",
            "iou": 0.2,
            "auroc": 0.5,
            "face": unit in faces.get(name, ()),
        }
        for pair in PAIRS
        for name in pair
        for unit in range(UNITS)
    ]
    red = np.array([scene.things[0].colour == "red" for scene in every], np.float32)
    activations = np.tile((red[:, None] if len(red) else np.zeros((0, 1))), (1, len(rows)))
    return Truth(pl.DataFrame(rows).with_columns(pl.col("unit").cast(pl.Int32)), activations, every)


@pytest.fixture(scope="module")
def judged():
    found = {name: dict.fromkeys(range(4), "faces") for name, _ in PAIRS}
    found |= {blurred: {0: "faces with red hair", 9: "a face"} for _, blurred in PAIRS}
    faces = {name: {0, 1, 2, 5} for name, _ in PAIRS} | {blurred: {0} for _, blurred in PAIRS}
    audit, truth = audit_of(found), truth_of(faces)
    return audit, truth, judge(audit, truth, PAIRS)


def test_audit_is_judged_by_the_truth(judged) -> None:
    _, _, found = judged
    assert found.of("audit", "precision").value == pytest.approx(4 / 6)  # 3 of 4, 1 of 2
    assert found.of("audit", "recall").value == pytest.approx(4 / 5)
    assert found.of("audit", "base rate").value == pytest.approx(5 / 20)
    gap = found.of("unblurred − blurred", "units for faces")
    assert (gap.value, gap.low, gap.high) == (3, 3, 3)
    assert found.pairs.row(0) == ("world/cnn-1", 4, 3, "world/cnn-1-blurred", 1, 1)


def test_follow_up_asks_whether_units_prefer_what_they_name(judged) -> None:
    audit, truth, _ = judged
    found = follow_up(audit, truth)
    assert found["model"].to_list() == [blurred for _, blurred in PAIRS]
    assert found["colours"].to_list() == ["red"] * 6 and found["auroc"].to_list() == [1.0] * 6


def test_claims_follow_the_figures(judged) -> None:
    audit, truth, found = judged
    said = claims(audit, found, follow_up(audit, truth))
    assert [claim.reproduced for claim in said] == [True, True, True, True, None]
    assert "24 and 12 units in 6 pairs; per pair 2.0 fewer [2.0, 2.0], p = 0.031" in said[0].ours
    assert "24 and 6 units overlap" in said[1].ours
    assert "nobody inspected" in said[0].note

    other = audit_of({name: {9: "a face"} for pair in PAIRS for name in pair})
    nothing = truth_of({}, scenes=0)
    said = claims(other, judge(other, nothing, PAIRS), follow_up(other, truth_of({})))
    assert [claim.reproduced for claim in said] == [False, False, False, False, None]
    assert "no found unit" in said[-1].ours
