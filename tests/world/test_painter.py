"""The world's generator of images must show what it is told to, and the same again for the same seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from milan_ray.engine.references import load
from milan_ray.models.generators import GeneratorRef
from milan_ray.world.lexicon import concepts_in
from milan_ray.world.painter import ScenePainter, seen
from milan_ray.world.scenes import Scene, concept_maps, make_scene


@pytest.mark.parametrize("text", ["red houses", "a dog on the grass", "nothing of the kind"])
def test_scenes_show_what_the_text_names(text, monkeypatch):
    drawn = []

    def render(scene: Scene) -> np.ndarray:
        drawn.append(scene)
        return np.zeros((64, 64, 3))

    monkeypatch.setattr("milan_ray.world.painter.render", render)
    ScenePainter().generate(text, 6, 0)
    assert len(drawn) == 6 and len(set(drawn)) == 6
    assert all(concepts_in(text) <= seen(concept_maps(scene)) for scene in drawn)


def test_what_covers_a_few_pixels_is_not_seen_unless_it_is_a_part():
    few, some = np.zeros((64, 64), bool), np.zeros((64, 64), bool)
    few[0, :30], some[0, :41] = True, True
    assert seen({"red": few, "eye": few, "blue": some, "house": some}) == {"eye", "blue", "house"}


def test_images_follow_from_concepts_count_and_seed():
    painter = load(GeneratorRef("world/painter")).to(torch.device("cpu"))
    first = painter.generate("blue boats", 4, 0)
    assert first.shape == (4, 64, 64, 3) and first.dtype == np.uint8
    np.testing.assert_array_equal(first, painter.generate("a ship, azure", 4, 0))
    assert not np.array_equal(first, painter.generate("blue boats", 4, 1))
    assert not np.array_equal(first, painter.generate("red boats", 4, 0))


def test_what_no_scene_shows_gets_scenes_that_show_most_of_it():
    text = "stop, open, exit and sale"  # a scene has one sign with one word, two at most
    images = ScenePainter().generate(text, 3, 0)
    assert images.shape == (3, 64, 64, 3)
    assert make_scene(ScenePainter.split, 0).things
