"""Descriptions of outputs against class names: by hand, and that trivial baselines earn what they should."""

from __future__ import annotations

import numpy as np
import pytest

from milan_ray.scoring.class_names import SIMILARITY, TOP1, class_name_rows, class_scores, nearest_constant
from milan_ray.scoring.evaluation import CONSTANT, SHUFFLED, with_trivial_rows

CLASSES = ("dog", "wolf", "car")
VECTORS = {"dog": (1.0, 0.0), "wolf": (0.8, 0.6), "car": (0.0, 1.0), "paws": (0.96, 0.28)}


def embed(texts) -> np.ndarray:
    return np.array([VECTORS[text] for text in texts])


def test_scores_of_one_description_are_as_by_hand() -> None:
    classes = embed(CLASSES)
    assert class_scores(np.array(VECTORS["paws"]), classes, 0) == pytest.approx((0.96, 1.0))
    assert class_scores(np.array(VECTORS["paws"]), classes, 1) == pytest.approx((0.936, 0.0))
    assert class_scores(np.array(VECTORS["paws"]), classes, 2) == pytest.approx((0.28, 0.0))


def test_a_tie_is_not_first_and_a_single_class_is() -> None:
    twins = embed(["dog", "dog"])
    assert class_scores(np.array(VECTORS["dog"]), twins, 0) == (1.0, 0.0)
    assert class_scores(np.array(VECTORS["car"]), twins[:1], 0) == (0.0, 1.0)


def test_names_themselves_are_right_and_baselines_stand_beside_them() -> None:
    rows = {row[:2]: row for row in class_name_rows(with_trivial_rows({"milan": CLASSES}, "paws"), CLASSES, embed)}
    assert rows["milan", SIMILARITY][2] == pytest.approx((1, 1, 1))
    assert rows["milan", TOP1][2] == (1, 1, 1)
    assert rows[CONSTANT, SIMILARITY][2].value == pytest.approx((0.96 + 0.936 + 0.28) / 3)
    assert rows[CONSTANT, TOP1][2].value == pytest.approx(1 / 3)
    assert rows[SHUFFLED, SIMILARITY][2].value == pytest.approx((0.8 + 0.6 + 0.0) / 3)
    assert rows["milan − shuffled", TOP1][2].value == 1
    assert {row[3] for row in rows.values()} == {3}


def test_constant_is_the_description_nearest_to_all_names() -> None:
    # Mean products with dog, wolf, car: dog 0.6, wolf 0.8, car 0.53, paws 0.73.
    assert nearest_constant(["car", "dog", "dog", "paws"], CLASSES, embed) == "paws"
    assert nearest_constant(["paws", "wolf", "paws"], CLASSES, embed) == "wolf"


def test_descriptions_and_classes_must_be_as_many() -> None:
    with pytest.raises(ValueError, match="milan does not describe 3 outputs"):
        class_name_rows({"milan": CLASSES[:2]}, CLASSES, embed)
