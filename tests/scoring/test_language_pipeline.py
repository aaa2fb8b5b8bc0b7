"""A spaCy pipeline from the world's gold tags and heads, on sentences it has not seen."""

from __future__ import annotations

import numpy as np
import pytest
from spacy.language import Language

from milan_ray.scoring.language_pipeline import Sentence, train_language, word_vectors
from milan_ray.world.annotators import Annotation, specimens


def sentences(annotations: list[Annotation]) -> list[Sentence]:
    return [Sentence(each.tokens, each.tags, each.heads) for each in annotations]


@pytest.fixture(scope="module")
def nlp() -> Language:
    return train_language(sentences(specimens(1200)))


def test_tags_and_heads_of_new_sentences(nlp):
    known = {each.text for each in specimens(1200)}
    new = [each for each in specimens(900, seed=1) if each.text not in known]
    assert len(new) > 100
    tags, heads = [], []
    for each in new:
        doc = nlp(each.text)
        if tuple(token.text for token in doc) != each.tokens:
            continue  # another tokenisation: counted below
        tags += [token.pos_ == tag for token, tag in zip(doc, each.tags, strict=True)]
        heads += [
            (0 if token.head == token else token.head.i + 1) == head
            for token, head in zip(doc, each.heads, strict=True)
        ]
    assert len(tags) > 0.95 * sum(len(each.tokens) for each in new)
    assert np.mean(tags) > 0.97
    assert np.mean(heads) > 0.9


def test_words_in_like_company_have_like_vectors(nlp):
    vocab = nlp.vocab
    assert vocab.vectors_length == 16
    alike = [("red", "blue"), ("green", "yellow"), ("purple", "brown"), ("house", "home")]
    unlike = [("red", "wheel"), ("green", "above"), ("purple", "house"), ("house", "yellow")]
    near, far = (np.mean([vocab[a].similarity(vocab[b]) for a, b in pairs]) for pairs in (alike, unlike))
    assert near > far + 0.2


def test_word_vectors_keep_the_products_of_positive_information():
    texts = [("a", "b"), ("a", "c"), ("b", "c"), ("c", "a", "b")]
    words, vectors = word_vectors(texts, 3)
    assert words == ["a", "b", "c"] and vectors.shape == (3, 3)
    counts = np.array([[0, 2, 2], [2, 0, 2], [2, 2, 0]])
    information = np.where(
        counts > 0, np.log(np.maximum(counts, 1) * counts.sum() / np.outer(counts.sum(1), counts.sum(0))), 0
    )
    np.testing.assert_allclose(vectors @ vectors.T, information @ information.T, atol=1e-5)
