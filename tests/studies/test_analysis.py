"""Scores of descriptions and orders of ablation, against the reference's definitions written out."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import spacy
from spacy.tokens import Doc

from milan_ray.studies.ablation.curves import RANDOM, Order, step_sets, units_of
from milan_ray.studies.analysis.statistics import (
    DIFFERENT_WORDS,
    FRACTIONS,
    SAME_LAYERS,
    beside_random,
    contrast,
    criteria,
    expected_range,
    first_ablated,
    layer_properties,
    max_word_difference,
    missing_criteria,
    orders,
    parse_depth,
    step_counts,
    unit_scores,
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
        language.vocab.set_vector(word, np.array(vector, np.float32))  # type: ignore[arg-type]  # thinc's own array types

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
    missing = {criterion for names in missing_criteria(blank, ("ship",)).values() for criterion in names}
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


def test_ties_broken_at_random_leave_equals_in_no_order_of_the_table(nlp):
    scores = unit_scores(DESCRIPTIONS, nlp, words=())
    found = orders(scores, trials=1, seed=1, ties=40)
    by_adjectives = {tuple(order.units.tolist()) for order in found if order.criterion == "adjectives"}
    assert by_adjectives == {(1, 0, 3, 2), (1, 3, 0, 2)}
    assert "verbs" not in {order.criterion for order in found}  # all have none
    assert found[-1].units.tolist() == orders(scores, trials=1, seed=1)[-1].units.tolist()


def test_matched_orders_take_as_many_units_of_every_layer_at_every_step(nlp):
    scores = pl.DataFrame({"layer": [*"aabbbb", *"cc" * 4], "unit": range(14), "description": [""] * 14})
    scores = scores.with_columns(nouns=pl.Series(np.random.default_rng(0).integers(0, 3, 14)))
    own, same, random = orders(scores, trials=1, matched=["nouns"])
    assert (own.criterion, same.criterion, random.criterion) == ("nouns", f"nouns{SAME_LAYERS}", RANDOM)
    layers = scores["layer"].to_numpy()
    assert layers[own.units].tolist() == layers[same.units].tolist() and own.units.tolist() != same.units.tolist()
    assert sorted(same.units) == list(range(14))


def test_steps_are_the_first_of_an_order(nlp):
    counts = step_counts(50)
    assert counts == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9] == [round(50 * fraction) for fraction in FRACTIONS]
    units = pl.DataFrame({"layer": ["a"] * 50, "unit": range(50)})
    assert step_sets(units, [Order("nouns", 0, np.arange(50)[::-1])], counts)[2] == {"a": [49, 48]}
    scores = unit_scores(DESCRIPTIONS, nlp, words=())
    assert units_of(scores, np.array([2, 0, 1])) == {"conv2": [0], "conv1": [0, 1]}


def test_shares_of_properties_per_layer(nlp):
    scores = unit_scores(DESCRIPTIONS, nlp, words=())
    properties = layer_properties(scores)
    found = {(row["layer"], row["property"]): row["share"] for row in properties.iter_rows(named=True)}
    assert found["conv1", "contains an adposition"] == 0.5 and found["conv2", "contains an adposition"] == 0
    assert found["conv2", "contains an adjective"] == 0.5
    assert found["conv1", DIFFERENT_WORDS] == 0.5 and found["conv2", DIFFERENT_WORDS] == 0
    assert set(properties["units"]) == {2}
    assert properties.filter((pl.col("low") > pl.col("share")) | (pl.col("high") < pl.col("share"))).is_empty()


def test_contrast_takes_the_units_of_a_group_of_layers_together():
    properties = pl.DataFrame(
        {
            "layer": ["a", "b", "c"],
            "property": ["contains a verb"] * 3,
            "holding": [56, 40, 8],
            "units": [70, 60, 20],
        }
    )
    found = contrast(properties, "contains a verb", pl.col("layer") == "a", pl.col("layer") != "a")
    assert found is not None
    assert (found.share, found.other) == (0.8, 0.6)
    # Newcombe's own example, 56 of 70 against 48 of 80 (1998, table II, method 10).
    assert (round(found.low, 4), round(found.high, 4)) == (0.0524, 0.3339)
    assert contrast(properties, "contains an adjective", pl.col("layer") == "a", pl.col("layer") != "a") is None
    assert contrast(properties, "contains a verb", pl.col("layer") == "z", pl.col("layer") == "a") is None


def test_first_ablated_are_the_first_of_the_orders(nlp):
    scores = unit_scores(DESCRIPTIONS, nlp, words=())
    first = first_ablated(scores, 2)
    for order in orders(scores, trials=0):
        rows = first.filter(pl.col("criterion") == order.criterion)
        assert rows.select("layer", "unit").rows() == scores[order.units[:2]].select("layer", "unit").rows()
        assert rows["place"].to_list() == [1, 2]


def test_heights_of_curves_stand_beside_the_range_of_random_orders():
    def curve(condition: str, trial: int, *accuracies: float) -> pl.DataFrame:
        steps = list(range(len(accuracies)))
        columns = {"condition": [condition] * len(steps), "trial": [trial] * len(steps)}
        return pl.DataFrame({**columns, "ablated": steps, "accuracy": accuracies})

    rows = [curve("nouns", 0, 0.9, 0.4, 0.2), curve("verbs", 0, 0.9, 0.8, 0.6)]
    random = [0.7, 0.72, 0.74]
    rows += [curve(RANDOM, trial, 0.9, value + 0.1, value - 0.1) for trial, value in enumerate(random)]
    found = beside_random(pl.concat(rows))
    assert found["condition"].to_list() == ["nouns", "verbs"]
    np.testing.assert_allclose(found["accuracy"], [0.3, 0.7])
    # t with 2 degrees of freedom: 4.3027; 0.02 · √(1 + 1/3).
    np.testing.assert_allclose(found["low"], 0.72 - 4.302653 * 0.02 * np.sqrt(4 / 3), atol=1e-6)
    np.testing.assert_allclose(found["random"], 0.72)
    assert expected_range(np.array([0.5])) == (0.5, None, None)
    assert beside_random(pl.concat(rows[:2]))["random"].to_list() == [None, None]
