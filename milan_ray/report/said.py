"""Counts of what the main labeler says of a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from milan_ray.report.layers import LayerSummary


def what_is_said(layers: Sequence[LayerSummary]) -> dict[str, int]:
    """Counts what the main labeler says of a model: distinct descriptions, and units that say nothing.

    Returns:
        ``distinct``; ``nothing``, units described as "Nothing"; ``empty``, units with a description without a word.
    """
    said: Counter[str] = Counter()
    for layer in layers:
        said.update(dict(layer.said))
    return {
        "distinct": len(said),
        "nothing": sum(units for text, units in said.items() if text.strip(" .").lower() == "nothing"),
        "empty": sum(units for text, units in said.items() if not text.strip()),
    }
