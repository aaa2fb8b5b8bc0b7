"""The world's own model of images and texts: learned from captions, it must tell true ones from wrong ones."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from milan_ray.labelers.clip import query, similarity
from milan_ray.models.image_text import ImageText, find_image_text
from milan_ray.world.image_text import (
    FOLDER,
    build,
    captions,
    contrastive_loss,
    phrase,
    ranking,
    train_image_text,
    vocabulary,
)
from milan_ray.world.lexicon import CONCEPT, NAMES, concepts_in, names_of
from milan_ray.world.scenes import concept_maps, make_scene
from milan_ray.world.training import Recipe, TrainTask, attributes_of, images_of, labels_of

SHORT = Recipe(scenes=1_280, epochs=3, lr=2e-3, first=120_000, batch_size=32)
FIRST = 2_000_000
"""Held-out scenes of this file's own."""


def trained(folder: Path, recipe: Recipe) -> ImageText:
    """The model as the demo makes it, through its files."""
    build(folder / FOLDER)
    task = TrainTask(f"{FOLDER}/model", lambda: train_image_text(recipe=recipe), 1)
    (folder / task.file).write_bytes(task.run())
    return ImageText(find_image_text(str(folder / FOLDER)))


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> ImageText:
    """Twenty seconds of training: enough for backgrounds."""
    return trained(tmp_path_factory.mktemp("short"), SHORT)


def reranked(model: ImageText, kinds: tuple[str, ...], z: float, units: int = 60, k: int = 5) -> float:
    """How often a concept's true description is ranked above a wrong one of its kind.

    A unit is k held-out scenes that show a concept, its maps their masks; the wrong one names what none of them shows.
    """
    scenes = [concept_maps(make_scene("heldout", FIRST + index)) for index in range(300)]
    names, draw = names_of(*kinds), Random(0)
    right: list[bool] = []
    while len(right) < units:
        concept, wrong = draw.sample(names, 2)
        rows = [row for row, maps in enumerate(scenes) if concept in maps and wrong not in maps]
        if len(rows) < k:
            continue
        chosen = draw.sample(rows, k)
        images = torch.cat([images_of("heldout", FIRST + row, 1) for row in chosen]).permute(0, 3, 1, 2) / 255
        masks = torch.from_numpy(np.stack([scenes[row][concept] for row in chosen]))
        unit = query(model.pool(model.maps(images), masks, torch.arange(k)).numpy(), z)
        texts = model.embed_texts([CONCEPT[name].synonyms[0] for name in (concept, wrong)]).numpy()
        true, false = similarity(texts, np.stack([unit, unit]))
        right.append(true > false)
    return float(np.mean(right))


def test_phrases_name_the_concepts_they_are_about() -> None:
    draw = Random(3)
    for _ in range(300):
        chosen = draw.sample(NAMES, draw.randint(1, 3))
        text = phrase(chosen, draw.random)
        assert set(chosen) <= concepts_in(text), text
        assert set(text.split()) <= set(vocabulary())


def test_captions_are_true_of_their_scenes() -> None:
    labels, shown = labels_of("train", 0, 40), attributes_of("train", 0, 40)
    texts, named = captions(labels.tolist(), shown, Random(0).random)
    assert len(texts) == 40 and bool((named <= shown).all()) and bool((named.sum(dim=1) >= 1).all())
    for text, row in zip(texts, named.bool(), strict=True):
        assert {name for name, there in zip(NAMES, row.tolist(), strict=True) if there} <= concepts_in(text)


def test_contrastive_loss_with_one_text_per_image_is_clip_s() -> None:
    logits = torch.randn(6, 6)
    both = torch.nn.functional.cross_entropy
    expected = both(logits, torch.arange(6)) + both(logits.T, torch.arange(6))
    torch.testing.assert_close(contrastive_loss(logits, torch.eye(6)), expected)


def test_ranking_of_the_truth_is_perfect_and_of_its_opposite_hopeless() -> None:
    shown = attributes_of("heldout", 0, 30)
    assert set(ranking(shown, shown).values()) == {1.0}
    assert set(ranking(-shown, shown).values()) == {0.0}


def test_world_clip_is_found_and_read_as_anybody_s(short: ImageText) -> None:
    assert (short.kind, short.size, short.grid, short.name) == ("clip", 64, 8, FOLDER)
    ids = short.tokenizer(["red houses", "zebras"])["input_ids"]
    words = vocabulary()
    assert [[words[number] for number in row] for row in ids] == [
        ["<s>", "red", "houses", "</s>"],
        ["<s>", "<unk>", "</s>"],
    ]


def test_reranking_prefers_true_descriptions_of_held_out_scenes(short: ImageText) -> None:
    assert reranked(short, ("background",), z=0.5) > 0.8
    assert reranked(short, ("background",), z=1.0) > 0.8
