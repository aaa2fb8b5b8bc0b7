"""A probe whose concept maps are computed by a segmentation network (docs/labelers.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa
from PIL import Image

from milan_ray.probe.base import ImageProbe, ImageRef, ProbeImage


class Segments(Protocol):
    """A network that segments images into concepts."""

    def identity(self) -> str:
        """A text that covers everything that determines the maps besides the images."""
        ...

    def maps(self, image: Image.Image) -> dict[str, np.ndarray]:
        """Concept → bool (H, W) over a whole RGB image, at any resolution."""
        ...


@dataclass(frozen=True)
class SegmentedProbe:
    """The images of another probe, with concept maps that a network computes.

    Each image's version tag includes the network's identity, so another network gives the probe another fingerprint.

    Attributes:
        images: The probe that provides the images.
        by: The segmentation network.
    """

    images: ImageProbe
    by: Segments

    @property
    def name(self) -> str:
        """The other probe's name."""
        return self.images.name

    def manifest(self) -> pa.Table:
        """The other probe's manifest, with version tags that include the network's identity."""
        table = self.images.manifest()
        place = table.schema.get_field_index("etag")
        tags = [f"{tag or ''}+segmentation:{self.by.identity()}" for tag in table["etag"].to_pylist()]
        return table.set_column(place, table.schema.field(place), pa.array(tags, table.schema.field(place).type))

    def read(self, ref: ImageRef) -> ProbeImage:
        """Reads one image; raises the other probe's errors."""
        return self.images.read(ref)

    def concept_maps(self, ref: ImageRef) -> dict[str, np.ndarray] | None:
        """The network's concept maps of one image."""
        return self.by.maps(self.images.read(ref).image)
