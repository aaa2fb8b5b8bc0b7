import pickle

import pytest

from milan_ray.captioner.text import Indexer, Tokenizer, Vocabulary
from milan_ray.errors import MilanError


def test_tokenizer_english_rules_lowercased_without_whitespace() -> None:
    assert Tokenizer()("  A cat's low-res  ears,\tdon't!\n") == [
        "a",
        "cat",
        "'s",
        "low",
        "-",
        "res",
        "ears",
        ",",
        "do",
        "n't",
        "!",
    ]


def test_vocabulary_orders_by_frequency_then_first_occurrence() -> None:
    units = [["blue dog", "red dog"], {"red sign", "a sign"}]
    assert Vocabulary.build(units).words == ("dog", "red", "sign", "blue", "a")


def test_vocabulary_without_a_word_says_where_to_look() -> None:
    with pytest.raises(MilanError, match="annotations"):
        Vocabulary.build([[" "], []])


def test_indexer_round_trip_through_state_and_pickle() -> None:
    indexer = Indexer(Vocabulary(("red", "dog", "-", ".")))
    for copy in (Indexer.from_state(indexer.state()), pickle.loads(pickle.dumps(indexer))):
        assert copy == indexer
        assert copy.index(["Red dog.", "UNKNOWN"]) == [[4, 0, 1, 3, 5], [4, 7, 5, 6, 6]]


def test_reconstruct_joins_punctuation_and_capitalises_sentences() -> None:
    indexer = Indexer(Vocabulary(("red", "dog", "-", ".")))
    assert indexer.reconstruct([4, 0, 2, 1, 3, 1, 5, 0]) == "Red-dog. Dog"
