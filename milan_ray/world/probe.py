"""Probes of the world's scenes, which are rendered when read instead of stored in files."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from PIL import Image

from milan_ray.errors import MilanError
from milan_ray.probe.base import ImageRef, ProbeImage
from milan_ray.schema import MANIFEST
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
"""Hash of the world's version: part of every manifest and of the name of the weights' folder."""


@dataclass(frozen=True)
class WorldProbe:
    """A probe of the scenes of one split.

    Attributes:
        split: ``train``, ``probe`` or ``heldout``.
        size: Number of scenes.
        blur_faces: Whether faces are blurred out.
        spurious: The spurious feature in a corner: ``text``, ``colour`` or "" (:class:`SceneOptions`).
        share: Fraction of the scenes with the spurious feature.
        misleading: Whether the spurious feature shows another class.
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
        """The rendering options of the scenes."""
        return SceneOptions(self.blur_faces, self.spurious, self.share, self.misleading)

    def scene(self, image_id: int) -> Scene:
        """The scene of an image."""
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
        """Renders one scene; its digest is that of the pixels."""
        pixels = render(self.scene(int(ref.path)))
        return ProbeImage(Image.fromarray(pixels), hashlib.sha256(pixels.tobytes()).hexdigest())

    def concept_maps(self, ref: ImageRef) -> dict[str, np.ndarray]:
        """Ground truth of a scene: concept name → bool (64, 64), only for visible concepts."""
        return concept_maps(self.scene(int(ref.path)))
