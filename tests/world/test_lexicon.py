from __future__ import annotations

import pytest

from milan_ray.world.lexicon import CONCEPTS, KINDS, NAMES, Concept, concepts_in, names_of, plural, tags
from milan_ray.world.scenes import SIGN_WORDS


def test_concepts_have_a_kind_and_two_to_four_synonyms() -> None:
    assert len(set(NAMES)) == len(NAMES)
    for concept in CONCEPTS:
        assert concept.kind in KINDS
        assert 2 <= len(concept.synonyms) <= 4 or concept.name in SIGN_WORDS
    assert len(names_of("object", "face")) == 12


@pytest.mark.parametrize("concept", CONCEPTS, ids=lambda concept: concept.name)
def test_every_synonym_is_found_by_concepts_in(concept: Concept) -> None:
    for term in concept.synonyms:
        forms = [term] if concept.kind in ("colour", "texture", "relation") else [term, plural(term)]
        for form in forms:
            assert concept.name in concepts_in(f"Some {form.upper()}, here")
        assert len(tags(concept, term)) == len(term.split())


def test_synonyms_name_one_concept_of_a_kind() -> None:
    for concept in CONCEPTS:
        for term in concept.synonyms:
            others = concepts_in(term) - {concept.name}
            assert others <= {"sky"}, (term, others)


def test_concepts_in_finds_whole_words_only() -> None:
    assert concepts_in("carpets and treetops") == frozenset()
    assert concepts_in("the roof of red houses") == {"roof", "red", "house"}
    assert concepts_in("words on signs") == {"text", "sign"}
    assert concepts_in("dogs on top of striped cars") == {"animal", "on", "striped", "car"}
    assert concepts_in("") == frozenset()
