"""Concept maps in the place of a model of images and texts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from milan_ray.engine.references import load
from milan_ray.models.concept_truth import ConceptTruth
from milan_ray.models.image_text import ImageTextRef, find_image_text

TRUTH = ConceptTruth(("red", "house", "sky"), lambda text: set(text.split()), "1")
HERE, NOWHERE = np.eye(4, dtype=bool), np.zeros((4, 4), bool)


def test_product_is_the_share_of_named_concepts_that_show():
    images = TRUTH.embed_maps([{"red": HERE, "house": HERE, "other": HERE}, {"sky": HERE, "red": NOWHERE}, None])
    texts = TRUTH.embed_texts(["red house", "a sky", "red sky", "nothing"])
    assert (images @ texts.T).tolist() == [[1, 0, 0.5, 0], [0, 1, 0.5, 0], [0, 0, 0, 0]]
    assert images.dtype == texts.dtype == torch.float32
    assert TRUTH.embed_maps([]).shape == TRUTH.embed_texts([]).shape == (0, 3)


def test_pixels_are_refused():
    with pytest.raises(TypeError, match="concept maps"):
        TRUTH.embed_images(torch.zeros(1, 3, 4, 4))


def test_the_worlds_truth_reads_synonyms_and_goes_by_its_name():
    truth = load(ImageTextRef("world/truth"))
    assert find_image_text("world/truth") == ImageTextRef("world/truth").name == "world/truth"
    house, home, both = truth.embed_texts(["a house", "homes", "red home"])
    assert torch.equal(house, home) and house.sum() == both.sum() == 1
    assert truth.identity() != TRUTH.identity()
