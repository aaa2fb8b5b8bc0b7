"""Lists of concepts that come with the package, by name."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

EVERYDAY = "photos/everyday"
"""About 3,500 everyday words for what photographs show: colours, textures, materials, parts, animals, plants, food,
people, things, scenes. Written for this package."""

CONCEPT_LISTS = {EVERYDAY: Path(__file__).with_name("everyday.txt")}
"""Name → file: kinds in lines that begin with ``# ``, and the words of each, one per line."""


@cache
def concepts_by_kind(name: str) -> Mapping[str, tuple[str, ...]]:
    """The words of a list by kind, in the file's order.

    Args:
        name: One of :data:`CONCEPT_LISTS`.
    """
    kinds: dict[str, list[str]] = {}
    for line in CONCEPT_LISTS[name].read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            words = kinds.setdefault(line.removeprefix("# "), [])
        elif line:
            words.append(line)
    return {kind: tuple(words) for kind, words in kinds.items()}


def concept_list(name: str) -> tuple[str, ...]:
    """The words of a list, kind by kind.

    Args:
        name: One of :data:`CONCEPT_LISTS`.
    """
    return tuple(word for words in concepts_by_kind(name).values() for word in words)
