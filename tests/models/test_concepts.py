"""The list of everyday words: every word once, clean, sorted by kind; and the option that names it."""

from __future__ import annotations

from argparse import Namespace

import pytest

from milan_ray.cli.label import _clip_dissect
from milan_ray.labelers.clip_dissect import read_concepts
from milan_ray.models.concepts import CONCEPT_LISTS, EVERYDAY, concept_list, concepts_by_kind
from milan_ray.models.conse import NAME
from milan_ray.models.image_text import own_concepts
from milan_ray.plugins import load_plugins

KINDS = ("colours", "textures", "materials", "parts", "animals", "plants", "food", "people", "things", "scenes")


def test_everyday_words_are_thousands_of_all_kinds() -> None:
    kinds = concepts_by_kind(EVERYDAY)
    assert tuple(kinds) == KINDS
    assert all(len(words) >= 80 for words in kinds.values())
    assert 3000 <= len(concept_list(EVERYDAY)) == sum(map(len, kinds.values()))
    for word, kind in {
        "red": "colours",
        "fur": "textures",
        "wood": "materials",
        "beak": "parts",
        "dog": "animals",
    }.items():
        assert word in kinds[kind]


def test_everyday_words_stand_once_and_are_clean() -> None:
    words = concept_list(EVERYDAY)
    assert len({word.casefold() for word in words}) == len(words)
    # What the reader of users' own lists makes of them: marks, blanks and quotes would be taken off.
    assert read_concepts("\n".join(words)) == words
    assert all(
        word.isascii() and word.isprintable() and "  " not in word and not set(word) & set(',;"#_') for word in words
    )
    assert all(len(word.split()) <= 6 for word in words)


@pytest.mark.parametrize("kind", KINDS)
def test_everyday_words_of_a_kind_are_sorted(kind: str) -> None:
    words = list(concepts_by_kind(EVERYDAY)[kind])
    assert words == sorted(words, key=lambda word: (word.lower(), word))


def test_file_has_nothing_but_kinds_and_words() -> None:
    text = CONCEPT_LISTS[EVERYDAY].read_text(encoding="utf-8")
    lines = [line for kind, words in concepts_by_kind(EVERYDAY).items() for line in (f"# {kind}", *words)]
    assert text == "\n".join(lines) + "\n"


def test_option_concepts_takes_the_list_by_name() -> None:
    args = Namespace(concepts=EVERYDAY, similarity="wpmi", pooling="max", hold_out=0.5, mu=None)
    labeler = _clip_dissect(args)
    assert labeler.concepts == concept_list(EVERYDAY)
    assert (labeler.similarity, labeler.pooling, labeler.hold_out) == ("wpmi", "max", 0.5)


def test_list_is_conse_own() -> None:
    load_plugins()
    assert own_concepts(NAME) == concept_list(EVERYDAY)
