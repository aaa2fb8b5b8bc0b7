import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from milan_ray.captioner.text import Indexer, Tokenizer, Vocabulary, breaks_off, readable
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


@pytest.mark.parametrize(
    "text",
    [
        "people's heads", "dogs' ears", "dogs' and cats' ears", "rock 'n' roll", "don't, can't: they're", "low-res",
        'a (small) "stop" sign', "'stop' signs", "black/white", "5% off!", "objects [red]; men's clothes", "$5 bills",
        "the dog's",
    ],
)  # fmt: skip
def test_readable_restores_what_people_wrote(text: str) -> None:
    tokens = Tokenizer()(text)
    indexer = Indexer(Vocabulary(tuple(dict.fromkeys(tokens))))
    found = readable(indexer.reconstruct([indexer.vocabulary.ids[token] for token in tokens]))
    assert found.lower() == text
    assert readable(found) == found


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    words=st.lists(st.sampled_from(("red", "dogs", "'", "'s", "n't", '"', "(", ")", "/", "!", ",", "$")), max_size=8)
)
def test_readable_changes_nothing_but_blanks(words: list[str]) -> None:
    text = " ".join(words)
    assert readable(text).replace(" ", "") == text.replace(" ", "")


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("The top of the", True), ("The", True), ("Items with with", True), ("Dog and", True), ("", True),
        ("The dog 's", True), ("Red,", True), ("Low-", True), ("The bottom right of a.", True),
        ("Dog heads", False), ("Nothing", False), ("Text", False), ("Center part of all flowers.", False),
        ("Things to look at them", False), ("Lights", False), ("What ?", False),
    ],
)  # fmt: skip
def test_breaks_off_in_the_middle_of_a_phrase(text: str, broken: bool) -> None:
    assert breaks_off(text) == broken


PIECES = ("red", "dog", "-", "--", ".", "...", ",", ";", ":", "low-res", "-like", "'s", "U.S.")


def plain_index(
    indexer: Indexer, texts: list[list[str]], start: bool, stop: bool, pad: bool, unk: bool, length: int | None
) -> list[list[int]]:
    """The reference's tokens, word for word."""
    ids, words = indexer.ids, list(indexer.vocabulary.words)
    size = (length or max(map(len, texts))) + start + stop
    rows = []
    for text in texts:
        row = [ids.start] if start else []
        for token in text:
            if token in words:
                row.append(words.index(token))
            elif unk:
                row.append(ids.unk)
        if stop:
            row = [*row[: size - 1], ids.stop]
        row += [ids.pad] * (size - len(row)) if pad else []
        rows.append(row[:size])
    return rows


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    texts=st.lists(st.lists(st.sampled_from(("red", "dog", "odd")), max_size=5), min_size=1, max_size=3),
    flags=st.tuples(*[st.booleans()] * 4),
    length=st.sampled_from([None, 1, 3, 9]),
)
def test_index_any_options_equal_the_plain_rule(
    texts: list[list[str]], flags: tuple[bool, bool, bool, bool], length: int | None
) -> None:
    indexer = Indexer(Vocabulary(("red", "dog")))
    start, stop, pad, unk = flags
    ours = indexer.index([" ".join(text) for text in texts], start=start, stop=stop, pad=pad, unk=unk, length=length)
    assert ours == plain_index(indexer, texts, start, stop, pad, unk, length)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(ids=st.lists(st.integers(0, len(PIECES) + 3), min_size=1, max_size=8))
def test_reconstruct_any_tokens_equal_replacement_by_replacement(ids: list[int]) -> None:
    indexer = Indexer(Vocabulary(PIECES))
    kept = ids[: ids.index(indexer.ids.stop)] if indexer.ids.stop in ids else ids
    text = " ".join(PIECES[i] for i in kept if i < len(PIECES))
    for mark in ".,;:-":
        text = text.replace(f" {mark}", mark)
    text = text.replace("- ", "-")
    assert indexer.reconstruct(ids) == ". ".join(part.strip().capitalize() for part in text.split(".")).strip()
