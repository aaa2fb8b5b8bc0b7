"""A probe whose concept maps a network makes (docs/labelers.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa
from PIL import Image

from milan_ray.probe.base import ImageProbe, ImageRef, ProbeImage


class Segments(Protocol):
    """Says what pixels show."""

    def identity(self) -> str:
        """All that decides its maps."""
        ...

    def maps(self, image: Image.Image) -> dict[str, np.ndarray]:
        """Concept → bool (H, W)."""
        ...


@dataclass(frozen=True)
class SegmentedProbe:
    """The images of another probe, with the concept maps of a network.

    Who made the maps is part of each image's version tag: with another network it is another probe.

    Attributes:
        images: Where the images come from.
        by: The network.
    """

    images: ImageProbe
    by: Segments

    @property
    def name(self) -> str:
        """The other probe's name."""
        return self.images.name

    def manifest(self) -> pa.Table:
        """The other probe's images."""
        table = self.images.manifest()
        place = table.schema.get_field_index("etag")
        tags = [f"{tag or ''}+segmentation:{self.by.identity()}" for tag in table["etag"].to_pylist()]
        return table.set_column(place, table.schema.field(place), pa.array(tags, table.schema.field(place).type))

    def read(self, ref: ImageRef) -> ProbeImage:
        """Reads one image; errors as the other probe's."""
        return self.images.read(ref)

    def concept_maps(self, ref: ImageRef) -> dict[str, np.ndarray] | None:
        """What the network sees in one image, in the image's own pixels."""
        return self.by.maps(self.images.read(ref).image)
