"""Fingerprints of a network's outputs, a few numbers per layer, that detect a changed ``forward``."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from milan_ray.exemplars.forward import Forward, Inputs
from milan_ray.models.layouts import Layout
from milan_ray.models.registry import ModelSpec

COMPUTES = "computes"
"""Metadata key of exemplars for their layer's fingerprint."""

_TOLERANCE = 1e-2
"""Tolerance relative to the layer's root mean square: kernels differ between machines, and half precision is coarse."""

_PROJECTIONS = 4


def behaviours(
    spec: ModelSpec, model: nn.Module, layouts: Mapping[str, Layout], latents: tuple[torch.Tensor, ...] | None
) -> dict[str, str]:
    """Computes the fingerprint of each layer's output for two fixed views (for a generator, its first two inputs).

    The statistics of each unit are its mean, its root mean square, and its means weighted by row and by column. A
    fingerprint holds a few projections of these statistics over the units.

    Args:
        spec: The model.
        model: The model, built.
        layouts: Layer → how its output is read.
        latents: A generator's inputs, or None.

    Returns:
        Layer → fingerprint: rounded numbers as JSON. Empty if the model fails on these inputs; if it also fails on the
        probe, that pass reports the error.
    """
    inputs: Inputs
    if latents is None:
        height, width, bands = spec.view_shape
        views = np.random.default_rng(0).integers(0, 256, (2, height, width, bands), dtype=np.uint8)
        inputs = views
    else:
        inputs = tuple(tensor[:2] for tensor in latents)
    try:
        maps = Forward(spec, model, list(layouts), spec.batch(2), layouts=layouts).maps(inputs)
    except Exception:  # a model's own code may raise anything
        return {}
    return {layer: json.dumps([float(f"{value:.6g}") for value in _numbers(found)]) for layer, found in maps.items()}


def same(one: str, other: str) -> bool:
    """Whether two fingerprints belong to the same computation, even if they were made on different machines."""
    before, now = np.array(json.loads(one)), np.array(json.loads(other))
    if before.shape != now.shape:
        return False
    return bool((np.abs(before - now) <= _TOLERANCE * max(abs(before[0]), abs(now[0]))).all())


def _numbers(maps: torch.Tensor) -> list[float]:
    """The layer's root mean square, and projections of its units' statistics, from maps (n, U, h, w)."""
    values = torch.nan_to_num(maps.double(), nan=0.0, posinf=0.0, neginf=0.0).cpu()
    units, height, width = values.shape[1:]
    squares = values.square().mean(dim=(0, 2, 3))
    rows = torch.linspace(-1, 1, height, dtype=values.dtype)
    columns = torch.linspace(-1, 1, width, dtype=values.dtype)
    told = torch.stack(
        [
            values.mean(dim=(0, 2, 3)),
            squares.sqrt(),
            (values.mean(dim=(0, 3)) * rows).mean(dim=1),
            (values.mean(dim=(0, 2)) * columns).mean(dim=1),
        ]
    )
    weights = torch.from_numpy(np.random.default_rng(1).standard_normal((units, _PROJECTIONS))) / units**0.5
    return [float(squares.mean().sqrt()), *(told @ weights).ravel().tolist()]
