"""Scores of descriptions and orders of ablation, against the reference's definitions written out."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import spacy
from spacy.tokens import Doc

from milan_ray.experiments.analysis import (
    FRACTIONS,
    RANDOM,
    Order,
    criteria,
    layer_properties,
    max_word_difference,
    missing_criteria,
    orders,
    parse_depth,
    steps,
    unit_scores,
    units_of,
)

VECTORS = {"red": [1.0, 0.0], "blue": [0.0, 1.0], "houses": [3.0, 0.0], "on": [0.0, 0.0], "ship": [3.0, 1.0]}
GRAMMAR = {
    "red houses": (["ADJ", "NOUN"], [1, 1]),
    "red blue houses on houses": (["ADJ", "ADJ", "NOUN", "ADP", "NOUN"], [2, 2, 2, 4, 2]),
    "houses": (["NOUN"], [0]),
}


@pytest.fixture(scope="module")
def nlp():
    """A pipeline that knows three sentences by heart."""
    language = spacy.blank("en")
    for word, vector in VECTORS.items():
        language.vocab.set_vector(word, np.array(vector, np.float32))

    @spacy.Language.component("by_heart")
    def by_heart(doc: Doc) -> Doc:
        if doc.text not in GRAMMAR:
            return doc
        tags, heads = GRAMMAR[doc.text]
        deps = ["ROOT" if place == head else "nmod" for place, head in enumerate(heads)]
        return Doc(doc.vocab, words=[token.text for token in doc], pos=tags, heads=heads, deps=deps)

    language.add_pipe("by_heart", name="tagger")
    language.add_pipe("by_heart", name="parser")
    return language


DESCRIPTIONS = pl.DataFrame(
    {
        "layer": ["conv1", "conv1", "conv2", "conv2"],
        "unit": [0, 1, 0, 1],
        "description": ["red houses", "red blue houses on houses", "houses", "red houses"],
    }
)


def test_scores_are_the_references(nlp):
    scores = unit_scores(DESCRIPTIONS, nlp, words=("ship",))
    assert scores["description"].to_list() == DESCRIPTIONS["description"].to_list()
    assert scores["nouns"].to_list() == [1, 2, 1, 1]
    assert scores["adjectives"].to_list() == [1, 2, 0, 1]
    assert scores["adpositions"].to_list() == [0, 1, 0, 0]
    assert scores["verbs"].to_list() == [0, 0, 0, 0]
    assert scores["description-length"].to_list() == [2, 5, 1, 2]
    assert scores["parse-depth"].to_list() == [1, 2, 0, 1]
    # red–houses 4; blue–houses 9 + 1; one token differs from nothing.
    np.testing.assert_allclose(scores["max-word-difference"], [4, 10, 0, 4], atol=1e-6)
    similar = [nlp(text).similarity(nlp("ship")) for text in scores["description"]]
    np.testing.assert_allclose(scores["similar to ship"], similar)


def test_what_a_pipeline_lacks_is_left_out_and_said():
    blank = spacy.blank("en")
    missing = {criterion for each in missing_criteria(blank, ("ship",)) for criterion in each.criteria}
    assert criteria(unit_scores(DESCRIPTIONS, blank, ("ship",))) == ["description-length"]
    assert missing == {
        "nouns", "verbs", "adpositions", "adjectives", "parse-depth", "max-word-difference", "similar to ship"
    }  # fmt: skip


def test_depth_is_that_below_the_last_root(nlp):
    doc = Doc(nlp.vocab, words=["a", "b", "c", "d"], heads=[0, 0, 2, 2], deps=["ROOT", "nmod", "ROOT", "nmod"])
    assert parse_depth(doc) == 1
    assert parse_depth(Doc(nlp.vocab, words=[])) == 0 and max_word_difference(Doc(nlp.vocab, words=[])) == 0


def test_orders_are_stable_and_random_ones_are_seeded(nlp):
    scores = unit_scores(DESCRIPTIONS, nlp, words=())
    found = {(order.criterion, order.trial): order.units.tolist() for order in orders(scores, trials=2, seed=1)}
    assert found["adjectives", 0] == [1, 0, 3, 2]
    # As Python sorts with reverse=True, which keeps the order of equals.
    by_length = sorted(range(4), key=scores["description-length"].to_list().__getitem__, reverse=True)
    assert found["description-length", 0] == by_length
    assert sorted(found[RANDOM, 0]) == [0, 1, 2, 3] and (RANDOM, 2) not in found
    assert found[RANDOM, 1] == orders(scores, trials=2, seed=1)[-1].units.tolist()


def test_steps_are_the_first_of_an_order(nlp):
    order = Order("nouns", 0, np.arange(50)[::-1])
    sizes = [len(step) for step in steps(order)]
    assert sizes == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9] == [round(50 * fraction) for fraction in FRACTIONS]
    assert steps(order)[2].tolist() == [49, 48]
    scores = unit_scores(DESCRIPTIONS, nlp, words=())
    assert units_of(scores, np.array([2, 0, 1])) == {"conv2": [0], "conv1": [0, 1]}


def test_shares_of_properties_per_layer(nlp):
    scores = unit_scores(DESCRIPTIONS, nlp, words=())
    found = {(layer, name): share for layer, name, share, _ in layer_properties(scores).iter_rows()}
    assert found["conv1", "contains an adposition"] == 0.5 and found["conv2", "contains an adposition"] == 0
    assert found["conv2", "contains an adjective"] == 0.5
    assert found["conv1", "top 10 % word difference"] == 0.5 and found["conv2", "top 10 % word difference"] == 0
    assert set(layer_properties(scores)["units"]) == {2}
