"""Splits descriptions into words, and groups inflected forms of a word: *face*, *faces*, *faced*.

Inflections are found without a trained model. Two words are forms of one word if Snowball's English stemmer (Porter 2)
gives them the same stem and they differ only in an inflectional ending. The stem alone is too coarse: *animals* and
*animated* share it. Irregular plurals come from a short list; irregular verbs are not supported.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache

import polars as pl
import snowballstemmer

from milan_ray.errors import MilanError

FUNCTION_WORDS = frozenset(
    [
        *("a", "an", "and", "are", "as", "at", "be", "been", "by", "for", "from", "has", "have", "in", "into", "is"),
        *("it", "its", "of", "or", "s", "that", "the", "their", "them", "these", "they", "this", "those", "to", "was"),
        *("were", "which", "with"),
    ]
)
"""Function words, which do not describe what an image shows."""

_IRREGULAR = {
    **{"people": "person", "men": "man", "women": "woman", "children": "child", "feet": "foot", "teeth": "tooth"},
    **{"geese": "goose", "mice": "mouse", "oxen": "ox", "leaves": "leaf", "wolves": "wolf", "knives": "knife"},
    **{"shelves": "shelf", "halves": "half", "calves": "calf", "hooves": "hoof", "scarves": "scarf"},
    **{"loaves": "loaf", "wives": "wife", "thieves": "thief"},
}

_ENDINGS = frozenset(("", "e", "s", "es", "d", "ed", "ing", "y", "ies", "ied", "ying"))
_DOUBLED = frozenset(("ed", "ing"))  # endings that double the final consonant: dot, dotted
_PART = re.compile(r'"([^"]*)"|(\|)|([^\s|"]+)')
_STEMMER = snowballstemmer.stemmer("english")

Term = tuple[tuple[str, ...], ...]
"""Alternatives, each a phrase of one or more words."""


def words_of(text: str) -> list[str]:
    """Splits a text into lower-case words: runs of letters and digits."""
    return re.findall(r"[^\W_]+", text.lower())


def spoken(column: str) -> pl.Expr:
    """Rewrites a column of texts as words separated by single spaces, for the patterns of :func:`pattern`."""
    return pl.col(column).str.to_lowercase().str.replace_all(r"[^\p{L}\p{N}]+", " ")


@lru_cache(maxsize=2**16)
def stem(word: str) -> str:
    """Returns the stem that all forms of a word share; unrelated words may share it too."""
    return str(_STEMMER.stemWord(_IRREGULAR.get(word, word)))


def same_word(one: str, other: str) -> bool:
    """Whether two lower-case words are forms of one word."""
    one, other = _IRREGULAR.get(one, one), _IRREGULAR.get(other, other)
    if one == other:
        return True
    if stem(one) != stem(other):
        return False
    length = next((n for n, pair in enumerate(zip(one, other, strict=False)) if len(set(pair)) > 1), None)
    common = one[:length] if length is not None else min(one, other, key=len)
    return all(_inflection(common, word[len(common) :]) for word in (one, other))


def _inflection(common: str, ending: str) -> bool:
    return ending in _ENDINGS or (ending[:1] == common[-1:] and ending[1:] in _DOUBLED)


def head_words(vocabulary: Iterable[str]) -> dict[str, str]:
    """Maps every word to the representative of its forms in the vocabulary: the shortest, then alphabetically first."""
    stems: dict[str, list[str]] = defaultdict(list)
    for word in sorted(set(vocabulary), key=lambda word: (len(word), word)):
        stems[stem(word)].append(word)
    heads: dict[str, str] = {}
    for words in stems.values():
        for place, word in enumerate(words):
            heads[word] = next((heads[other] for other in words[:place] if same_word(word, other)), word)
    return heads


def content_words(texts: Iterable[str]) -> dict[str, frozenset[str]]:
    """Text → its words except function words; all forms of a word count as their representative in all texts."""
    words = {text: words_of(text) for text in texts}
    heads = head_words(word for split in words.values() for word in split)
    return {text: frozenset(heads[word] for word in words[text]) - FUNCTION_WORDS for text in words}


def shares_no_word(texts: Sequence[str], groups: Sequence[Sequence[str]]) -> list[bool]:
    """Whether each of N texts has no content word in common with any text of its group."""
    words = content_words([*texts, *(text for group in groups for text in group)])
    return [not any(words[text] & words[other] for other in group) for text, group in zip(texts, groups, strict=True)]


def forms(word: str, vocabulary: Iterable[str]) -> list[str]:
    """Returns the words of a vocabulary that are forms of a word, sorted, always including the word itself."""
    # No inflection changes the first letter, so this check avoids slow stemming.
    return sorted({word} | {other for other in vocabulary if other[:1] == word[:1] and same_word(word, other)})


def parse(query: str) -> list[Term]:
    """Parses a query into terms. Each term must occur, in one of its alternatives.

    Args:
        query: Words separated by spaces; ``|`` separates alternatives; quotes enclose phrases.

    Raises:
        MilanError: The query has no words.
    """
    terms: list[list[tuple[str, ...]]] = []
    joined = False
    for quoted, bar, plain in _PART.findall(query):
        if bar:
            joined = bool(terms)
        elif phrase := tuple(words_of(quoted or plain)):
            if joined:
                terms[-1].append(phrase)
            else:
                terms.append([phrase])
            joined = False
    if not terms:
        raise MilanError(
            f"the query {query!r} holds no word: give some, e.g. faces, 'red|blue stripes', '\"left of\"'."
        )
    return [tuple(term) for term in terms]


def pattern(term: Term, vocabulary: Sequence[str]) -> str:
    """Builds a regular expression that finds a term, in all inflections, in the output of :func:`spoken`."""
    known = set(vocabulary)
    phrases = (" ".join(f"(?:{'|'.join(forms(word, known))})" for word in phrase) for phrase in term)
    return rf"\b(?:{'|'.join(phrases)})\b"


def vocabulary_of(texts: pl.Series) -> list[str]:
    """Returns the distinct words of texts, sorted."""
    words = texts.str.to_lowercase().str.extract_all(r"[\p{L}\p{N}]+").explode().drop_nulls()
    return words.unique().sort().to_list()


def asked_in(texts: pl.Series, words: Sequence[str]) -> pl.Series:
    """Finds which of the given words occur in each text, in any inflection.

    Args:
        texts: N texts.
        words: Each is a query of :func:`parse`: ``face|person`` matches either word, ``"left of"`` a phrase. All terms
            of a query must occur.

    Returns:
        Lists of strings, (N,): the given words that occur, in the given order.
    """
    vocabulary = vocabulary_of(texts)
    frame = pl.DataFrame({"text": texts})
    for place, word in enumerate(dict.fromkeys(words)):
        # Alternatives form one term; successive words form several terms, all of which must occur.
        hits = [spoken("text").str.contains(pattern(term, vocabulary)) for term in parse(word)]
        frame = frame.with_columns(pl.when(pl.all_horizontal(hits)).then(pl.lit(word)).alias(f"word {place}"))
    return frame.select(pl.concat_list(pl.exclude("text")).list.drop_nulls().alias("words")).to_series()
