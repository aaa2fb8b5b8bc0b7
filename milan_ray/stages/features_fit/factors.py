"""Fits non-negative parts to a layer's outputs: a pass of the pool for each update of the parts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from milan_ray.device import to_device
from milan_ray.errors import MilanError
from milan_ray.exemplars.levels import sample_positions
from milan_ray.models.features.dictionary import Dictionary
from milan_ray.models.features.moments import Moments
from milan_ray.models.features.nmf import PartSums, first_parts, part_dictionary
from milan_ray.probe.base import ImageRef
from milan_ray.progress import say
from milan_ray.scoring.simulation import held_out
from milan_ray.stages.exemplars import ModelWork, Run
from milan_ray.stages.features_fit.config import FitConfig
from milan_ray.stages.features_fit.figures import CODES_BYTES
from milan_ray.stages.features_fit.passes import Arrays, PassWorker, fitted_to, of_table, rows_of, run_pass, to_table
from milan_ray.storage.files import WORK

FOLDER = "factors"
"""Folder of the parts after each pass, in the work."""

SAMPLE_IMAGES, SAMPLE_POSITIONS = 1024, 4096
"""About how many images, and positions in them, parts are taken from at first."""


class SampleWorker(PassWorker):
    """Takes outputs at a fixed pseudo-random choice of positions in some images.

    Args:
        images: Images that features are fitted to, of all shards.
        seed: Of the choice.
        **arguments: Arguments of a :class:`PassWorker`.
    """

    def __init__(self, images: int, seed: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._chosen, self._seed = min(1.0, SAMPLE_IMAGES / images), seed
        self._each = math.ceil(SAMPLE_POSITIONS / min(images, SAMPLE_IMAGES))

    def _add_up(self, refs: list[ImageRef]) -> Arrays:
        due = fitted_to(refs, self._share)
        # Other numbers than the ids, whose hashes decide what is held out.
        ids = np.array([ref.image_id for ref in due], np.int64) + 1_000_003 * (self._seed + 1)
        chosen = [ref for ref, one in zip(due, held_out(ids, self._chosen), strict=True) if one]
        found = [torch.zeros(0, self._units, device=self._device)]
        with torch.inference_mode():
            for _, batch, maps in self._maps(chosen):
                positions = maps.shape[2] * maps.shape[3]
                places = sample_positions(batch.ids + self._seed, min(self._each, positions), positions)
                places += np.arange(len(maps))[:, None] * positions
                found.append(rows_of(maps)[to_device(torch.from_numpy(places.ravel()), self._device)])
        return {"rows": torch.cat(found).cpu().numpy()}


class FactorsWorker(PassWorker):
    """Adds up a shard's outputs, coded with the parts so far.

    Args:
        parts: Name of the table in the work that holds the parts of each set.
        **arguments: Arguments of a :class:`PassWorker`.
    """

    def __init__(self, parts: str, **arguments: Any) -> None:
        super().__init__(**arguments)
        arrays = of_table(self._storage.get_work(self._item.work, parts))
        self._parts = {name: torch.from_numpy(array.copy()).to(self._device) for name, array in arrays.items()}

    def _add_up(self, refs: list[ImageRef]) -> Arrays:
        sums = {name: PartSums(len(parts), self._units, self._device) for name, parts in self._parts.items()}
        with torch.inference_mode():
            for _, _, maps in self._maps(fitted_to(refs, self._share)):
                for name, parts in self._parts.items():
                    for rows in rows_of(maps).split(max(1, CODES_BYTES // (4 * len(parts)))):
                        sums[name].add(rows, parts)
        return {f"{name}/{key}": array for name, one in sums.items() for key, array in one.state().items()}


def factorise(
    run: Run, item: ModelWork, config: FitConfig, moments: Moments, widths: Mapping[str, int]
) -> dict[str, Dictionary]:
    """Set → its non-negative parts as a dictionary; goes on after the last pass of an interrupted run.

    Raises:
        MilanError: The layer puts out values below zero, or the network fails.
    """
    (layer,) = item.layers
    if moments.least < 0:
        raise MilanError(
            f"layer {layer!r} of {item.model.name} puts out values down to {float(moments.least):.3g}, and nmf knows "
            "none below zero: choose a layer whose outputs have passed a ReLU (perhaps --activations post), or pca."
        )
    parts = _first(run, item, config, moments, widths)
    for number in range(1, config.passes + 1):
        parts = _after_pass(run, item, config, number, parts)
    return {name: part_dictionary(parts[name]) for name in widths}


def _first(
    run: Run, item: ModelWork, config: FitConfig, moments: Moments, widths: Mapping[str, int]
) -> dict[str, torch.Tensor]:
    """The parts before the first pass."""
    name = _table(0)
    if name not in run.storage.work_names(item.work, FOLDER):
        layout = item.described.layouts[item.layers[0]]
        images = moments.positions // math.prod(layout.grid)
        pieces = run_pass(
            run, item, SampleWorker, "sample", "first parts", share=config.held_out, images=images, seed=config.seed
        )
        rows = torch.from_numpy(np.concatenate([piece["rows"] for piece in pieces]))
        first = {key: first_parts(rows, width).numpy() for key, width in widths.items()}
        run.storage.put_work(item.work, name, to_table(first))
    return _stored(run, item, name)


def _after_pass(
    run: Run, item: ModelWork, config: FitConfig, number: int, parts: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The parts after a pass; its pieces are removed, because they are larger than the parts."""
    storage, name = run.storage, _table(number)
    if name not in storage.work_names(item.work, FOLDER):
        sums = {key: PartSums(*one.shape) for key, one in parts.items()}
        folder, title = f"pass-{number:04d}", f"pass {number} of {config.passes}"
        for piece in run_pass(run, item, FactorsWorker, folder, title, share=config.held_out, parts=_table(number - 1)):
            for key, one in sums.items():
                one.merge({field: piece[f"{key}/{field}"] for field in vars(one)})
        errors = ", ".join(f"{key} {float(one.error):.4g}" for key, one in sums.items())
        say(f"  pass {number} of {config.passes}: error before it: {errors}")
        updated = {key: one.updated(parts[key]).numpy() for key, one in sums.items()}
        storage.put_work(item.work, name, to_table(updated))
        storage.remove(f"{WORK}/{item.work}/{folder}")
    return _stored(run, item, name)


def _stored(run: Run, item: ModelWork, name: str) -> dict[str, torch.Tensor]:
    """Set → its parts, out of a work table."""
    arrays = of_table(run.storage.get_work(item.work, name))
    return {key: torch.from_numpy(array.copy()) for key, array in arrays.items()}


def _table(number: int) -> str:
    """Name of the work table with the parts after a pass."""
    return f"{FOLDER}/{number:04d}"
