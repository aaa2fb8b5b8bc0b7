"""What a probe is: a set of images with stable ids, read one by one anywhere in the cluster."""

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
    """One manifest row, as much of it as reading the image needs.

    Attributes:
        image_id: Row number in the manifest.
        root: The root it was found under.
        path: Path below the root.
    """

    image_id: int
    root: str
    path: str

    @property
    def location(self) -> str:
        """Where the image is, for messages."""
        return f"{self.root.rstrip('/')}/{self.path}"


@dataclass(frozen=True)
class ProbeImage:
    """A decoded probe image.

    Attributes:
        image: RGB, 8 bits, any size: what people see, and models that take RGB.
        sha256: Hex digest of the bytes it was decoded from.
        bands: The image with all its bands, where these are not RGB: a PIL image of 8 bits per band (grey, with alpha,
            CMYK), or uint8 (H, W, N); None for RGB.
        note: A doubt about how it was decoded, to be said once; None without.
    """

    image: Image.Image
    sha256: str
    bands: Image.Image | np.ndarray | None = None
    note: str | None = None

    @property
    def planes(self) -> list[Image.Image]:
        """Its bands as grey images, in order."""
        if isinstance(self.bands, np.ndarray):
            return [Image.fromarray(np.ascontiguousarray(band)) for band in np.moveaxis(self.bands, -1, 0)]
        return list((self.image if self.bands is None else self.bands).split())


@runtime_checkable
class Source(Protocol):
    """What every probe is. Small and picklable: it travels to every actor, the manifest does not."""

    @property
    def name(self) -> str:
        """The probe's name."""
        ...

    def manifest(self) -> pa.Table:
        """Lists the images, in a fixed order (schema :data:`milan_ray.schema.MANIFEST`).

        Raises:
            MilanError: There is nothing to list, or the place cannot be read.
        """
        ...

    def concept_maps(self, ref: ImageRef) -> dict[str, np.ndarray] | None:
        """Ground truth of one image: concept name → bool (H, W) in the image's own pixels; None where unknown."""
        ...


class ImageProbe(Source, Protocol):
    """A source of probe images."""

    def read(self, ref: ImageRef) -> ProbeImage:
        """Reads and decodes one image.

        Raises:
            UnreadableImage: It is missing, corrupt, empty or too large; the text says which.
        """
        ...


@runtime_checkable
class LatentProbe(Source, Protocol):
    """A source of a generator's inputs: an "image" of its manifest is the one generated from that row's tensors."""

    def latents(self, refs: Sequence[ImageRef]) -> tuple[torch.Tensor, ...]:
        """The tensors of some rows, in the order in which the generator takes them, each (len(refs), …), on the CPU.

        Raises:
            MilanError: A file is no longer there or has changed.
        """
        ...


Probe = ImageProbe | LatentProbe
