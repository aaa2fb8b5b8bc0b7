"""Sparse autoencoders of ViT-Prisma: weights and ``config.json``, or an older file that holds both."""

from __future__ import annotations

from pathlib import Path

from milan_ray.errors import MilanError
from milan_ray.models.features.contents import (
    Config,
    ask,
    check_k,
    check_normalisation,
    common_weights,
    first,
    gated_weights,
    read_config,
    read_tensors,
    unknown,
    with_bias,
)
from milan_ray.models.features.dictionary import Dictionary
from milan_ray.models.features.options import ReadingOptions

CONFIG = "config.json"

USES = ("activation", "k", "normalisation")
"""Options that are read; an older file needs them, because its configuration is an object that is not executed."""

_ACTIVATIONS = ("relu", "tanh-relu", "topk", "topk-signed")


def find_weights(folder: Path) -> Path:
    """The file of weights in a folder.

    Raises:
        MilanError: There is none, or several.
    """
    files = sorted(file for file in folder.iterdir() if file.suffix in (".pt", ".pth", ".safetensors"))
    if len(files) != 1:
        names = ", ".join(file.name for file in files[:5]) or "none"
        raise MilanError(f"features {folder} need one file of weights beside {CONFIG} (there are {names}): name it.")
    return files[0]


def read(path: Path, options: ReadingOptions) -> Dictionary:
    """Reads a file of weights, with the ``config.json`` beside it if there is one.

    Raises:
        MilanError: It is damaged or of a kind that is not read, or an option is missing.
    """
    name, config = str(path), path.parent / CONFIG
    settings = read_config(config) if config.is_file() else Config(name, {})
    if settings.flag("is_transcoder", False):
        raise unknown(name, "architecture", "transcoder", ("standard", "gated"))
    architecture = settings.text("architecture") or "standard"
    if architecture not in ("standard", "gated"):
        raise unknown(name, "architecture", architecture, ("standard", "gated"))
    tensors = read_tensors(path, "W_enc", "W_dec")
    weights = common_weights(tensors, subtract=True)
    normalisation = _normalisation(name, settings, options)
    activation = _activation(name, settings, options)
    # An older file does not say its architecture in words.
    if architecture == "gated" or (not settings.entries and "r_mag" in tensors):
        if activation != "relu":
            raise unknown(name, "activation of a gated dictionary", activation, ("relu",))
        weights = gated_weights(tensors, weights, "b_gate", "b_mag", "r_mag")
        return Dictionary(weights, "gated", normalisation=normalisation)
    k = None
    if activation.startswith("topk"):
        k = first(options.k, settings.inner("activation_fn_kwargs").integer("k"))
        k = check_k(name, k, len(weights.encoder))
    return Dictionary(with_bias(tensors, weights), activation, k, normalisation)


def _normalisation(name: str, settings: Config, options: ReadingOptions) -> str:
    if options.normalisation is not None:
        return check_normalisation(name, options.normalisation)
    if "normalize_activations" in settings.entries:
        return check_normalisation(name, settings.text("normalize_activations") or "none")
    return check_normalisation(name, None)


def _activation(name: str, settings: Config, options: ReadingOptions) -> str:
    activation = options.activation or settings.text("activation_fn_str")
    if activation is None:
        raise ask(name, "their activation", "activation", ", ".join(_ACTIVATIONS))
    if activation not in _ACTIVATIONS:
        raise unknown(name, "activation", activation, _ACTIVATIONS, "activation")
    if options.activation is None and activation == "topk":
        # Versions differ in what they do to the k values unless this entry says it; the first ones took max(·, 0).
        after = settings.inner("activation_fn_kwargs").text("postact_fn") or "relu"
        if after not in ("relu", "identity"):
            raise unknown(name, "postact_fn", after, ("relu", "identity"))
        return "topk" if after == "relu" else "topk-signed"
    return activation
