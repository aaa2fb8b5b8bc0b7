"""The world's lexicon: every concept that a scene can contain, its kind, and its synonyms."""

from __future__ import annotations

import re
from dataclasses import dataclass

KINDS = ("object", "part", "colour", "texture", "background", "text", "relation", "face")

# Universal Dependencies tags: those of each kind of concept except nouns, then those of terms of mixed parts of speech.
_OF_KIND = {"colour": "ADJ", "texture": "ADJ", "relation": "ADP"}
_TAGS = {
    "clear sky": ("ADJ", "NOUN"),
    "cloudy sky": ("ADJ", "NOUN"),
    "left of": ("ADV", "ADP"),
    "on top of": ("ADP", "NOUN", "ADP"),
}
_UNCOUNTED = frozenset(
    [
        *("sky", "heavens", "dusk", "twilight", "daytime", "night"),
        *("ground", "terrain", "grass", "turf", "sand", "desert", "water", "sea", "road", "asphalt"),
        *("writing", "text"),
    ]
)
_IRREGULAR = {"person": "people"}


@dataclass(frozen=True)
class Concept:
    """A concept that a scene can show.

    Attributes:
        name: Name in concept maps.
        kind: One of :data:`KINDS`.
        synonyms: The annotators' terms for it, in the singular, the plainest first. A word on a sign has only one: the
            word itself.
    """

    name: str
    kind: str
    synonyms: tuple[str, ...]


def _concepts(kind: str, **synonyms: str) -> list[Concept]:
    return [Concept(name.replace("_", " "), kind, tuple(terms.split(", "))) for name, terms in synonyms.items()]


CONCEPTS: tuple[Concept, ...] = (
    *_concepts(
        "object",
        house="house, home, building, cottage",
        tree="tree, bush",
        car="car, automobile, vehicle",
        boat="boat, ship, sailboat",
    ),
    *_concepts("face", face="face, person, portrait"),
    *_concepts(
        "object",
        animal="animal, dog, creature",
        flower="flower, blossom, bloom",
        sign="sign, signboard, placard",
        cup="cup, mug",
        ball="ball, sphere",
        lamp="lamp, lantern",
        bird="bird, songbird",
    ),
    *_concepts(
        "part",
        roof="roof, rooftop",
        door="door, doorway",
        window="window, pane",
        trunk="trunk, log",
        wheel="wheel, tire",
        hull="hull, bow",
        sail="sail, canvas",
        eye="eye, pupil",
        mouth="mouth, lip",
        leg="leg, limb",
        petal="petal, floret",
        post="post, pole",
        handle="handle, grip",
        shade="lampshade, shade",
        wing="wing, feather",
    ),
    *_concepts(
        "colour",
        red="red, crimson, scarlet",
        yellow="yellow, golden",
        green="green, emerald",
        blue="blue, azure",
        purple="purple, violet",
        brown="brown, tan",
        white="white, ivory",
        black="black, ebony",
    ),
    *_concepts(
        "texture",
        plain="plain, solid, uniform",
        striped="striped, stripy",
        dotted="dotted, spotted",
        checkered="checkered, checked",
    ),
    *_concepts(
        "background",
        sky="sky, heavens",
        ground="ground, terrain",
        day="clear sky, daytime",
        dusk="dusk, twilight",
        night="night, star",
        clouds="cloud, cloudy sky",
        grass="grass, lawn, turf",
        sand="sand, beach, desert",
        water="water, sea, lake",
        road="road, street, asphalt",
    ),
    *_concepts("text", text="word, text, letter, writing"),
    *_concepts("text", stop="stop", open="open", exit="exit", cafe="cafe", taxi="taxi", sale="sale"),
    *_concepts("relation", left_of="left of, beside", above="above, over", on="on top of, atop"),
)
"""All concepts, in the order of all arrays over concepts."""

CONCEPT: dict[str, Concept] = {concept.name: concept for concept in CONCEPTS}
"""Concepts by name."""

NAMES: tuple[str, ...] = tuple(CONCEPT)
"""All concept names."""


def names_of(*kinds: str) -> tuple[str, ...]:
    """Names of the concepts of the given kinds, in order."""
    return tuple(concept.name for concept in CONCEPTS if concept.kind in kinds)


def plural(term: str) -> str:
    """The plural of a noun; uncountable nouns stay unchanged."""
    if term.split()[-1] in _UNCOUNTED:
        return term
    if term in _IRREGULAR:
        return _IRREGULAR[term]
    if term.endswith(("s", "x", "ch", "sh")):
        return term + "es"
    if term.endswith("y") and term[-2] not in "aeiou":
        return term[:-1] + "ies"
    return term + "s"


def tags(concept: Concept, term: str) -> tuple[str, ...]:
    """Universal part-of-speech tags of a concept's term, one per word."""
    return _TAGS.get(term) or (_OF_KIND.get(concept.kind, "NOUN"),) * len(term.split())


def _phrases() -> dict[tuple[str, ...], set[str]]:
    phrases: dict[tuple[str, ...], set[str]] = {}
    for concept in CONCEPTS:
        for term in concept.synonyms:
            forms = {term}
            if concept.kind not in _OF_KIND:
                forms.add(plural(term))
            for form in forms:
                phrases.setdefault(tuple(form.split()), set()).add(concept.name)
    return phrases


_PHRASES = _phrases()
_LONGEST = max(map(len, _PHRASES))


def concepts_in(text: str) -> frozenset[str]:
    """The concepts that a description names.

    Args:
        text: A description; case and punctuation are ignored.

    Returns:
        Names of the concepts with a synonym, in the singular or plural, that occurs in the text as whole words.
    """
    words = re.findall(r"[a-z]+", text.lower())
    concepts: set[str] = set()
    for start in range(len(words)):
        for stop in range(start + 1, min(start + _LONGEST, len(words)) + 1):
            concepts |= _PHRASES.get(tuple(words[start:stop]), set())
    return frozenset(concepts)
