"""From what the user asked for to the model that is meant."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from milan_ray.errors import MilanError
from milan_ray.hub import digest_in
from milan_ray.models.layouts import UNSAID, Reading
from milan_ray.models.registry import RANDOM, Activations, ModelSpec, get_model
from milan_ray.models.weights import WeightsFile


def resolve_model(
    name: str,
    weights: str | None = None,
    layers: Sequence[str] | None = None,
    *,
    activations: Activations = "seen",
    reading: Reading = UNSAID,
    download: bool = False,
) -> ModelSpec:
    """Finds a registered model and applies the user's choices to it.

    Everything that can be missing is found missing here, before work is handed out; layers are checked against the
    built model by :func:`milan_ray.models.hooks.find_layers`. A published file brings its own preprocessing, wherever
    it lies: it is known by its name.

    Args:
        name: Registered name.
        weights: Path or address of a weights file, the name of published ones (``IMAGENET1K_V2``), ``random`` for
            untrained weights from seed 0, or None for the model's own.
        layers: Module paths to dissect, in order; None or empty for the model's defaults.
        activations: Which values of a layer count; see :class:`milan_ray.models.hooks.LayerTap`.
        reading: What the user says of the layers' axes, over what the model says.
        download: Whether to fetch the model's own weights where they are absent; an address is always fetched.

    Returns:
        The model, its weights (where they are a file) as an absolute path.

    Raises:
        MilanError: No such model, or no such weights file.
    """
    spec = get_model(name)
    if weights is None:
        weights = spec.weights or next(iter(spec.published), None)
    if weights is not None and weights in spec.published:
        weights = spec.published[weights].find(download)
    elif weights is not None and "://" in weights:
        weights = _at(weights).find(download=True)
    elif weights is not None and weights != RANDOM:
        path = Path(weights).expanduser().resolve()
        if not path.is_file():
            names = f", one of {', '.join(spec.published)}," if spec.published else ""
            raise MilanError(
                f"no weights file at {path} for {name}: give the path of an existing file{names} or a URL."
            )
        weights = str(path)
    file = Path(weights).name if weights else None
    version = next((version for version in spec.published.values() if version.file == file), None)
    return replace(
        spec,
        weights=weights,
        layers=tuple(dict.fromkeys(layers or spec.layers)),
        activations=activations,
        reading=reading.over(spec.reading),
        preprocess=version.preprocess if version and version.preprocess else spec.preprocess,
    )


def _at(url: str) -> WeightsFile:
    """The file behind a user's address; the whole address names it, unless its own name carries a digest."""
    file = WeightsFile.at(url)
    if digest_in(file.file) is not None:
        return file
    address = urlsplit(url)
    return replace(file, file=re.sub(r"[^\w.-]+", "_", address.netloc + address.path))
