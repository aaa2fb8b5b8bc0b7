"""Published sets as sequences of samples (images, masks and annotations), read from disk on access."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from milan_ray.annotations.layout import (
    ANNOTATIONS,
    Annotation,
    LayerFiles,
    layer_folders,
    open_layer,
    read_annotations,
)
from milan_ray.annotations.quirks import NO_QUIRKS, Quirks
from milan_ray.errors import MilanError, unknown_name
from milan_ray.progress import say


@dataclass(frozen=True, eq=False)
class Sample:
    """A unit's exemplars and their human annotations.

    Attributes:
        layer: Name of the layer.
        unit: Channel.
        images: float32 (k, 3, H, W) in [0, 1], highest activation first.
        masks: float32 (k, 1, H, W), 0 or 1.
        annotations: Descriptions, as written; may be empty.
    """

    layer: str
    unit: int
    images: np.ndarray
    masks: np.ndarray
    annotations: tuple[str, ...] = ()

    def masked_images(self, opacity: float = 0.75) -> np.ndarray:
        """Returns the images, darkened outside their masks, float32 (k, 3, H, W).

        Args:
            opacity: How much to darken: 1 is black, 0 leaves the images unchanged.

        Raises:
            ValueError: The opacity is not in [0, 1].
        """
        if not 0 <= opacity <= 1:
            raise ValueError(f"opacity {opacity} is not in [0, 1]")
        return self.images * np.where(self.masks == 0, np.float32(1 - opacity), self.masks)

    def grid(self, opacity: float = 0.75, limit: int | None = None, columns: int = 5) -> Image.Image:
        """Returns a grid of the masked images, laid out as in the reference.

        Args:
            opacity: See :meth:`masked_images`.
            limit: Maximum number of images; None for all.
            columns: Images per row.
        """
        images = torch.from_numpy(self.masked_images(opacity)[:limit])
        from torchvision.transforms.functional import to_pil_image  # takes two seconds to import
        from torchvision.utils import make_grid

        return to_pil_image(make_grid(images, nrow=columns))


class PublishedSet:
    """A set of published exemplars: a sequence of samples that are read from disk on access.

    As in the reference, samples are ordered by layer (as strings) and position, or, with ``annotation_count``, by first
    appearance in ``annotations.csv``. Unlike in the reference, folders that hold no layer are skipped, layers named by
    digits keep their annotations, and ``lookup`` finds units by their number.
    :class:`~milan_ray.annotations.quirks.Quirks` restores the reference's behaviour for the latter two.
    """

    def __init__(
        self,
        root: str | Path,
        name: str | None = None,
        *,
        layers: Iterable[str | int] | None = None,
        annotated: bool = True,
        annotation_count: int | None = None,
        quirks: Quirks = NO_QUIRKS,
    ) -> None:
        """Opens the files and reads the annotations.

        Args:
            root: Folder with one subfolder per layer, and ``annotations.csv`` if there are annotations.
            name: The set's name; None takes the last two parts of its path.
            layers: Layers to open; None opens all.
            annotated: Whether to read the annotations, if there are any.
            annotation_count: Keep only units with at least this many annotations, and only the first this many of
                each; None keeps every unit. The reference uses 3 for the released sets.
            quirks: Defects of the reference to reproduce.

        Raises:
            MilanError: A file is missing, damaged or inconsistent with the others, or kept annotations have no images.
        """
        self.root = Path(root).expanduser().absolute()
        self.name = name or f"{self.root.parent.name}/{self.root.name}"
        folders, strays = layer_folders(self.root)
        known = [folder.name for folder in folders]
        self.layers = known if layers is None else sorted(str(layer) for layer in layers)
        for layer in self.layers:
            if layer not in known:
                raise unknown_name("layer", layer, known, f"These are the layers in {self.root}.")
        if strays:
            say(f"{self.name}: left out {', '.join(folder.name for folder in strays)}: no exemplars there")
        self.files: dict[str, LayerFiles] = {layer: open_layer(self.root / layer) for layer in self.layers}
        self.csv = self.root / ANNOTATIONS if annotated and (self.root / ANNOTATIONS).exists() else None
        self.annotations = [] if self.csv is None else read_annotations(self.csv)
        if layers is not None:
            self.annotations = [item for item in self.annotations if item.layer in self.files]
        self._by_position = quirks.lookup_by_position
        self._positions = {
            layer: {int(unit): position for position, unit in enumerate(files.units)}
            for layer, files in self.files.items()
        }
        self.kept = kept_annotations(self.annotations, annotation_count)
        self._samples: dict[tuple[str, int], tuple[int, tuple[str, ...]]] = {}
        if self.csv is not None and annotation_count is not None:
            for (layer, unit), rows in self.kept.items():
                self._samples[layer, unit] = self._position(layer, unit), tuple(row.text for row in rows)
        else:
            for layer, positions in self._positions.items():
                lost = quirks.digit_layers_lose_annotations and layer.isdigit()
                for unit, position in positions.items():
                    rows = [] if lost else self.kept.get((layer, unit), [])
                    self._samples[layer, unit] = position, tuple(row.text for row in rows)
        self._keys = list(self._samples)

    def __len__(self) -> int:
        """Returns the number of samples."""
        return len(self._keys)

    def __getitem__(self, index: int) -> Sample:
        """Reads one sample."""
        layer, unit = self._keys[index]
        return self._read(layer, unit, *self._samples[layer, unit])

    def __iter__(self) -> Iterator[Sample]:
        """Reads the samples one by one."""
        return (self[index] for index in range(len(self)))

    def units(self) -> list[tuple[str, int]]:
        """Returns (layer, unit) of every sample, in order, without reading the samples."""
        return list(self._keys)

    def lookup(self, layer: str | int, unit: int) -> Sample:
        """Reads the sample of a unit.

        Raises:
            MilanError: The set has no such sample.
        """
        layer = str(layer)
        if self.csv is not None:
            if (layer, unit) not in self._samples:
                raise MilanError(f"{self.name} has no annotated unit {unit} in layer {layer!r}.")
            return self._read(layer, unit, *self._samples[layer, unit])
        return self._read(layer, unit, self._position(layer, unit), ())

    @property
    def k(self) -> int:
        """Exemplars per unit in the first sample's layer.

        Raises:
            MilanError: The set has no samples.
        """
        if not self._keys:
            raise MilanError(f"{self.name} has no samples: no unit has that many annotations.")
        return self.files[self._keys[0][0]].k

    def _position(self, layer: str, unit: int) -> int:
        if layer not in self.files:
            raise MilanError(
                f"{self.name} has no exemplars of layer {layer!r}; its layers are {', '.join(self.files)}."
            )
        position = unit if self._by_position else self._positions[layer].get(unit, -1)
        if not 0 <= position < len(self.files[layer].masks):
            raise MilanError(f"{self.name}: layer {layer!r} has no unit {unit}.")
        return position

    def _read(self, layer: str, unit: int, position: int, annotations: tuple[str, ...]) -> Sample:
        files = self.files[layer]
        masks = np.asarray(files.masks[position], dtype=np.float32)
        return Sample(layer, unit, files.unit_images(position), masks, annotations)


def kept_annotations(
    annotations: Iterable[Annotation], count: int | None = None
) -> dict[tuple[str, int], list[Annotation]]:
    """Groups annotations by unit: (layer, unit) → its annotations, in order of first appearance.

    Args:
        annotations: Rows of ``annotations.csv``.
        count: Keep only units with at least this many annotations, and only the first this many of each; None keeps
            all.
    """
    rows: dict[tuple[str, int], list[Annotation]] = {}
    for item in annotations:
        rows.setdefault((item.layer, item.unit), []).append(item)
    if count is None:
        return rows
    return {key: found[:count] for key, found in rows.items() if len(found) >= count}
