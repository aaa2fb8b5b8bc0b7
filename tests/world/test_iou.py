from __future__ import annotations

import numpy as np
import pytest
import torch

from milan_ray.world.iou import ConceptIoU
from milan_ray.world.lexicon import NAMES
from milan_ray.world.scenes import concept_maps, make_scene

TRUTH = [concept_maps(make_scene("probe", i)) for i in range(12)]
LEVELS = torch.tensor([0.5, 0.5, 1e9])


def maps_of(concept: str) -> torch.Tensor:
    shown = [truth.get(concept, np.zeros((64, 64), dtype=bool)) for truth in TRUTH]
    return torch.from_numpy(np.stack(shown)).float()


# A unit that is the sky, one that is the ground, one that never fires.
MAPS = torch.stack([maps_of("sky"), maps_of("ground"), maps_of("sky")], dim=1)


def counted(rows: range) -> ConceptIoU:
    state = ConceptIoU(LEVELS, NAMES)
    state.update(MAPS[rows.start : rows.stop], TRUTH[rows.start : rows.stop])
    return state


def test_iou_perfect_unit_scores_one_and_dead_unit_zero() -> None:
    iou = counted(range(12)).result()
    assert iou.shape == (3, len(NAMES))
    assert iou[0, NAMES.index("sky")] == pytest.approx(1)
    assert iou[1, NAMES.index("ground")] == pytest.approx(1)
    assert iou[0, NAMES.index("ground")] == 0
    assert not iou[2].any()


def test_iou_equals_counting_by_hand() -> None:
    iou = counted(range(12)).result()
    sky = maps_of("sky") > 0.5
    black = maps_of("black") > 0.5
    expected = (sky & black).sum() / (sky | black).sum()
    assert iou[0, NAMES.index("black")] == pytest.approx(float(expected))


@pytest.mark.parametrize("cut", [0, 1, 5, 12])
def test_iou_any_split_and_order_gives_the_same_result(cut: int) -> None:
    left, right = counted(range(0, cut)), counted(range(cut, 12))
    right.merge(left)
    np.testing.assert_array_equal(right.result(), counted(range(12)).result())


def test_iou_states_of_other_units_do_not_merge() -> None:
    with pytest.raises(ValueError, match="same levels"):
        counted(range(2)).merge(ConceptIoU(LEVELS + 1, NAMES))
