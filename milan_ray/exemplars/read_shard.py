"""A shard's images as they travel from the process that reads them to the one that runs the models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from milan_ray.exemplars.forward import Batch, Batches
from milan_ray.probe.base import ImageRef


@dataclass(frozen=True)
class ReadShard:
    """A shard's images, read as the inputs of models that take the same.

    Attributes:
        views: uint8 (n, H, W, bands), the readable images, in the order of the shard.
        facts: What else a :class:`~milan_ray.exemplars.forward.Batch` says, JSON-able, with places in the shard:
            ``places`` and ``sha256`` of the n images, ``unreadable`` and ``notes`` as (place, text).
    """

    views: np.ndarray
    facts: dict[str, Any]

    @classmethod
    def of(cls, refs: Sequence[ImageRef], batch: Batch) -> ReadShard:
        """Packs a batch of all images of a shard."""
        place = {ref.image_id: place for place, ref in enumerate(refs)}
        facts = {
            "places": [place[image_id] for image_id in batch.ids.tolist()],
            "sha256": batch.sha256,
            "unreadable": [(place[ref.image_id], reason) for ref, reason in batch.unreadable],
            "notes": [(place[ref.image_id], note) for ref, note in batch.notes],
        }
        return cls(batch.views, facts)

    def batches(self, refs: Sequence[ImageRef], size: int) -> Batches:
        """Yields the images in the batches that :func:`~milan_ray.exemplars.forward.read_ahead` makes of them.

        Args:
            refs: The shard's rows.
            size: Rows per batch.
        """
        places = np.array(self.facts["places"], np.int64)
        ids = np.array([ref.image_id for ref in refs], np.int64)
        for start in range(0, len(refs), size):
            stop = min(start + size, len(refs))
            first, last = np.searchsorted(places, (start, stop))
            yield (
                refs[start:stop],
                Batch(
                    self.views[first:last].copy(),  # what Ray passes is read-only, which torch does not know
                    ids[places[first:last]],
                    self.facts["sha256"][first:last],
                    [(refs[place], reason) for place, reason in self.facts["unreadable"] if start <= place < stop],
                    [(refs[place], note) for place, note in self.facts["notes"] if start <= place < stop],
                ),
            )
