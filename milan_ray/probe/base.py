"""Interfaces of probes: sets of images with stable ids, which any process in the cluster can read one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import torch
from PIL import Image


@dataclass(frozen=True)
class ImageRef:
    """The fields of a manifest row that are needed to read its image.

    Attributes:
        image_id: Row number in the manifest.
        root: The root that contains the image.
        path: Path relative to the root.
    """

    image_id: int
    root: str
    path: str

    @property
    def location(self) -> str:
        """The image's location, for messages."""
        return f"{self.root.rstrip('/')}/{self.path}"


@dataclass(frozen=True)
class ProbeImage:
    """A decoded probe image.

    Attributes:
        image: RGB, 8 bits, any size. It is shown to people and passed to RGB models.
        sha256: Hex digest of the bytes that it was decoded from.
        bands: The image with all its bands, if these are not RGB: a PIL image of 8 bits per band (grey, with alpha,
            CMYK), or uint8 (H, W, N). None for RGB.
        note: A warning that the decoded image may be wrong, to be printed once, or None.
    """

    image: Image.Image
    sha256: str
    bands: Image.Image | np.ndarray | None = None
    note: str | None = None

    @property
    def planes(self) -> list[Image.Image]:
        """The image's bands as grayscale images, in order."""
        if isinstance(self.bands, np.ndarray):
            return [Image.fromarray(np.ascontiguousarray(band)) for band in np.moveaxis(self.bands, -1, 0)]
        return list((self.image if self.bands is None else self.bands).split())


@runtime_checkable
class Source(Protocol):
    """The interface that all probes share.

    A probe must be small and picklable, because it is sent to every actor. The manifest is not sent.
    """

    @property
    def name(self) -> str:
        """The probe's name."""
        ...

    def manifest(self) -> pa.Table:
        """Lists the images, in a fixed order (schema :data:`milan_ray.schema.MANIFEST`).

        Raises:
            MilanError: There is nothing to list, or the location cannot be read.
        """
        ...

    def concept_maps(self, ref: ImageRef) -> dict[str, np.ndarray] | None:
        """Ground truth of one image: concept name → bool (H, W) in the image's own resolution; None if unknown."""
        ...


class ImageProbe(Source, Protocol):
    """A probe of images."""

    def read(self, ref: ImageRef) -> ProbeImage:
        """Reads and decodes one image.

        Raises:
            UnreadableImage: The image is missing, corrupt, empty or too large; the message states which.
        """
        ...


@runtime_checkable
class LatentProbe(Source, Protocol):
    """A probe of a generator's inputs; each manifest row stands for the image generated from that row's tensors."""

    def latents(self, refs: Sequence[ImageRef]) -> tuple[torch.Tensor, ...]:
        """The tensors of the given rows, in the order of the generator's arguments, each (len(refs), …), on the CPU.

        Raises:
            MilanError: A file was removed or changed.
        """
        ...


Probe = ImageProbe | LatentProbe
