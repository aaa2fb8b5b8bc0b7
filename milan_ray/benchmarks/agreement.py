"""How far two runs of one model agree: their exemplars and levels may differ by what rounding explains, and no more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from milan_ray.schema import EXEMPLARS, LEVELS
from milan_ray.storage import Storage


@dataclass(frozen=True)
class Agreement:
    """Differences between two runs, over all units of all layers.

    Attributes:
        units: Units.
        same_images: Units with the same images in the same order.
        activations: Largest difference of activations of the same rank, relative to the layer's root mean square.
        levels: Largest difference of levels, relative to the same.
        strangers: Largest distance of an image that only one run has from the other run's last activation, relative to
            the same: 0 where both have the same images.
        pixels: Share of mask pixels that differ, in exemplars that both have.
    """

    units: int
    same_images: int
    activations: float
    levels: float
    strangers: float
    pixels: float

    def facts(self, ties: float) -> dict[str, float | str]:
        """The differences by name, with the judgement whether all of them are ties within some relative error."""
        equal = max(self.activations, self.levels, self.strangers) <= ties
        return {
            f"equal up to ties within {ties:g}": "yes" if equal else "NO",
            "units with the same images in the same order": f"{self.same_images:,} of {self.units:,}",
            "largest difference of activations": self.activations,
            "largest difference of levels": self.levels,
            "mask pixels that differ": f"{self.pixels:.4%}",
        }


def agreement(one: Storage, other: Storage, model: str, layers: Sequence[str]) -> Agreement:
    """Compares the exemplars and levels of a model's layers in two storages.

    Args:
        one: The first run; its activations are the scale.
        other: The second run.
        model: The model's name.
        layers: Its layers.
    """
    parts = [_of_layer(one, other, model, layer) for layer in layers]
    largest = {name: max(getattr(part, name) for part in parts) for name in ("activations", "levels", "strangers")}
    pixels = float(np.average([part.pixels for part in parts], weights=[part.units for part in parts]))
    units, same = sum(part.units for part in parts), sum(part.same_images for part in parts)
    return Agreement(units, same, largest["activations"], largest["levels"], largest["strangers"], pixels)


def _of_layer(one: Storage, other: Storage, model: str, layer: str) -> Agreement:
    ours, theirs = (_exemplars(storage, model, layer) for storage in (one, other))
    levels = [storage.read(LEVELS, model=model, layer=layer)["level"].to_numpy() for storage in (one, other)]
    scale = max(float(np.sqrt(np.mean(np.square([value for unit in ours.values() for _, value, _ in unit])))), 1e-30)
    same, far, strange, differing, compared = 0, 0.0, 0.0, 0, 0
    for unit, rows in ours.items():
        others = theirs.get(unit, [])
        same += [image for image, *_ in rows] == [image for image, *_ in others]
        if len(rows) != len(others):
            far = np.inf
        else:
            far = max(far, max(abs(a[1] - b[1]) for a, b in zip(rows, others, strict=True)))
        for mine, last in ((rows, others), (others, rows)):
            known = {image for image, *_ in last}
            strange = max([strange, *(abs(value - last[-1][1]) for image, value, _ in mine if image not in known)])
        masks = {image: mask for image, _, mask in others}
        for image, _, mask in rows:
            if image in masks:
                bits = np.frombuffer(mask, np.uint8) ^ np.frombuffer(masks[image], np.uint8)
                differing += int(np.unpackbits(bits).sum())
                compared += 8 * len(mask)
    apart = float(np.nanmax(np.abs(levels[0] - levels[1]), initial=0.0))
    return Agreement(len(ours), same, far / scale, apart / scale, strange / scale, differing / max(1, compared))


def _exemplars(storage: Storage, model: str, layer: str) -> dict[int, list[tuple[int, float, bytes]]]:
    """Unit → image, activation and packed mask of its exemplars, best first."""
    table = storage.read(EXEMPLARS, ["unit", "rank", "image_id", "activation", "mask"], model=model, layer=layer)
    table = table.sort_by([("unit", "ascending"), ("rank", "ascending")])
    units: dict[int, list[tuple[int, float, bytes]]] = {}
    for unit, image, value, mask in zip(
        *(table[name].to_pylist() for name in ("unit", "image_id", "activation", "mask")), strict=True
    ):
        units.setdefault(unit, []).append((image, value, mask))
    return units
