"""Scenes for a text: the world's generator of images, which needs no weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import torch

from milan_ray.world.lexicon import CONCEPT, concepts_in
from milan_ray.world.scenes import WORLD_VERSION, concept_maps, make_scene, render

FIRST = 3_000_000
"""Index of the first scene it looks at, beyond those of all probes, trainings and tests."""

VISIBLE = 0.01
"""Share of a scene that a concept must cover to be shown: one in six scenes with something red has a few red pixels."""

BLOCK = 1024
"""Scenes that a text and a seed choose from, at least."""


def seen(maps: Mapping[str, np.ndarray]) -> set[str]:
    """The concepts that one sees in a scene.

    Args:
        maps: Concept → bool (64, 64), where it shows.
    """
    return {name for name, shown in maps.items() if CONCEPT[name].kind == "part" or shown.mean() >= VISIBLE}


class ScenePainter:
    """Draws scenes that show what a text names, so that one sees it: parts, which are small, anywhere, all else on 1 %.

    It looks through as many scenes as it takes, up to a limit, for those that show all concepts that the text names;
    where there are too few, those that show most of them fill up. A text that names nothing gets any scenes.

    Attributes:
        name: Its name.
        split: The split of scenes that it draws from.
    """

    name = "world/painter"
    split = "heldout"

    def identity(self) -> dict[str, object]:
        """All that decides its images besides text, count and seed."""
        return {"painter": 2, "world": WORLD_VERSION, "split": self.split}

    def to(self, device: torch.device) -> ScenePainter:
        """Itself: there is nothing to move."""
        return self

    def generate(self, text: str, count: int, seed: int) -> np.ndarray:
        """Draws scenes; the same call gives the same ones.

        Args:
            text: Words of the world's lexicon.
            count: How many scenes.
            seed: Other seeds give other scenes.

        Returns:
            uint8 (count, 64, 64, 3).
        """
        wanted = concepts_in(text)
        # Texts that name the same concepts get the same scenes: what is compared is what they say, not how.
        key = hashlib.sha256(" ".join(sorted(wanted)).encode()).digest()
        first = FIRST + (int.from_bytes(key[:4], "big") % 1000 + 1000 * seed) * BLOCK
        found: list[tuple[int, int]] = []  # (concepts missed, index)
        complete = 0
        for index in range(first, first + max(BLOCK, 4 * count)):
            missed = len(wanted - seen(concept_maps(make_scene(self.split, index))))
            found.append((missed, index))
            complete += not missed
            if complete == count:
                break
        chosen = [index for _, index in sorted(found)[:count]]
        return np.stack([render(make_scene(self.split, index)) for index in chosen])
