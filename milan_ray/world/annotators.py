"""The world's annotators: three simulated people who describe units, with part-of-speech tags and syntactic heads.

Their input is the exemplars and their masks, as for people. The content of the images comes from the scenes' concept
maps. Like people, the annotators use synonyms, are often vague and are sometimes wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random

import numpy as np

from milan_ray.world.lexicon import CONCEPT, NAMES, names_of, plural, tags
from milan_ray.world.scenes import GROUNDS, SIDE, SIGN_WORDS, SKIES, WHOLES, concept_maps, make_scene

PERSONAS = ("object-first", "colour-and-texture-first", "terse")
"""The annotators: the first names objects, the second colours and textures, and the third writes short descriptions."""

GENERIC_SHARE = 0.25
"""Fraction of unspecific descriptions; without them, λ would have no effect."""

ERROR_SHARE = 0.10
"""Fraction of wrong descriptions."""

NOUNS = names_of("object", "face", "part", "background", "text")
"""Concepts that can be the main noun of a description; other concepts only modify it."""

_WHOLES = {**WHOLES, **dict.fromkeys(names_of("text"), ("sign",))}

_ENOUGH = 0.3
"""Minimum evidence for mentioning a concept, nats."""

_GENERIC = (
    "shapes",
    "dark areas",
    "bright areas",
    "edges",
    "random objects",
    "different things",
    "various patterns",
    "lines",
)
_STUFF = ("areas", "surfaces", "regions", "patterns")


@dataclass(frozen=True)
class Annotation:
    """One annotator's description of one unit.

    Attributes:
        annotator: The author, one of :data:`PERSONAS`.
        text: The description.
        tokens: Its words.
        tags: Universal part-of-speech tags, one per token.
        heads: Position of each token's syntactic head, counted from 1; 0 for the root (CoNLL-U).
    """

    annotator: str
    text: str
    tokens: tuple[str, ...]
    tags: tuple[str, ...]
    heads: tuple[int, ...]


@dataclass(frozen=True)
class _Phrase:
    """Words with a dependency tree; heads are 0-based within the phrase, and the root is its own head."""

    words: tuple[str, ...]
    tags: tuple[str, ...]
    heads: tuple[int, ...]

    @property
    def root(self) -> int:
        return next(i for i, head in enumerate(self.heads) if i == head)

    def __add__(self, other: _Phrase) -> _Phrase:
        """Concatenates both phrases; the other's root depends on this one's."""
        shift = len(self.words)
        heads = [self.root if i == head else head + shift for i, head in enumerate(other.heads)]
        return _Phrase(self.words + other.words, self.tags + other.tags, self.heads + tuple(heads))

    def before(self, other: _Phrase) -> _Phrase:
        """Concatenates both phrases; this one's root depends on the other's."""
        shift = len(self.words)
        root = other.root + shift
        heads = [root if i == head else head for i, head in enumerate(self.heads)]
        return _Phrase(
            self.words + other.words, self.tags + other.tags, tuple(heads) + tuple(h + shift for h in other.heads)
        )


Draw = Callable[[], float]
"""Returns uniform random numbers in [0, 1)."""


def _word(word: str, tag: str) -> _Phrase:
    return _Phrase((word,), (tag,), (0,))


@lru_cache(maxsize=1)
def _world_shares() -> dict[str, float]:
    """The fraction of pixels that each concept covers, over 400 scenes of the world."""
    totals = dict.fromkeys(NAMES, 0.0)
    scenes = 400
    for index in range(scenes):
        for name, shown in concept_maps(make_scene("train", index)).items():
            totals[name] += float(shown.mean()) / scenes
    return totals


@dataclass(frozen=True)
class Evidence:
    """Evidence of a unit's exemplars for each concept that occurs in them.

    The evidence for a concept is c · (ln c/i + ln c/w) / 2. Here c is the concept's share of the masked pixels, i its
    share of the exemplars' pixels, and w its share of the world's pixels. The terms measure how specific the masks are
    within the images and within the world. Shares are smoothed by 0.01.

    Attributes:
        masked: Concept → c.
        shown: Concept → i.
        nats: Concept → evidence.
    """

    masked: dict[str, float]
    shown: dict[str, float]
    nats: dict[str, float]


def evidence(masks: np.ndarray, maps: Sequence[Mapping[str, np.ndarray]]) -> Evidence:
    """Computes the evidence from a unit's exemplars; all images with a non-empty mask have the same weight.

    Args:
        masks: bool (k, H, W), any resolution.
        maps: Concept maps of the k images, bool (64, 64).
    """
    rows = np.arange(SIDE) * masks.shape[1] // SIDE
    columns = np.arange(SIDE) * masks.shape[2] // SIDE
    masks = masks[:, rows[:, None], columns]
    pairs = [(mask, shown) for mask, shown in zip(masks, maps, strict=True) if mask.any()]
    masked: dict[str, float] = {}
    shown: dict[str, float] = {}
    for mask, truth in pairs:
        for name, where in truth.items():
            masked[name] = masked.get(name, 0.0) + float(where[mask].mean()) / len(pairs)
            shown[name] = shown.get(name, 0.0) + float(where.mean()) / len(pairs)
    world = _world_shares()
    smooth = 0.01
    nats = {
        name: share * (math.log(share + smooth) - 0.5 * math.log((shown[name] + smooth) * (world[name] + smooth)))
        for name, share in masked.items()
    }
    return Evidence(masked, shown, nats)


def annotate_unit(masks: np.ndarray, maps: Sequence[Mapping[str, np.ndarray]], key: str) -> list[Annotation]:
    """Describes a unit from its exemplars.

    Args:
        masks: bool (k, H, W), the exemplars' masks, any resolution.
        maps: Concept maps of the exemplars' images (``Probe.concept_maps``), bool (64, 64).
        key: Identifier of the unit, e.g. ``world/cnn/conv3/17``. The same key and exemplars give the same descriptions.

    Returns:
        One annotation per persona.
    """
    content = _content(evidence(masks, maps))
    return [_annotate(persona, content, Random(f"{key}/{persona}").random) for persona in PERSONAS]


def specimens(count: int, seed: int = 0) -> list[Annotation]:
    """Generates random descriptions, independent of units and images, that cover all words and constructions.

    They are training data for a tagger and a parser of the annotators' language.

    Args:
        count: Number of descriptions.
        seed: Random seed.
    """
    annotations = []
    for number in range(count):
        draw = Random(f"specimen/{seed}/{number}").random

        def pick(names: Sequence[str], draw: Draw = draw) -> str:
            return names[int(draw() * len(names))]

        noun = pick(NOUNS)
        looks = [pick(names_of(kind)) for kind in ("colour", "texture") if draw() < 0.5]
        second = pick(_companions(noun)) if draw() < 0.5 else None
        relation = pick(names_of("relation")) if draw() < 0.5 and CONCEPT[noun].kind in ("object", "face") else None
        content = _Content(
            noun if draw() < 0.9 or not looks else None, second, relation, tuple(looks), bool(looks) and draw() < 0.5
        )
        annotations.append(_annotate(PERSONAS[number % len(PERSONAS)], content, draw))
    return annotations


@dataclass(frozen=True)
class _Content:
    """Content of a description: main noun, second noun, relation, and colours and textures, strongest first."""

    noun: str | None
    second: str | None
    relation: str | None
    looks: tuple[str, ...]
    look_leads: bool

    @property
    def concepts(self) -> frozenset[str]:
        return frozenset(filter(None, (self.noun, self.second, self.relation, *self.looks)))


def _content(clues: Evidence) -> _Content:
    def best(names: Sequence[str], share: float = 0.0) -> str | None:
        name = max(names, key=lambda name: clues.nats.get(name, 0.0))
        return name if clues.nats.get(name, 0.0) >= _ENOUGH and clues.masked[name] > share else None

    thing = best(NOUNS)
    noun = _detail(thing, clues) if thing else None
    second = thing if noun != thing else best(_companions(thing), share=0.15) if thing else None
    looks = [look for kind in ("colour", "texture") if (look := best(names_of(kind), share=0.4))]
    looks.sort(key=lambda look: -clues.nats[look])
    big = noun is not None and CONCEPT[noun].kind in ("object", "face")
    relation = best(names_of("relation"), share=0.5) if big else None
    look_leads = bool(looks) and (thing is None or clues.nats[looks[0]] > clues.nats[thing])
    return _Content(noun, second, relation, tuple(looks), look_leads)


def _detail(thing: str, clues: Evidence) -> str:
    """The part of a thing that has enough evidence and at least twice the thing's mask density; otherwise the thing."""
    enough = 0.45 * clues.nats[thing]
    details = [name for name, wholes in _WHOLES.items() if thing in wholes and clues.nats.get(name, 0.0) > enough]
    focus = {
        name: (clues.masked[name] / clues.masked[thing]) / (clues.shown[name] / clues.shown[thing]) for name in details
    }
    details = [name for name in details if focus[name] >= 2]
    return max(details, key=lambda name: clues.nats[name], default=thing)


def _companions(noun: str) -> tuple[str, ...]:
    """Concepts that can be named alongside a noun: a part's wholes, the sign around a word, other things."""
    things = names_of("object", "face")
    if noun in _WHOLES:
        return _WHOLES[noun]
    if noun in (*SKIES, "sky"):
        return (*GROUNDS, "ground", *things)
    if noun in (*GROUNDS, "ground"):
        return (*SKIES, "sky", *things)
    return tuple(name for name in (*things, *names_of("background")) if name != noun)


def _annotate(persona: str, content: _Content, draw: Draw) -> Annotation:
    chance = draw()
    if chance < ERROR_SHARE:
        wrong = [name for name in NOUNS if name not in content.concepts]
        phrase = _noun(wrong[int(draw() * len(wrong))], draw)
    elif chance < ERROR_SHARE + GENERIC_SHARE or not (content.noun or content.looks):
        phrase = _vague(draw)
    else:
        phrase = _WRITE[persona](content, draw)
    heads = tuple(0 if i == head else head + 1 for i, head in enumerate(phrase.heads))
    return Annotation(persona, " ".join(phrase.words), phrase.words, phrase.tags, heads)


def _object_first(content: _Content, draw: Draw) -> _Phrase:
    if content.noun is None:
        return _look_first(content, draw)
    if content.relation and draw() < 0.3:
        return _related(content.noun, content.relation, draw)
    looks = content.looks[:1] if draw() < 0.8 else ()
    if content.second is None:
        return _noun(content.noun, draw, looks)
    kind = CONCEPT[content.noun].kind
    if kind in ("part", "text"):
        first = _noun(content.noun, draw, many=True if kind == "text" else None)
        link = _word("of" if kind == "part" else "on", "ADP")
        return first + link.before(_noun(content.second, draw, looks, many=True))
    first = _noun(content.noun, draw, looks, many=True)
    return first + _word("and", "CCONJ").before(_noun(content.second, draw, many=True))


def _look_first(content: _Content, draw: Draw) -> _Phrase:
    if not content.looks:
        assert content.noun is not None  # otherwise the description is vague
        return _noun(content.noun, draw)
    first, *others = (_adjective(look, draw) for look in content.looks)
    looks = first + _word("and", "CCONJ").before(others[0]) if others else first
    if content.noun and draw() < 0.5:
        return looks.before(_noun(content.noun, draw, many=True))
    stuff = looks.before(_word(_STUFF[int(draw() * len(_STUFF))], "NOUN"))
    if content.noun and draw() < 0.5:
        return stuff + _word("on", "ADP").before(_noun(content.noun, draw, many=True))
    return stuff


def _terse(content: _Content, draw: Draw) -> _Phrase:
    if content.noun is None or content.look_leads:
        return _adjective(content.looks[0], draw)
    return _noun(content.noun, draw, many=draw() < 0.7, article=False)


_WRITE: dict[str, Callable[[_Content, Draw], _Phrase]] = {
    "object-first": _object_first,
    "colour-and-texture-first": _look_first,
    "terse": _terse,
}


def _related(noun: str, relation: str, draw: Draw) -> _Phrase:
    """Small things in a relation to a big one: "things on top of houses"."""
    term = _synonym(relation, draw)
    words, kinds = term.split(), tags(CONCEPT[relation], term)
    first, big = _word("things", "NOUN"), _noun(noun, draw, many=True)
    if len(words) == 1:
        return first + _word(words[0], kinds[0]).before(big)
    # In a fixed expression, the middle word is the head: "on TOP of houses", "LEFT of houses".
    *ahead, middle, last = (_word(word, kind) for word, kind in zip(words, kinds, strict=True))
    pivot = middle + last.before(big)
    for word in reversed(ahead):
        pivot = word.before(pivot)
    return first + pivot


def _synonym(concept: str, draw: Draw) -> str:
    """A random synonym; the plainest term is more frequent than all others together."""
    terms = CONCEPT[concept].synonyms
    return terms[0] if draw() < 0.6 else terms[int(draw() * len(terms))]


def _adjective(concept: str, draw: Draw) -> _Phrase:
    return _word(_synonym(concept, draw), "ADJ")


def _noun(
    concept: str, draw: Draw, looks: Sequence[str] = (), many: bool | None = None, article: bool = True
) -> _Phrase:
    """A noun with its adjectives: plural, or singular with an optional article; ``many`` None chooses at random."""
    if concept in SIGN_WORDS:
        return _word("the", "DET").before(_word("word", "NOUN")) + _word(concept, "NOUN")
    term = _synonym(concept, draw)
    if many is None:
        many = draw() < 0.7
    words = (plural(term) if many else term).split()
    kinds = tags(CONCEPT[concept], term)
    phrase = _word(words[-1], kinds[-1])
    for word, kind in zip(words[:-1][::-1], kinds[:-1][::-1], strict=True):
        phrase = _word(word, kind).before(phrase)
    for look in looks:
        phrase = _adjective(look, draw).before(phrase)
    return _word("the", "DET").before(phrase) if article and not many else phrase


def _vague(draw: Draw) -> _Phrase:
    *adjectives, noun = _GENERIC[int(draw() * len(_GENERIC))].split()
    phrase = _word(noun, "NOUN")
    return _word(adjectives[0], "ADJ").before(phrase) if adjectives else phrase
