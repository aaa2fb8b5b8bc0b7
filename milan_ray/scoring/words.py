"""Words of descriptions, and which of them are forms of one word: *face*, *faces*, *faced*.

Inflections are found without a trained model: two words are forms of one when Snowball's English stemmer (Porter 2)
gives them one stem and they differ in an inflection's ending only. The stem alone goes too far, *animals* and
*animated* share it; irregular plurals come from a short list, irregular verbs are not known.
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
"""Words that say nothing of what is seen."""

_IRREGULAR = {
    **{"people": "person", "men": "man", "women": "woman", "children": "child", "feet": "foot", "teeth": "tooth"},
    **{"geese": "goose", "mice": "mouse", "oxen": "ox", "leaves": "leaf", "wolves": "wolf", "knives": "knife"},
    **{"shelves": "shelf", "halves": "half", "calves": "calf", "hooves": "hoof", "scarves": "scarf"},
    **{"loaves": "loaf", "wives": "wife", "thieves": "thief"},
}

_ENDINGS = frozenset(("", "e", "s", "es", "d", "ed", "ing", "y", "ies", "ied", "ying"))
_DOUBLED = frozenset(("ed", "ing"))  # what follows a consonant that is written twice: dot, dotted
_PART = re.compile(r'"([^"]*)"|(\|)|([^\s|"]+)')
_STEMMER = snowballstemmer.stemmer("english")

Term = tuple[tuple[str, ...], ...]
"""Alternatives, each a phrase of one or more words."""


def words_of(text: str) -> list[str]:
    """The words of a text, lower-cased: runs of letters and digits."""
    return re.findall(r"[^\W_]+", text.lower())


def spoken(column: str) -> pl.Expr:
    """A column of texts as their words between single blanks, which patterns of :func:`pattern` look at."""
    return pl.col(column).str.to_lowercase().str.replace_all(r"[^\p{L}\p{N}]+", " ")


@lru_cache(maxsize=2**16)
def stem(word: str) -> str:
    """What all forms of a word have in common; other words may have it too."""
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
    """Every word → the word that stands for all its forms in the vocabulary: the shortest, then the first."""
    stems: dict[str, list[str]] = defaultdict(list)
    for word in sorted(set(vocabulary), key=lambda word: (len(word), word)):
        stems[stem(word)].append(word)
    heads: dict[str, str] = {}
    for words in stems.values():
        for place, word in enumerate(words):
            heads[word] = next((heads[other] for other in words[:place] if same_word(word, other)), word)
    return heads


def forms(word: str, vocabulary: Iterable[str]) -> list[str]:
    """The words of a vocabulary that are forms of a word, sorted; the word itself always."""
    # No inflection changes the first letter, and stems take time.
    return sorted({word} | {other for other in vocabulary if other[:1] == word[:1] and same_word(word, other)})


def parse(query: str) -> list[Term]:
    """What a query asks for: every term must occur, in one of its alternatives.

    Args:
        query: Words between blanks; ``|`` between alternatives; words that must follow each other in quotes.

    Raises:
        MilanError: There is no word in it.
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
    """A regular expression that finds a term, with all its words' forms, in what :func:`spoken` gives."""
    known = set(vocabulary)
    phrases = (" ".join(f"(?:{'|'.join(forms(word, known))})" for word in phrase) for phrase in term)
    return rf"\b(?:{'|'.join(phrases)})\b"


def vocabulary_of(texts: pl.Series) -> list[str]:
    """The different words of texts, sorted."""
    found = texts.str.to_lowercase().str.extract_all(r"[\p{L}\p{N}]+").explode().drop_nulls()
    return found.unique().sort().to_list()


def asked_in(texts: pl.Series, words: Sequence[str]) -> pl.Series:
    """Which of some words occur in texts, each with all its forms.

    Args:
        texts: N texts.
        words: Each as a query of :func:`parse`: ``face|person`` is either, ``"left of"`` a phrase; where there are
            several terms, all must occur.

    Returns:
        Lists of strings, (N,): those of the words that occur, in their order.
    """
    vocabulary = vocabulary_of(texts)
    frame = pl.DataFrame({"text": texts})
    for place, word in enumerate(dict.fromkeys(words)):
        # Alternatives are one term; words in a row are several, which must all occur.
        hits = [spoken("text").str.contains(pattern(term, vocabulary)) for term in parse(word)]
        found = pl.when(pl.all_horizontal(hits)).then(pl.lit(word)).alias(f"word {place}")
        frame = frame.with_columns(found)
    return frame.select(pl.concat_list(pl.exclude("text")).list.drop_nulls().alias("words")).to_series()
