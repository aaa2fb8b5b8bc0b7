"""BLEU of short n-grams, for annotations of one or two words."""

from __future__ import annotations

import math

import numpy as np
import pytest

from milan_ray.scoring.text import bleu_order, bleu_statistics, bleu_values


def test_bleu_order_is_what_a_reference_of_mean_length_carries():
    assert bleu_order([["red", "a red house"], ["dogs", "the dog"]]) == 1
    assert bleu_order([["red areas", "dark areas"], "the dogs"]) == 2
    assert bleu_order([["the top boundaries of horizontal objects"]]) == 4


def test_bleu_values_of_order_two_equal_the_definition_where_bleu_four_is_zero():
    sums = bleu_statistics(["red house", "the dog"], [["red house"], ["the cat"]]).sum(axis=0, keepdims=True)
    assert bleu_values(sums)[0] == 0
    assert bleu_values(sums, 2)[0] == pytest.approx(100 * math.sqrt(3 / 4 * 1 / 2))
    assert np.isclose(bleu_values(sums, 1)[0], 75)
