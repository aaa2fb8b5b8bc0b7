"""Text to token ids and back: spaCy's English tokenizer rules, a vocabulary, four special tokens."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from milan_ray.errors import MilanError

if TYPE_CHECKING:
    from spacy.language import Language


@functools.cache
def _english() -> Language:
    import spacy  # takes half a second, and only those need it who read texts of people

    return spacy.blank("en")


@dataclass(frozen=True)
class Tokenizer:
    """Splits text by spaCy's rules for English, lowercased, without whitespace tokens; needs no trained model.

    It has no state: it is pickled by name, and each process builds the rules once.
    """

    def __call__(self, text: str) -> list[str]:
        """The tokens of one text."""
        return [token.text.lower() for token in _english().make_doc(text) if token.text.strip()]


class TokenIds:
    """The ids of a vocabulary: words first, then the special tokens.

    Attributes:
        words: Number of words.
        start: Id of ``<start>``.
        stop: Id of ``<stop>``.
        pad: Id of ``<pad>``.
        unk: Id of ``<unk>``.
        total: Number of ids.
    """

    def __init__(self, words: int) -> None:
        self.words = words
        self.start, self.stop, self.pad, self.unk, self.total = range(words, words + 5)


@dataclass(frozen=True)
class Vocabulary:
    """The known words, most frequent first.

    Attributes:
        words: All words; a word's index is its id.
    """

    words: tuple[str, ...]

    @functools.cached_property
    def ids(self) -> dict[str, int]:
        """Each word's id."""
        return {word: i for i, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    @classmethod
    def build(cls, annotations: Iterable[Collection[str]], tokenizer: Tokenizer | None = None) -> Vocabulary:
        """Builds the vocabulary of units' annotations: most frequent words first, ties by first occurrence.

        Args:
            annotations: The annotations of each unit. They are joined by a space before tokenizing, as in the
                reference; sets are sorted first.
            tokenizer: Splits them.

        Raises:
            MilanError: The annotations have no word.
        """
        tokenizer = tokenizer or Tokenizer()
        counts: Counter[str] = Counter()
        for texts in annotations:
            counts.update(tokenizer(" ".join(sorted(texts) if isinstance(texts, (set, frozenset)) else texts)))
        if not counts:
            raise MilanError("cannot build a vocabulary: the annotations hold no word; check the annotations table")
        return cls(tuple(word for word, _ in counts.most_common()))


@dataclass(frozen=True)
class Indexer:
    """Converts text to token ids and back.

    Attributes:
        vocabulary: The known words.
        tokenizer: Splits text.
    """

    vocabulary: Vocabulary
    tokenizer: Tokenizer = Tokenizer()

    @property
    def ids(self) -> TokenIds:
        """The ids of words and special tokens."""
        return TokenIds(len(self.vocabulary))

    def words(self, tokens: Sequence[str], unk: bool = True) -> list[int]:
        """Ids of tokens; unknown ones become ``<unk>``, or are left out if ``unk`` is False."""
        ids = map(self.vocabulary.ids.get, tokens)
        return [self.ids.unk if i is None else i for i in ids if unk or i is not None]

    def frame(
        self,
        words: Sequence[Sequence[int]],
        *,
        start: bool = True,
        stop: bool = True,
        pad: bool = True,
        length: int | None = None,
    ) -> list[list[int]]:
        """Adds special tokens to word ids.

        Args:
            words: Word ids of each text.
            start: Whether to prepend ``<start>``.
            stop: Whether to append ``<stop>``; longer texts are cut to make room.
            pad: Whether to pad to the length with ``<pad>``.
            length: Maximum number of words, without start and stop; by default that of the longest text of the call.
        """
        size = (length or max(map(len, words), default=0)) + start + stop
        framed = []
        for text in words:
            row = [self.ids.start, *text] if start else list(text)
            row = row[: size - stop] + [self.ids.stop] * stop
            framed.append(row + [self.ids.pad] * (size - len(row)) if pad else row)
        return framed

    def index(
        self, texts: Sequence[str], *, unk: bool = True, length: int | None = None, **specials: bool
    ) -> list[list[int]]:
        """Tokenizes texts and adds special tokens: :meth:`words`, then :meth:`frame`.

        The default length is that of the longest text *before* unknown words are left out, as in the reference.
        """
        tokens = [self.tokenizer(text) for text in texts]
        length = length or max(map(len, tokens), default=0)
        return self.frame([self.words(text, unk) for text in tokens], length=length, **specials)

    def reconstruct(self, ids: Sequence[int]) -> str:
        """Text of token ids up to the first ``<stop>``, without special tokens, with capitalised sentences.

        As in the reference, all letters but a sentence's first become lowercase, and spaces around dashes are removed.
        """
        ids = list(ids)
        if self.ids.stop in ids:
            ids = ids[: ids.index(self.ids.stop)]
        text = " ".join(self.vocabulary.words[i] for i in ids if i < self.ids.words)
        text = re.sub(r" ([.,;:])", r"\1", text)
        text = re.sub(r" ?- ?", "-", text)
        return ". ".join(sentence.strip().capitalize() for sentence in text.split(".")).strip()

    def state(self) -> dict[str, list[str]]:
        """The indexer as JSON, for :meth:`from_state`."""
        return {"words": list(self.vocabulary.words)}

    @classmethod
    def from_state(cls, state: dict[str, list[str]]) -> Indexer:
        """The indexer of :meth:`state`."""
        return cls(Vocabulary(tuple(state["words"])))


_TO_THE_LEFT = re.compile(r" ('(?:s|m|d|re|ve|ll)|n't|[!?%)\]}…]|'(?= |$)(?<=s '))(?![^\W\d_])", re.IGNORECASE)
"""Tokens of spaCy's English rules that are written without a space before them; a lone ' only after an s."""

_TO_THE_RIGHT = re.compile(r"([(\[{$#]) ")
_TO_BOTH = re.compile(r" ([/]) ")
_QUOTED = re.compile(r"([\"“]|(?<!s )') ([^\"'“”]+?) ([\"'”])(?= |$|[.,;:!?])")

_UNENDED = frozenset((
    "a", "an", "the", "and", "or", "but", "nor", "of", "with", "without", "from", "into", "onto", "at", "by", "for",
    "in", "on", "to", "than", "as", "its", "their", "his", "her", "your", "our", "my", "that", "which", "who",
    "whose", "is", "are", "was", "were", "be", "being", "some", "every", "very",
))  # fmt: skip
"""Words that do not end a description."""


def readable(text: str) -> str:
    """A text of :meth:`Indexer.reconstruct` as people write it: ``People 's heads`` becomes ``People's heads``.

    The reference joins tokens by blanks, except around dashes and before ``.,;:``. Here contractions, possessives,
    brackets, quotes, slashes and the other marks of sentences have no blank either.
    """
    text = _QUOTED.sub(r"\1\2\3", text)
    text = _TO_THE_LEFT.sub(r"\1", text)
    return " ".join(_TO_BOTH.sub(r"\1", _TO_THE_RIGHT.sub(r"\1", text)).split())


def breaks_off(text: str) -> bool:
    """Whether a text ends in the middle of a phrase, such as ``The top of the``; an empty one does, too.

    Known by its last word: an article, a preposition, a conjunction or the like, or a mark that joins words.
    """
    words = text.lower().split()
    return not words or words[-1].strip(".") in _UNENDED or words[-1][-1] in ",;:-(/&" or words[-1].endswith("'s")
