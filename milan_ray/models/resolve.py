"""Resolves a model's name and the user's choices to a :class:`~milan_ray.models.registry.ModelSpec`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from milan_ray.errors import MilanError
from milan_ray.hub import digest_in
from milan_ray.models.features.sets import FeatureSet, find_features
from milan_ray.models.layouts import UNSAID, Reading
from milan_ray.models.registry import RANDOM, Activations, ModelSpec, get_model
from milan_ray.models.weights import WeightsFile, split_weights
from milan_ray.names import SIGN
from milan_ray.progress import say


def resolve_model(
    name: str,
    weights: str | None = None,
    layers: Sequence[str] | None = None,
    *,
    activations: Activations = "seen",
    reading: Reading = UNSAID,
    features: Sequence[str] = (),
    download: bool = False,
) -> ModelSpec:
    """Finds a registered model and applies the user's choices to it.

    Missing models and files are reported here, before any work starts. Layers are checked later, against the built
    model, by :func:`milan_ray.models.hooks.find_layers`. A published file, recognised by its name in any folder, sets
    its own preprocessing.

    Args:
        name: Registered name.
        weights: Path or address of a weights file, the name of published ones (``IMAGENET1K_V2``), ``random`` for
            untrained weights from seed 0, or None for the model's own. ``FILE#PART`` selects one of several networks
            in a file; see :func:`milan_ray.models.weights.read_weights`.
        layers: Module paths to dissect, in order, or registered feature sets as ``LAYER#NAME``; None or empty for the
            model's defaults, or for ``features`` alone.
        activations: Which values of a layer count; see :class:`milan_ray.models.hooks.LayerTap`.
        reading: What the user declares about the layers' axes; overrides the model's declaration.
        features: Files of features, as ``LAYER=PATH``; see
            :func:`milan_ray.models.features.given.file_features`. ``layers`` may name them, ``LAYER#NAME``.
        download: Whether to download the model's own weights where they are absent; an address is always downloaded.

    Returns:
        The model; weights that are a file are given as an absolute path.

    Raises:
        MilanError: There is no such model, weights file or feature set.
    """
    spec = get_model(name)
    layers, sets = _layers(spec, layers or (), features)
    if weights is None:
        weights = spec.weights or next(iter(spec.published), None)
    if weights is not None and weights in spec.published:
        weights = spec.published[weights].find(download)
    elif weights is not None and _is_address(weights):
        weights = _fetched(weights)
    elif weights is not None and weights != RANDOM:
        given, part = split_weights(_local(weights))
        path = Path(given).expanduser().resolve()
        if not path.is_file():
            names = f", one of {', '.join(spec.published)}," if spec.published else ""
            raise MilanError(
                f"no weights file at {path} for {name}: give the path of an existing file{names} or a URL."
            )
        weights = f"{path}#{part}" if part else str(path)
    file = Path(split_weights(weights)[0]).name if weights else None
    version = next((version for version in spec.published.values() if version.file == file), None)
    return replace(
        spec,
        weights=weights,
        layers=layers,
        features=sets,
        activations=activations,
        reading=reading.over(spec.reading),
        preprocess=version.preprocess if version and version.preprocess else spec.preprocess,
    )


def _layers(
    spec: ModelSpec, layers: Sequence[str], files: Sequence[str]
) -> tuple[tuple[str, ...], dict[str, FeatureSet]]:
    """The layers to dissect, by default those of the files, and the feature sets among them."""
    read = {}
    if files:
        from milan_ray.models.features.given import file_features  # readers of many formats, for those who have files

        read = {features.path: features for features in map(file_features, files)}
    chosen = tuple(dict.fromkeys(layers or read or spec.layers))
    sets = [layer for layer in chosen if SIGN in layer]
    return chosen, {layer: read[layer] if layer in read else find_features(spec.name, layer) for layer in sets}


def _is_address(weights: str) -> bool:
    """Whether weights are given by an address to download.

    Raises:
        MilanError: The address has an unsupported scheme.
    """
    scheme, separator, _ = weights.partition("://")
    if not separator or scheme.lower() == "file" or Path(weights).is_file():
        return False
    if scheme.lower() not in ("http", "https"):
        raise MilanError(
            f"weights are fetched by https or http, not by {scheme} ({weights}): give a file or such a URL."
        )
    return True


def _local(weights: str) -> str:
    """The path in a ``file:`` address; other paths unchanged.

    Raises:
        MilanError: The address names another computer.
    """
    if not weights.lower().startswith("file:"):
        return weights
    address = urlsplit(weights, allow_fragments=False)
    if address.netloc not in ("", "localhost"):
        raise MilanError(f"{weights} is a file of the computer {address.netloc}: give a path of this one.")
    return url2pathname(address.path)


def _fetched(url: str) -> str:
    """The path of the file at a user's address, downloaded where it is absent; keeps ``#PART``."""
    address, _, part = url.partition("#")
    file = _at(address)
    if address.lower().startswith("http:") and digest_in(file.file) is None and not file.is_here():
        say(
            f"warning: {address} is fetched without encryption, and its name carries no digest: whoever is on the way "
            "can give you other weights; use https where there is one.",
            "warning",
        )
    path = file.find(download=True)
    return f"{path}#{part}" if part else path


def _at(url: str) -> WeightsFile:
    """The file at a user's address, named after the whole address unless its own name contains a digest."""
    file = WeightsFile.at(url)
    if digest_in(file.file) is not None:
        return file
    address = urlsplit(url)
    return replace(file, file=re.sub(r"[^\w.-]+", "_", address.netloc + address.path))
