"""The reference's defects in loading and merging MILANNOTATIONS: off by default, on to reproduce its results."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Quirks:
    """Which of the reference's defects to reproduce.

    Attributes:
        merge_geometry: Source images are squashed to the masks' size, whereas masks were computed on centre crops.
        digit_layers_lose_annotations: Without an ``annotation_count``, layers named by digits have no annotations.
        lookup_by_position: A unit is looked up by its position in the arrays, whatever ``units.npy`` says.
    """

    merge_geometry: bool = False
    digit_layers_lose_annotations: bool = False
    lookup_by_position: bool = False


NO_QUIRKS = Quirks()
REFERENCE = Quirks(merge_geometry=True, digit_layers_lose_annotations=True, lookup_by_position=True)
