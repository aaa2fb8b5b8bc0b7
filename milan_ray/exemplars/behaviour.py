"""What a network computes, in a few numbers per layer: tells a ``forward`` that was written anew from the old one."""

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
"""Metadata key of exemplars: their layer's fingerprint."""

_TOLERANCE = 1e-2
"""How far numbers may be apart, relative to the layer's size: kernels differ between machines, and half precision."""

_PROJECTIONS = 4


def behaviours(
    spec: ModelSpec, model: nn.Module, layouts: Mapping[str, Layout], latents: tuple[torch.Tensor, ...] | None
) -> dict[str, str]:
    """Layer → what it puts out for two fixed views (a generator: for its first inputs), rounded, as JSON.

    Of every unit the mean, the root mean square, and means that weigh rows and columns; of these a few projections.

    Args:
        spec: The model.
        model: The model, built.
        layouts: Layer → how its output is read.
        latents: A generator's inputs, or None.

    Returns:
        Empty where the model does not run on such inputs: the pass over the probe says why, if that fails, too.
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
    """Whether two fingerprints are those of the same computation, on whatever machine each was made."""
    before, now = np.array(json.loads(one)), np.array(json.loads(other))
    if before.shape != now.shape:
        return False
    return bool((np.abs(before - now) <= _TOLERANCE * max(abs(before[0]), abs(now[0]))).all())


def _numbers(maps: torch.Tensor) -> list[float]:
    """The layer's root mean square, and projections of what its units do; (n, U, h, w) maps."""
    found = torch.nan_to_num(maps.double(), nan=0.0, posinf=0.0, neginf=0.0).cpu()
    units, height, width = found.shape[1:]
    squares = found.square().mean(dim=(0, 2, 3))
    rows = torch.linspace(-1, 1, height, dtype=found.dtype)
    columns = torch.linspace(-1, 1, width, dtype=found.dtype)
    told = torch.stack(
        [
            found.mean(dim=(0, 2, 3)),
            squares.sqrt(),
            (found.mean(dim=(0, 3)) * rows).mean(dim=1),
            (found.mean(dim=(0, 2)) * columns).mean(dim=1),
        ]
    )
    weights = torch.from_numpy(np.random.default_rng(1).standard_normal((units, _PROJECTIONS))) / units**0.5
    return [float(squares.mean().sqrt()), *(told @ weights).ravel().tolist()]
