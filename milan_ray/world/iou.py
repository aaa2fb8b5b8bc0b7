"""Intersection over union of units and concepts over a whole probe, as in network dissection (Bau et al. 2017)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from milan_ray.exemplars.masks import masks


class ConceptIoU:
    """Mergeable intersection over union of every unit with every concept.

    Pixels are counted over all images together, so any split of the images over any number of states gives the same
    result. Add every image once.
    """

    def __init__(self, levels: torch.Tensor, concepts: Sequence[str]) -> None:
        """Starts empty.

        Args:
            levels: float32 (U,), the units' levels η; a unit is on where its upsampled map is above its level.
            concepts: C concept names, the columns of the result.
        """
        self.levels = levels
        self.concepts = tuple(concepts)
        self._both = torch.zeros(len(levels), len(concepts), dtype=torch.int64)
        self._unit = torch.zeros(len(levels), dtype=torch.int64)
        self._concept = torch.zeros(len(concepts), dtype=torch.int64)

    def update(self, maps: torch.Tensor, truth: Sequence[Mapping[str, np.ndarray]]) -> None:
        """Counts a batch of images.

        Args:
            maps: Activation maps, float32 (B, U, h, w).
            truth: Concept maps of the B images, bool (H, W), all of one size; missing concepts are not visible.
        """
        column = {concept: number for number, concept in enumerate(self.concepts)}
        for unit_maps, concept_maps in zip(maps, truth, strict=True):
            shown = [concept for concept in concept_maps if concept in column]
            size = next(iter(concept_maps.values())).shape
            on = masks(unit_maps, self.levels, (size[0], size[1])).flatten(1).float()
            self._unit += on.sum(dim=1).long()
            if not shown:
                continue
            present = torch.from_numpy(np.stack([concept_maps[concept] for concept in shown])).flatten(1).float()
            columns = torch.tensor([column[concept] for concept in shown])
            self._both[:, columns] += (on @ present.T).long()
            self._concept[columns] += present.sum(dim=1).long()

    def merge(self, other: ConceptIoU) -> None:
        """Adds the counts of another state.

        Raises:
            ValueError: The other state has other levels or concepts.
        """
        if self.concepts != other.concepts or not torch.equal(self.levels, other.levels):
            raise ValueError("only states with the same levels and concepts can be merged")
        self._both += other._both
        self._unit += other._unit
        self._concept += other._concept

    def result(self) -> np.ndarray:
        """Intersection over union, float64 (U, C); 0 if neither the unit nor the concept was ever on."""
        union = self._unit[:, None] + self._concept[None, :] - self._both
        return (self._both.double() / union.clamp(min=1)).numpy()
