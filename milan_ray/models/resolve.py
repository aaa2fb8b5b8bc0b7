"""From what the user asked for to the model that is meant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from milan_ray.errors import MilanError
from milan_ray.models.registry import RANDOM, ModelSpec, get_model


def resolve_model(
    name: str, weights: str | None = None, layers: Sequence[str] | None = None, *, download: bool = False
) -> ModelSpec:
    """Finds a registered model and applies the user's choices to it.

    Everything that can be missing is found missing here, before work is handed out; layers are checked against the
    built model by :func:`milan_ray.models.hooks.find_layers`.

    Args:
        name: Registered name.
        weights: Path of a weights file, ``random`` for untrained weights from seed 0, or None for the model's own.
        layers: Module paths to dissect, in order; None or empty for the model's defaults.
        download: Whether to fetch the model's own weights where they are absent.

    Returns:
        The model, its weights (where they are a file) as an absolute path.

    Raises:
        MilanError: No such model, or no such weights file.
    """
    spec = get_model(name)
    if weights is not None and weights != RANDOM:
        path = Path(weights).expanduser().resolve()
        if not path.is_file():
            raise MilanError(f"no weights file at {path} for {name}: give the path of an existing file.")
        weights = str(path)
    elif weights is None and spec.find_weights is not None:
        weights = spec.find_weights(download)
    return replace(spec, weights=weights or spec.weights, layers=tuple(dict.fromkeys(layers or spec.layers)))
