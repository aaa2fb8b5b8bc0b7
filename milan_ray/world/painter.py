"""The world's text-to-image generator: selects scenes that match a text; needs no weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import torch

from milan_ray.world.lexicon import CONCEPT, concepts_in
from milan_ray.world.scenes import WORLD_VERSION, concept_maps, make_scene, render

FIRST = 3_000_000
"""Index of the first scene to search, beyond the scenes of all probes, trainings and tests."""

VISIBLE = 0.01
"""Minimum fraction of a scene that a concept must cover: one in six scenes with something red has few red pixels."""

BLOCK = 1024
"""Minimum number of scenes that are searched for a text and a seed."""


def seen(maps: Mapping[str, np.ndarray]) -> set[str]:
    """The concepts that are clearly visible in a scene.

    Args:
        maps: Concept → bool (64, 64), where it is visible.
    """
    return {name for name, shown in maps.items() if CONCEPT[name].kind == "part" or shown.mean() >= VISIBLE}


class ScenePainter:
    """Renders scenes in which the concepts of a text are clearly visible.

    A concept must cover at least 1 % of a scene, except for parts, which are small. The painter searches a limited
    number of scenes for those that show all concepts of the text. If there are too few, it adds the scenes that show
    most of them. For a text without concepts, it takes any scenes.

    Attributes:
        name: The painter's name.
        split: The split of the scenes.
    """

    name = "world/painter"
    split = "heldout"

    def identity(self) -> dict[str, object]:
        """Everything that determines the images, except text, count and seed."""
        return {"painter": 2, "world": WORLD_VERSION, "split": self.split}

    def to(self, device: torch.device) -> ScenePainter:
        """Returns itself, because it has no weights to move."""
        return self

    def generate(self, text: str, count: int, seed: int) -> np.ndarray:
        """Renders scenes for a text; the same arguments give the same scenes.

        Args:
            text: Words of the world's lexicon.
            count: Number of scenes.
            seed: Random seed; other seeds give other scenes.

        Returns:
            uint8 (count, 64, 64, 3).
        """
        wanted = concepts_in(text)
        # Texts that name the same concepts get the same scenes, so that their wording does not affect a comparison.
        key = hashlib.sha256(" ".join(sorted(wanted)).encode()).digest()
        first = FIRST + (int.from_bytes(key[:4], "big") % 1000 + 1000 * seed) * BLOCK
        candidates: list[tuple[int, int]] = []  # (concepts missed, index)
        complete = 0
        for index in range(first, first + max(BLOCK, 4 * count)):
            missed = len(wanted - seen(concept_maps(make_scene(self.split, index))))
            candidates.append((missed, index))
            complete += not missed
            if complete == count:
                break
        chosen = [index for _, index in sorted(candidates)[:count]]
        return np.stack([render(make_scene(self.split, index)) for index in chosen])
