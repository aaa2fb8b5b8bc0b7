"""Describe-and-Dissect's scoring functions: by hand, and against loops that say what they mean."""

from __future__ import annotations

import numpy as np
import pytest

from milan_ray.errors import MilanError
from milan_ray.labelers.dnd.labeler import DescribeAndDissect, best
from milan_ray.labelers.dnd.scoring import (
    BEST_IMAGES,
    BEST_RANKS,
    SCORINGS,
    image_products,
    mean_rank,
    order,
    ranks,
    topk_compare,
    topk_squared_mean,
)
from milan_ray.labelers.protocol import Drawn, Evidence


def reference(activations, cosines) -> dict[str, list[float]]:
    """Each function as in Describe-and-Dissect: lower ranks are better, the scores' signs are turned at the end."""
    every = sorted(
        ((value, candidate, image) for candidate, found in enumerate(activations) for image, value in enumerate(found)),
        key=lambda one: -one[0],
    )
    rank = {(candidate, image): place for place, (_, candidate, image) in enumerate(every)}
    mean, squared, products = [], [], []
    for candidate, found in enumerate(activations):
        mine = [rank[candidate, image] for image in range(len(found))]
        mean.append(sum(mine) / len(mine))
        squared.append(sum(place**2 for place in sorted(mine)[:BEST_RANKS]) / len(mine[:BEST_RANKS]))
        near = [cosines[candidate][image] for image in range(len(found)) if rank[candidate, image] < BEST_IMAGES]
        products.append(sum(near) / len(near) if near else -1.0)
    places = sorted(range(len(activations)), key=lambda candidate: squared[candidate])
    compared = [(len(activations) - places.index(c)) * max(products[c], 0) for c in range(len(activations))]
    return {
        "mean": [-value for value in mean],
        "topk-squared-mean": [-value for value in squared],
        "image-products": products,
        "topk-compare": compared,
    }


@pytest.mark.parametrize("seed", range(5))
def test_scoring_functions_equal_the_loops(seed):
    rng = np.random.default_rng(seed)
    activations = [rng.normal(candidate / 2, 1, 10) for candidate in range(6)]
    cosines = [rng.uniform(-0.2, 1, 10) for _ in activations]
    expected = reference(activations, cosines)
    ranked = ranks(activations)
    for name, function in SCORINGS.items():
        assert function(ranked, cosines) == pytest.approx(expected[name])
        found = order(name, activations, cosines)
        assert [score for _, score in found] == pytest.approx(sorted(expected[name], reverse=True))
        assert [score for _, score in found] == [pytest.approx(expected[name][place]) for place, _ in found]


def test_by_hand():
    # Ranks: 9 → 0, 8 → 1, 7 → 2, 4 → 3, 3 → 4, 1 → 5.
    activations = [np.array([9.0, 1.0]), np.array([8.0, 7.0]), np.array([4.0, 3.0])]
    ranked = ranks(activations)
    assert [found.tolist() for found in ranked] == [[0, 5], [1, 2], [3, 4]]
    assert mean_rank(ranked).tolist() == [-2.5, -1.5, -3.5]
    assert topk_squared_mean(ranked).tolist() == [-12.5, -2.5, -12.5]
    cosines = [np.array([0.9, 0.1]), np.array([0.2, 0.4]), np.array([0.6, 0.8])]
    assert image_products(ranked, cosines) == pytest.approx([0.5, 0.3, 0.7])  # six images: all among the best ten
    # The second is first of three; the others share places two and three.
    assert topk_compare(ranked, cosines) == pytest.approx([1.5 * 0.5, 3 * 0.3, 1.5 * 0.7])


def test_only_the_most_exciting_images_are_compared():
    activations = [np.arange(20, 10, -1.0), np.arange(10, 0, -1.0)]
    cosines = [np.full(10, 0.1), np.full(10, 0.9)]
    assert image_products(ranks(activations), cosines).tolist() == pytest.approx([0.1, -1])
    assert topk_compare(ranks(activations), cosines).tolist() == pytest.approx([0.2, 0])


def test_a_product_below_zero_does_not_turn_the_order_of_places_around():
    activations = [np.array([3.0, 2.9]), np.array([2.0, 1.9])]
    cosines = [np.array([-0.5, -0.5]), np.array([-0.4, -0.4])]
    assert [place for place, _ in order("topk-compare", activations, cosines)] == [0, 1]


def test_images_that_excite_alike_share_their_rank_and_nothing_finite_comes_last():
    found = ranks([np.array([5.0, 1.0]), np.array([1.0, np.nan]), np.array([1.0, -np.inf])])
    assert [one.tolist() for one in found] == [[0, 2], [2, 4.5], [2, 4.5]]
    assert ranks([]) == []
    assert mean_rank([np.zeros(0)]).tolist() == [-np.inf]


def test_candidates_that_score_alike_stay_as_they_came():
    same = [np.ones(4)] * 3
    for name in SCORINGS:
        assert [place for place, _ in order(name, same, [np.full(4, 0.5)] * 3)] == [0, 1, 2]


def test_labeler_names_the_best_and_lists_the_rest():
    drawn = [
        Drawn("dark areas", np.array([0.1, 0.2], np.float32), np.array([0.5, 0.5], np.float32)),
        Drawn("dogs", np.array([3.0, 4.0], np.float32), np.array([0.6, 0.8], np.float32)),
    ]
    labeler = DescribeAndDissect(tag="mine")
    assert labeler.name == "dnd-mine" and labeler.compares
    labels = labeler.label(Evidence(drawn={7: drawn}))[7]
    assert [(label.text, label.score) for label in labels] == [("dogs", pytest.approx(1.4)), ("dark areas", 0.5)]
    assert best("mean", [Drawn(one.text, one.activations) for one in drawn])[0].text == "dogs"
    identity = DescribeAndDissect("mean").identity()
    assert identity != labeler.identity() and not DescribeAndDissect("mean").compares


def test_what_cannot_be_is_one_sentence():
    with pytest.raises(MilanError, match="unknown scoring function 'topk'; nearest: topk-"):
        DescribeAndDissect("topk")
    with pytest.raises(MilanError, match="cannot be a tag"):
        DescribeAndDissect(tag="a/b")
