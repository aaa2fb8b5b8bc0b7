"""Network dissection on the built-in world: units planted for a concept get its name, far above chance."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from milan_ray.exemplars.concepts import ConceptCounts, ImageMasks, fires, pack_words, sample
from milan_ray.labelers.compexp import Totals, explain
from milan_ray.labelers.netdissect import best_concepts
from milan_ray.labelers.protocol import Label
from milan_ray.models.view import View
from milan_ray.world.networks import planted_concepts
from milan_ray.world.scenes import SIDE, concept_maps, make_scene

SIZE = (SIDE, SIDE)


@pytest.fixture(scope="module")
def counted() -> tuple[ConceptCounts, list[ImageMasks]]:
    """Units that see one concept each, coarsely (16 × 16) and with noise, as the world's planted network does."""
    noise = torch.Generator().manual_seed(0)
    levels = torch.full((len(planted_concepts),), 0.5)
    state, images = ConceptCounts(len(planted_concepts)), []
    for number in range(80):
        shown = sample(concept_maps(make_scene("probe", number)), View(SIDE, SIDE), SIZE)
        truth = torch.from_numpy(np.stack([shown.get(c, np.zeros(SIZE, bool)) for c in planted_concepts])).float()
        maps = F.avg_pool2d(truth, 4)
        maps += 0.2 * torch.randn(maps.shape, generator=noise)
        names = sorted(shown)
        concepts = pack_words(np.stack([shown[name] for name in names]))
        images.append(ImageMasks(names, concepts, *fires(maps, levels, SIZE), SIDE * SIDE))
        state.update(images[-1])
    return state, images


def test_planted_units_get_their_names(counted):
    labels = best_concepts(counted[0])
    right = [labels[unit][0].text == concept for unit, concept in enumerate(planted_concepts)]
    assert len(right) == 53 and sum(right) >= 40  # by chance, one
    assert all(a.score >= b.score for best in labels.values() for a, b in itertools.pairwise(best))


def test_formulas_never_do_worse_than_a_concept(counted):
    state, images = counted
    totals = Totals.of(state)
    found = explain(range(len(planted_concepts)), totals, lambda: images)
    for unit, best in best_concepts(state).items():
        assert found[unit][0].iou >= best[0].score
    assert sum(len(beam[0].formula) > 1 for beam in found.values()) >= 5


def test_a_map_fires_up_to_its_border():
    """Its border is repeated, not faded to zero, which lies above a negative level."""
    units, words = fires(
        torch.tensor([[[-1.0, -1.0], [-1.0, 3.0]], [[-5.0, -5.0], [-5.0, -5.0]]]), -torch.ones(2), (4, 4)
    )
    assert units.tolist() == [0]
    on = np.unpackbits(words.view(np.uint8))[:16].reshape(4, 4)
    np.testing.assert_array_equal(on, [[0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 1]])


def test_a_unit_without_a_level_never_fires_and_is_called_none():
    units, words = fires(torch.ones(2, 3, 3), torch.tensor([torch.nan, 0.5]), (6, 6))
    assert units.tolist() == [1] and words.shape == (1, 1)
    state = ConceptCounts(2)
    state.update(ImageMasks(["sky"], pack_words(np.ones((1, 6, 6), bool)), units, words, 36))
    assert best_concepts(state) == {0: [Label("none", 0.0)], 1: [Label("sky", 1.0)]}
