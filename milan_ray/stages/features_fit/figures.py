"""The customary figures of fitted sets, from one more pass over the probe."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from milan_ray.device import to_device
from milan_ray.errors import MilanError
from milan_ray.exemplars.forward import Batch
from milan_ray.models.features.dictionary import Dictionary
from milan_ray.models.features.statistics import FeatureStatistics
from milan_ray.models.registry import ModelSpec
from milan_ray.models.splice import Splice
from milan_ray.probe.base import ImageRef
from milan_ray.stages.features_fit.output import of_bytes
from milan_ray.stages.features_fit.passes import Arrays, PassWorker, below, fitted_to, rows_of, under
from milan_ray.storage.files import WORK

TRAIN, HELD_OUT = SPLITS = ("train", "held-out")

CODES_BYTES = 2**26
"""Bytes of codes that are made at a time."""

PLAIN, MEAN, SPLICED = "plain", "mean", "set"
"""What a classifier is judged with: the layer's own output, the mean of it, its reconstruction by a set."""


@dataclass
class Figures:
    """The figures of one set on some images.

    Attributes:
        images: Images.
        statistics: Features that are on, and what they explain.
        right: What stands in the layer's place → images classified correctly; empty where nothing is classified.
    """

    statistics: FeatureStatistics
    images: int = 0
    right: dict[str, int] = field(default_factory=dict)

    def accuracy(self, what: str) -> float | None:
        """Share of images classified correctly with something in the layer's place; None where none were."""
        return self.right[what] / self.images if what in self.right and self.images else None


class FiguresWorker(PassWorker):
    """Counts what the features of several sets do on a shard, and how a classifier does with their reconstruction.

    Args:
        sets: Names of the sets; their dictionaries lie in the work.
        mean: The layer's mean output (C,).
        labelled: Whether each image's class lies in the work.
        **arguments: Arguments of a :class:`PassWorker`.
    """

    def __init__(self, sets: Sequence[str], mean: Sequence[float], labelled: bool, **arguments: Any) -> None:
        super().__init__(**arguments)
        folder = f"{WORK}/{self._item.work}"
        self._sets = {
            name: of_bytes(self._storage.get(f"{folder}/sets/{name}")).to(self._device).eval() for name in sets
        }
        self._mean = torch.tensor(list(mean), device=self._device)
        self._classes: np.ndarray | None = None
        if labelled:
            self._classes = np.frombuffer(self._storage.get(f"{folder}/classes"), np.int64)
        self._splice: Splice | None = None

    def _add_up(self, refs: list[ImageRef]) -> Arrays:
        found: dict[str, np.ndarray] = {}
        for split in SPLITS:
            due = fitted_to(refs, self._share, held=split == HELD_OUT)
            if due:
                found |= under(split, self._split(due, self._share == 0 or split == HELD_OUT))
        return found

    @torch.inference_mode()
    def _split(self, refs: list[ImageRef], classified: bool) -> dict[str, np.ndarray]:
        states = {name: FeatureStatistics(one.count, one.width, self._device) for name, one in self._sets.items()}
        right: dict[str, torch.Tensor] = {}
        images = 0
        for spec, batch, maps in self._maps(refs):
            images += len(batch.ids)
            rebuilt: dict[str, torch.Tensor] = {}
            for name, dictionary in self._sets.items():
                rows = reconstructed(dictionary, rows_of(maps), states[name])
                if classified and self._classes is not None:
                    rebuilt[name] = rows.unflatten(0, (len(maps), *maps.shape[2:])).permute(0, 3, 1, 2)
            if classified and self._classes is not None:
                for name, one in self._judged(spec, batch, maps, rebuilt).items():
                    right[name] = right.get(name, torch.zeros_like(one)) + one
        arrays = {"images": np.array([images], np.int64)}
        for name, state in states.items():
            arrays |= under(f"set/{name}", state.state())
        return arrays | under("right", {name: one.cpu().numpy().reshape(1) for name, one in right.items()})

    def _judged(
        self, spec: ModelSpec, batch: Batch, maps: torch.Tensor, rebuilt: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Images classified correctly with each set's reconstruction in the layer, as it is, and with its mean."""
        assert self._classes is not None
        if self._splice is None:
            layout = self._item.described.layouts[self._layer]
            self._splice = Splice(spec, self._network, self._layer, layout)
        views = torch.from_numpy(batch.views)
        wanted = to_device(torch.from_numpy(self._classes[batch.ids]), self._device)
        versions: dict[str, torch.Tensor | None] = {
            PLAIN: None,
            MEAN: self._mean[None, :, None, None].expand_as(maps),
            **{f"set/{name}": one for name, one in rebuilt.items()},
        }
        return {name: (self._splice.logits(views, one).argmax(dim=1) == wanted).sum() for name, one in versions.items()}


def reconstructed(dictionary: Dictionary, rows: torch.Tensor, statistics: FeatureStatistics) -> torch.Tensor:
    """Reconstructs outputs (N, C), and counts what the features do.

    Args:
        dictionary: The set.
        rows: The outputs.
        statistics: What is added to.

    Returns:
        float32 (N, C).
    """
    parts = []
    for part in rows.split(max(1, CODES_BYTES // (4 * dictionary.count))):
        if dictionary.sparse is not None:
            values, indices = dictionary.encode_sparse(part)
            statistics.add_sparse(values, indices)
            parts.append(dictionary.decode_sparse(values, indices, part))
        else:
            codes = dictionary.encode(part)
            statistics.add(codes)
            parts.append(dictionary.decode(codes, part))
        statistics.add_reconstruction(part, parts[-1])
    return torch.cat(parts)


def merged(pieces: Iterable[Arrays], sets: Sequence[str]) -> dict[str, dict[str, Figures]]:
    """Set → split → figures, from the states of all shards.

    Raises:
        MilanError: No image could be read.
    """
    found: dict[str, dict[str, Figures]] = {name: {} for name in sets}
    for piece in pieces:
        for split in SPLITS:
            arrays = below(split, piece)
            for name in sets if arrays else ():
                state = FeatureStatistics.of_state(below(f"set/{name}", arrays))
                right = {
                    SPLICED if key == f"set/{name}" else key: int(count[0])
                    for key, count in below("right", arrays).items()
                }
                if split not in found[name]:
                    found[name][split] = Figures(FeatureStatistics(state.count, state.width))
                figures = found[name][split]
                figures.statistics.merge(state)
                figures.images += int(arrays["images"][0])
                for key, count in right.items():
                    figures.right[key] = figures.right.get(key, 0) + count
    if not all(found.values()):
        raise MilanError("no image of the probe could be read: mend them, or give others.")
    return found
