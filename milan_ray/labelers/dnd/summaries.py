"""From captions of a unit's images to candidate labels (Bai et al., TMLR 2025): a language model, or counting.

The wording of the prompts is this project's own.
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
"""How often a unit's captions are summarised."""

PROMPTS_VERSION = 1
"""Part of every hash of candidates: raised when the prompts or what is done with answers change."""

_WORDS = 5
_ADDED = ("design", "designs", "graphic", "graphics")


class Summariser(Protocol):
    """Something that says what captions have in common."""

    @property
    def name(self) -> str:
        """Its name in messages."""

    def identity(self) -> dict[str, object]:
        """All that decides its candidates besides the captions."""

    def candidates(self, captions: Sequence[str]) -> list[str]:
        """Candidate labels of the unit whose images are captioned so; no two alike, at least one.

        Raises:
            MilanError: A model it asks does not answer.
        """


def tidy(answer: str) -> str:
    """A label out of an answer: the last line that says something, after a colon; lower case, no quotes, no stop."""
    lines = [line for line in answer.strip().splitlines() if line.strip()]
    text = lines[-1] if lines else ""
    text = text.rpartition(":")[2] or text.replace(":", "")
    return " ".join(text.strip().strip("\"'`*“”‘’. ").lower().split())


def variants(labels: Sequence[str]) -> list[str]:
    """The labels, each once; after one that ends in a design or graphic, the same with “background”.

    What such a label means, an image generator tends to draw as a thing on a table.
    """
    found: dict[str, None] = {}
    for label in labels:
        if label:
            found[label] = None
            if label.split()[-1] in _ADDED:
                found[f"{label} background"] = None
    return list(found)


# -- by a language model --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompted:
    """Asks a language model: for the concept behind each caption, then for what the concepts share.

    Attributes:
        chat: The model.
        rounds: How often it is asked to summarise, each time with the captions in another order.
    """

    chat: Chat
    rounds: int = ROUNDS

    @property
    def name(self) -> str:
        """The model's name."""
        return self.chat.name

    def identity(self) -> dict[str, object]:
        """All that decides its candidates besides the captions."""
        return {"prompts": PROMPTS_VERSION, "rounds": self.rounds, "chat": self.chat.identity()}

    def candidates(self, captions: Sequence[str]) -> list[str]:
        """Candidate labels: one per round at most; a unit of which the model says nothing gets its commonest phrase."""
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
    """Asks what a caption is about."""
    task = (
        f"You turn captions of pictures into labels. Reply with one label of 1 to {_WORDS} words: the thing, texture, "
        "colour or scene that the caption is about. No sentence, no explanation."
    )
    example = "Caption: two kids in yellow raincoats jumping into a puddle on a rainy day", "children jumping in puddle"
    return _asked(task, [example], f"Caption: {caption}")


def summarise(labels: Sequence[str]) -> list[Message]:
    """Asks what most of some labels have in common."""
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
    """Asks for one label in place of a list."""
    task = f"Reply with a single label of 1 to {_WORDS} words, without commas, that stands for the whole list."
    return _asked(task, [("oak, pine, birch leaf", "trees")], labels)


# -- by counting ----------------------------------------------------------------------------------------------

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
    """Proposes the phrases that most captions share. No model: the same captions always give the same candidates.

    A phrase is up to three words of a caption in a row that neither begins nor ends with a word like “of”; singular and
    plural are one. It counts in every caption that holds it; each further word is worth a fifth of a caption, so that
    of phrases that are about as common the one that says more wins. What lies inside a chosen one and is no commoner is
    left out.

    Attributes:
        rounds: Candidates at most.
    """

    rounds: int = ROUNDS

    name = "frequent"

    def identity(self) -> dict[str, object]:
        """All that decides its candidates besides the captions."""
        return {"frequent": 1, "rounds": self.rounds}

    def candidates(self, captions: Sequence[str]) -> list[str]:
        """The commonest phrases, the first of them first; where no caption holds a word, “something”."""
        found: Counter[tuple[str, ...]] = Counter()
        said: dict[tuple[str, ...], Counter[str]] = {}
        for caption in captions:
            inside = phrases(caption)
            found.update(inside.keys())
            for key, text in inside.items():
                said.setdefault(key, Counter())[text] += 1
        order = sorted(found, key=lambda key: (-found[key] - (len(key) - 1) / 5, -len(key), key))
        chosen: list[tuple[str, ...]] = []
        for key in order:
            if len(chosen) == self.rounds:
                break
            if not any(_within(key, other) and found[key] <= found[other] for other in chosen):
                chosen.append(key)
        texts = [min(said[key], key=lambda text: (-said[key][text], text)) for key in chosen]
        return variants(texts) or ["something"]


def phrases(caption: str) -> Mapping[tuple[str, ...], str]:
    """The phrases of a caption: their words in the singular → as they are written."""
    found: dict[tuple[str, ...], str] = {}
    for clause in _BREAK.split(caption.lower()):
        words = re.findall(r"[\w'-]+", clause)
        for start in range(len(words)):
            for stop in range(start + 1, min(start + _LONGEST, len(words)) + 1):
                part = words[start:stop]
                if part[0] not in _NO_ENDS and part[-1] not in _NO_ENDS:
                    found.setdefault(tuple(map(_singular, part)), " ".join(part))
    return found


def _singular(word: str) -> str:
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith(("ches", "shes", "xes", "sses")):
        return word[:-2]
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")) else word


def _within(part: tuple[str, ...], whole: tuple[str, ...]) -> bool:
    return any(whole[start : start + len(part)] == part for start in range(len(whole) - len(part) + 1))
