from __future__ import annotations

import polars as pl
import pytest

from milan_ray.errors import MilanError
from milan_ray.scoring.words import head_words, parse, pattern, same_word, spoken, vocabulary_of, words_of


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("face", "faces"), ("striped", "stripes"), ("dot", "dotted"), ("sky", "skies"), ("wave", "waving"),
        ("person", "people"), ("leaf", "leaves"), ("man", "men"), ("building", "buildings"), ("dish", "dishes"),
        ("carry", "carrying"), ("texture", "textured"),
    ],
)  # fmt: skip
def test_inflections_are_one_word(one: str, other: str) -> None:
    assert same_word(one, other) and same_word(other, one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("animals", "animated"), ("strips", "stripes"), ("face", "surface"), ("car", "cars2"), ("cat", "category"),
        ("organ", "organization"), ("wing", "window"), ("red", "reed"), ("sign", "signal"), ("color", "colorful"),
    ],
)  # fmt: skip
def test_other_words_are_not(one: str, other: str) -> None:
    assert not same_word(one, other)


def test_head_word_is_the_shortest_form_and_keeps_other_words_of_the_stem_apart() -> None:
    heads = head_words(["faces", "face", "animals", "animated", "animal", "stripes", "striped"])
    assert heads["faces"] == heads["face"] == "face"
    assert (heads["animals"], heads["animated"]) == ("animal", "animated")
    assert heads["stripes"] == heads["striped"] == "striped"


def test_queries_have_terms_alternatives_and_phrases() -> None:
    assert parse("Red  stripes") == [(("red",),), (("stripes",),)]
    assert parse('face|person | "Left of" cars') == [(("face",), ("person",), ("left", "of")), (("cars",),)]
    assert parse("| left-of") == [(("left", "of"),)]
    with pytest.raises(MilanError, match="holds no word"):
        parse('"" | ?!')


def test_patterns_find_whole_words_across_punctuation_and_case() -> None:
    texts = ["Dog-faces!", "surfaces", "FACES of dogs", "street_light", "the light of a street"]
    words = vocabulary_of(pl.Series(texts))
    assert words == sorted({word for text in texts for word in words_of(text)})

    def hits(query: str) -> list[int]:
        (term,) = parse(query)
        frame = pl.DataFrame({"text": texts}).with_row_index()
        return frame.filter(spoken("text").str.contains(pattern(term, words)))["index"].to_list()

    assert hits("face") == [0, 2]
    assert hits('"dog face"') == [0]
    assert hits('"street lights"') == [3]
    assert hits("surfaces|streets") == [1, 3, 4]
