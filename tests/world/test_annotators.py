from __future__ import annotations

import numpy as np
import pytest

from milan_ray.world.annotators import _GENERIC, PERSONAS, Annotation, annotate_unit, evidence
from milan_ray.world.lexicon import concepts_in
from milan_ray.world.scenes import concept_maps, make_scene


def unit_for(concept: str, k: int = 8, side: int = 64) -> tuple[np.ndarray, list[dict[str, np.ndarray]]]:
    """Exemplars of a unit that fires exactly on a concept."""
    maps: list[dict[str, np.ndarray]] = []
    index = 0
    while len(maps) < k:
        shown = concept_maps(make_scene("probe", index))
        if concept in shown and shown[concept].sum() > 20:
            maps.append(shown)
        index += 1
    step = 64 // side
    return np.stack([shown[concept][::step, ::step] for shown in maps]), maps


def annotate_many(concept: str, units: int) -> list[Annotation]:
    masks, maps = unit_for(concept)
    return [a for unit in range(units) for a in annotate_unit(masks, maps, f"net/layer/{unit}")]


def assert_is_tree(annotation: Annotation) -> None:
    count = len(annotation.tokens)
    assert len(annotation.tags) == len(annotation.heads) == count
    assert sum(head == 0 for head in annotation.heads) == 1
    for start in range(1, count + 1):
        node, steps = start, 0
        while node:
            node = annotation.heads[node - 1]
            steps += 1
            assert 0 <= node <= count
            assert steps <= count
    assert annotation.text == " ".join(annotation.tokens)


@pytest.mark.parametrize("concept", ["house", "roof", "red", "striped", "sky", "grass", "text", "stop", "face", "on"])
def test_annotations_are_well_formed_trees(concept: str) -> None:
    known = {"NOUN", "ADJ", "ADP", "DET", "CCONJ", "ADV"}
    for annotation in annotate_many(concept, 60):
        assert_is_tree(annotation)
        assert set(annotation.tags) <= known


@pytest.mark.parametrize("concept", ["house", "roof", "red", "striped", "night", "grass", "text", "face", "wheel"])
def test_annotations_mostly_name_what_the_unit_fires_on(concept: str) -> None:
    named = [concept in concepts_in(annotation.text) for annotation in annotate_many(concept, 60)]
    assert np.mean(named) > 0.35


def test_annotations_share_of_generic_answers_is_a_quarter() -> None:
    texts = [annotation.text for annotation in annotate_many("house", 300)]
    assert 0.2 < np.mean([text in _GENERIC for text in texts]) < 0.3


def test_generic_answers_name_no_concept() -> None:
    assert not any(concepts_in(text) for text in _GENERIC)


def test_annotate_unit_same_key_gives_the_same_words_per_persona() -> None:
    masks, maps = unit_for("house")
    first = annotate_unit(masks, maps, "net/layer/3")
    assert first == annotate_unit(masks, maps, "net/layer/3")
    assert tuple(annotation.annotator for annotation in first) == PERSONAS
    others = [annotate_unit(masks, maps, f"net/layer/{unit}") for unit in range(10)]
    assert any([a.text for a in first] != [a.text for a in other] for other in others)


def test_annotate_unit_masks_of_another_resolution_mean_the_same() -> None:
    fine, maps = unit_for("house")
    coarse, _ = unit_for("house", side=32)
    best = [max(seen, key=lambda name: seen[name]) for seen in (evidence(m, maps).nats for m in (fine, coarse))]
    assert best == ["house", "house"]


def test_annotate_unit_that_never_fires_is_described_vaguely() -> None:
    _, maps = unit_for("house")
    dead = np.zeros((len(maps), 16, 16), dtype=bool)
    texts = [a.text for unit in range(60) for a in annotate_unit(dead, maps, f"net/layer/{unit}")]
    assert np.mean([text in _GENERIC for text in texts]) > 0.8
