"""Summarises captions of a unit's images to candidate labels, by a language model or by counting phrases.

Source: Bai et al., TMLR 2025. The wording of the prompts is this project's own.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol

from milan_ray.models.chat import Chat, Message

ROUNDS = 5
"""Number of times that a unit's captions are summarised."""

PROMPTS_VERSION = 2
"""Part of every hash of candidates; increased when the prompts or the processing of answers change."""

_WORDS = 5
_ADDED = ("design", "designs", "graphic", "graphics")


class Summariser(Protocol):
    """A method that finds what captions have in common."""

    @property
    def name(self) -> str:
        """The summariser's name in messages."""

    def identity(self) -> dict[str, object]:
        """Everything that determines the candidates, except the captions."""

    def candidates(self, captions: Sequence[str]) -> list[str]:
        """Candidate labels of a unit whose images have these captions; distinct, and at least one.

        Raises:
            MilanError: A language model does not answer.
        """


def tidy(answer: str) -> str:
    """A label from an answer: the last non-empty line, after any colon, lower case, no quotes, stop or bullet."""
    lines = [line for line in answer.strip().splitlines() if line.strip()]
    text = lines[-1] if lines else ""
    text = text.rpartition(":")[2] or text.replace(":", "")
    return " ".join(text.strip().strip("\"'`*“”‘’.-–• ").lower().split())


def variants(labels: Sequence[str]) -> list[str]:
    """Removes duplicate labels, and adds a variant with “background” after labels that end in “design” or “graphic”.

    Without “background”, an image generator tends to render such a label as an object on a table.
    """
    distinct: dict[str, None] = {}
    for label in labels:
        if label:
            distinct[label] = None
            if label.split()[-1] in _ADDED:
                distinct[f"{label} background"] = None
    return list(distinct)


# -- by a language model ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompted:
    """Asks a language model for the concept of each caption, then for what the concepts have in common.

    Attributes:
        chat: The model.
        rounds: Number of summaries, each of the captions in another order.
    """

    chat: Chat
    rounds: int = ROUNDS

    @property
    def name(self) -> str:
        """The model's name."""
        return self.chat.name

    def identity(self) -> dict[str, object]:
        """Everything that determines the candidates, except the captions."""
        return {"prompts": PROMPTS_VERSION, "rounds": self.rounds, "chat": self.chat.identity()}

    def candidates(self, captions: Sequence[str]) -> list[str]:
        """Candidate labels, from one summary per round; if all answers are empty, the most frequent phrase."""
        simple = [tidy(answer) for answer in self.chat.answers([simplify(caption) for caption in captions])]
        simple = [short or caption for short, caption in zip(simple, captions, strict=True)]
        orders = [Random(number).sample(simple, len(simple)) for number in range(self.rounds)]
        labels = [tidy(answer) for answer in self.chat.answers([summarise(order) for order in orders])]
        lists = [place for place, label in enumerate(labels) if "," in label]
        for place, answer in zip(lists, self.chat.answers([narrow(labels[place]) for place in lists]), strict=True):
            labels[place] = tidy(answer) or labels[place]
        return variants(labels) or FrequentPhrases(1).candidates(captions)


def _asked(task: str, examples: Sequence[tuple[str, str]], question: str) -> list[Message]:
    turns: list[Message] = [{"role": "system", "content": task}]
    for asked, answered in examples:
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return [*turns, {"role": "user", "content": question}]


def simplify(caption: str) -> list[Message]:
    """The prompt that asks for the subject of a caption."""
    task = (
        f"You turn captions of pictures into labels. Reply with one label of 1 to {_WORDS} words: the thing, texture, "
        "colour or scene that the caption is about. No sentence, no explanation."
    )
    example = "Caption: two kids in yellow raincoats jumping into a puddle on a rainy day", "children jumping in puddle"
    return _asked(task, [example], f"Caption: {caption}")


def summarise(labels: Sequence[str]) -> list[Message]:
    """The prompt that asks what most of the labels have in common."""
    task = (
        "You are given labels of pictures that one detector reacts to. Some of them are mistaken. Reply with the one "
        f"idea, in 1 to {_WORDS} words, that covers most of the labels; it need not cover all. Prefer what can be seen "
        "to what is abstract. No list, no sentence, no explanation."
    )
    examples = [
        ("- beagle on sofa\n- sleeping puppy\n- dog with ball\n- living room\n- grey poodle", "dogs"),
        ("- zebra herd\n- pedestrian crossing\n- striped shirt\n- piano keys\n- tall grass", "black and white stripes"),
    ]
    return _asked(task, examples, "\n".join(f"- {label}" for label in labels))


def narrow(labels: str) -> list[Message]:
    """The prompt that asks for one label for a whole list."""
    task = f"Reply with a single label of 1 to {_WORDS} words, without commas, that stands for the whole list."
    return _asked(task, [("oak, pine, birch leaf", "trees")], labels)


# -- by counting --------------------------------------------------------------------------------------------------

_NO_ENDS = frozenset(
    [
        *("a", "an", "the", "this", "that", "its", "some", "many", "several", "two", "three", "close", "up", "next"),
        *("of", "on", "in", "at", "by", "for", "to", "with", "as", "from", "into", "over", "under", "near"),
        *("and", "or", "is", "are", "be", "it", "there", "image", "picture", "photo", "photograph"),
    ]
)
_BREAK = re.compile(r"[,.;:!?()\n]")
_LONGEST = 3


@dataclass(frozen=True)
class FrequentPhrases:
    """Proposes the phrases that most captions share, without a model: equal captions always give equal candidates.

    A phrase is a sequence of up to three words of a caption that neither begins nor ends with a word like “of”;
    singular and plural count as one. A phrase's score is the number of captions that contain it plus 0.2 for each word
    after the first, so that the more specific of two similarly frequent phrases wins. A phrase inside a selected phrase
    is skipped if it is not more frequent.

    Attributes:
        rounds: Maximum number of phrases.
    """

    rounds: int = ROUNDS

    name = "frequent"

    def identity(self) -> dict[str, object]:
        """Everything that determines the candidates, except the captions."""
        return {"frequent": 1, "rounds": self.rounds}

    def candidates(self, captions: Sequence[str]) -> list[str]:
        """The phrases with the highest scores, best first; “something” if there are none."""
        counts: Counter[tuple[str, ...]] = Counter()
        texts_of: dict[tuple[str, ...], Counter[str]] = {}
        for caption in captions:
            inside = phrases(caption)
            counts.update(inside.keys())
            for key, text in inside.items():
                texts_of.setdefault(key, Counter())[text] += 1
        order = sorted(counts, key=lambda key: (-counts[key] - (len(key) - 1) / 5, -len(key), key))
        chosen: list[tuple[str, ...]] = []
        for key in order:
            if len(chosen) == self.rounds:
                break
            if not any(_within(key, other) and counts[key] <= counts[other] for other in chosen):
                chosen.append(key)
        texts = [min(texts_of[key], key=lambda text: (-texts_of[key][text], text)) for key in chosen]
        return variants(texts) or ["something"]


def phrases(caption: str) -> Mapping[tuple[str, ...], str]:
    """The phrases of a caption: words in the singular → the phrase as written."""
    written: dict[tuple[str, ...], str] = {}
    for clause in _BREAK.split(caption.lower()):
        words = re.findall(r"[\w'-]+", clause)
        for start in range(len(words)):
            for stop in range(start + 1, min(start + _LONGEST, len(words)) + 1):
                part = words[start:stop]
                if part[0] not in _NO_ENDS and part[-1] not in _NO_ENDS:
                    written.setdefault(tuple(map(_singular, part)), " ".join(part))
    return written


def _singular(word: str) -> str:
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith(("ches", "shes", "xes", "sses")):
        return word[:-2]
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")) else word


def _within(part: tuple[str, ...], whole: tuple[str, ...]) -> bool:
    return any(whole[start : start + len(part)] == part for start in range(len(whole) - len(part) + 1))
