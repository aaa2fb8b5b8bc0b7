"""Defects of the reference in loading and merging MILANNOTATIONS; switch them on to reproduce its results."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Quirks:
    """Selects the defects of the reference to reproduce.

    Attributes:
        merge_geometry: Source images are squashed to the masks' size, although masks were computed on centre crops.
        digit_layers_lose_annotations: Without an ``annotation_count``, layers named by digits lose their annotations.
        lookup_by_position: A unit is looked up by its position in the arrays; ``units.npy`` is ignored.
    """

    merge_geometry: bool = False
    digit_layers_lose_annotations: bool = False
    lookup_by_position: bool = False


NO_QUIRKS = Quirks()
REFERENCE = Quirks(merge_geometry=True, digit_layers_lose_annotations=True, lookup_by_position=True)
