"""The world as a probe: images without files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from PIL import Image

from milan_ray.errors import MilanError
from milan_ray.probe.base import ImageRef, ProbeImage
from milan_ray.schema import MANIFEST
from milan_ray.world.lexicon import NAMES
from milan_ray.world.scenes import (
    SPLITS,
    SPURIOUS,
    WORLD_VERSION,
    Scene,
    SceneOptions,
    concept_maps,
    make_scene,
    render,
)

WORLD_DIGEST = hashlib.sha256(f"milan_ray.world {WORLD_VERSION}".encode()).hexdigest()[:12]
"""Identity of the world's code: part of every manifest and of the folder of its weights."""


@dataclass(frozen=True)
class WorldProbe:
    """Scenes of one split, drawn when read.

    Attributes:
        split: ``train``, ``probe`` or ``heldout``.
        size: How many scenes.
        blur_faces: Faces are blurred out.
        spurious: What gives the class away in a corner: ``text``, ``colour`` or "" (:class:`SceneOptions`).
        share: Share of the scenes that have it.
        misleading: It speaks of another class.
    """

    split: str
    size: int
    blur_faces: bool = False
    spurious: str = ""
    share: float = 1.0
    misleading: bool = False

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise MilanError(f"the world has no split {self.split!r}; choose one of {', '.join(SPLITS)}.")
        if self.size < 1:
            raise MilanError(f"a world probe of {self.size} scenes is empty; give it a size of at least 1.")
        if self.spurious not in SPURIOUS:
            known = ", ".join(filter(None, SPURIOUS))
            raise MilanError(f"nothing spurious is called {self.spurious!r} in the world; choose one of {known}.")

    @property
    def name(self) -> str:
        """The probe's root and name, e.g. ``world:probe+blur-faces``."""
        options = "+blur-faces" * self.blur_faces
        if self.spurious:
            options += f"+spurious-{self.spurious}" + f"-{self.share:g}" * (self.share < 1)
            options += "+misleading" * self.misleading
        return f"world:{self.split}{options}"

    @property
    def options(self) -> SceneOptions:
        """How its scenes are shown."""
        return SceneOptions(self.blur_faces, self.spurious, self.share, self.misleading)

    def scene(self, image_id: int) -> Scene:
        """The scene behind an image."""
        return make_scene(self.split, image_id, self.options)

    def manifest(self) -> pa.Table:
        """Lists the scenes; image id, path and scene index are the same number."""
        rows = range(self.size)
        nothing = [None] * self.size
        return MANIFEST.table(
            {
                "image_id": list(rows),
                "root": [self.name] * self.size,
                "path": [str(row) for row in rows],
                "size": nothing,
                "mtime_ns": nothing,
                "etag": [WORLD_DIGEST] * self.size,
                "class_label": [self.scene(row).label for row in rows],
                "sha256": nothing,
            }
        )

    def read(self, ref: ImageRef) -> ProbeImage:
        """Draws one scene; its digest is that of the pixels."""
        pixels = render(self.scene(int(ref.path)))
        return ProbeImage(Image.fromarray(pixels), hashlib.sha256(pixels.tobytes()).hexdigest())

    def concept_maps(self, ref: ImageRef) -> dict[str, np.ndarray]:
        """The scene's truth: concept name → bool (64, 64), only for concepts that show."""
        return concept_maps(self.scene(int(ref.path)))


def concept_presence(probe: WorldProbe, image_ids: Sequence[int]) -> np.ndarray:
    """How much of each image every concept covers.

    Args:
        probe: Where the images come from.
        image_ids: N images.

    Returns:
        float32 (N, C) in [0, 1], columns as :data:`milan_ray.world.lexicon.NAMES`; 0 where a concept does not show.
    """
    shares = np.zeros((len(image_ids), len(NAMES)), dtype=np.float32)
    for row, image_id in enumerate(image_ids):
        maps = concept_maps(probe.scene(int(image_id)))
        for column, name in enumerate(NAMES):
            if name in maps:
                shares[row, column] = maps[name].mean()
    return shares
