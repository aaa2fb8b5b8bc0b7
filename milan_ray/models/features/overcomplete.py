"""State dicts of overcomplete's sparse autoencoders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from milan_ray.errors import MilanError
from milan_ray.models.features.contents import Tensors, ask, check_k, read_tensors, unknown
from milan_ray.models.features.dictionary import Dictionary, Weights
from milan_ray.models.features.options import ReadingOptions

USES = ("activation", "decoder_normalisation", "k", "threshold")
"""Options that are read: a state dict holds no settings."""

_ACTIVATIONS = ("relu", "topk", "batchtopk")

_NORMALISATIONS = ("l2", "max_l2", "l1", "max_l1", "identity")

_LINEAR = ("encoder.final_block", "encoder")
"""Where the linear map and the norm of an encoder lie, in later and in earlier versions."""

_EPSILON = 1e-5
"""What torch's batch norm adds to the variance."""


def read(path: Path, options: ReadingOptions) -> Dictionary:
    """Reads the state dict of an ``SAE``, ``TopKSAE``, ``BatchTopKSAE``, ``JumpSAE`` or ``RATopKSAE`` and their like.

    Raises:
        MilanError: It is damaged or of a kind that is not read, or an option is missing.
    """
    name = str(path)
    tensors = read_tensors(path)
    encoder, bias = _encoder(tensors)
    decoder = _decoder(tensors, len(encoder), encoder.shape[1], options)
    weights, count = Weights(encoder, decoder, bias), len(encoder)
    if "Q" in tensors:
        raise unknown(name, "architecture", "QSAE", ("SAE", "TopKSAE", "BatchTopKSAE", "JumpSAE"))
    if "thresholds" in tensors:
        if options.activation is not None:
            raise MilanError(f"features {name} have thresholds, so they are JumpReLU's: leave out activation.")
        least = tensors.tensor("thresholds", count).exp()
        return Dictionary(replace(weights, threshold=_below(least)), "threshold")
    if options.activation is None:
        raise ask(name, "their activation", "activation", ", ".join(_ACTIVATIONS))
    if options.activation not in _ACTIVATIONS:
        raise unknown(name, "activation", options.activation, _ACTIVATIONS, "activation")
    if options.activation == "topk":
        return Dictionary(weights, "topk", check_k(name, options.k, count))
    if options.activation == "relu":
        return Dictionary(weights, "relu")
    if options.threshold is None:
        raise ask(name, "above which value a feature is on", "threshold", "running_threshold of the trained network")
    return Dictionary(replace(weights, threshold=_below(torch.full((count,), options.threshold))), "threshold")


def _below(least: torch.Tensor) -> torch.Tensor:
    """The next smaller float32 numbers: codes are kept where they equal their threshold, too."""
    return torch.nextafter(least, torch.full_like(least, -torch.inf))


def _encoder(tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """The encoder (F, C) and its bias (F,), with its batch norm in them.

    Raises:
        MilanError: It is more than a linear map with batch norm.
    """
    layers = [name for name in tensors.names if name.startswith("encoder.")]
    place = next((place for place in _LINEAR if f"{place}.0.weight" in tensors), None)
    if place is None or any(not name.startswith((f"{place}.0.", f"{place}.1.")) for name in layers):
        raise MilanError(
            f"features {tensors.path} have an encoder that is no linear map with batch norm (it has "
            f"{', '.join(layers[:4]) or 'no tensors'}): only such encoders are read."
        )
    weight = tensors.matrix(f"{place}.0.weight")
    count = len(weight)
    bias = tensors.tensor(f"{place}.0.bias", count)
    if f"{place}.1.weight" not in tensors:
        return weight, bias
    if f"{place}.1.running_var" not in tensors:
        raise MilanError(
            f"features {tensors.path} have an encoder with layer norm, whose features depend on each other: only "
            "linear maps with batch norm or without a norm are read."
        )
    variance = tensors.tensor(f"{place}.1.running_var", count)
    factor = tensors.tensor(f"{place}.1.weight", count) / (variance + _EPSILON).sqrt()
    mean = tensors.tensor(f"{place}.1.running_mean", count)
    return weight * factor[:, None], (bias - mean) * factor + tensors.tensor(f"{place}.1.bias", count)


def _decoder(tensors: Tensors, count: int, width: int, options: ReadingOptions) -> torch.Tensor:
    """The dictionary (F, C) as it is used: with its norm and its factor."""
    factor = 1.0
    if "dictionary.multiplier" in tensors:
        factor = float(torch.tensor(tensors.number("dictionary.multiplier")).exp())
    if "dictionary.Relax" in tensors:
        # Each row is near a convex combination of points of the data. The rows of W are projected whenever they are
        # used; the relaxation is stored projected.
        _refuse_norm(tensors, options)
        points = tensors.matrix("dictionary.C")
        mixture = tensors.tensor("dictionary.W", count, len(points)).relu()
        mixture = mixture / (mixture.sum(dim=1, keepdim=True) + 1e-8)
        return (mixture @ points + tensors.tensor("dictionary.Relax", count, width)) * factor
    if "dictionary.dictionary" in tensors:  # before there were norms
        _refuse_norm(tensors, options)
        return tensors.tensor("dictionary.dictionary", count, width)
    rows = tensors.tensor("dictionary._weights", count, width)
    return _normalised(tensors.path, rows, options.decoder_normalisation) * factor


def _refuse_norm(tensors: Tensors, options: ReadingOptions) -> None:
    if options.decoder_normalisation is not None:
        raise MilanError(
            f"features {tensors.path} have a dictionary without a norm of its rows: leave out decoder_normalisation."
        )


def _normalised(path: str, rows: torch.Tensor, name: str | None) -> torch.Tensor:
    """Rows with their norm, which by default is l2 where the rows already have about the length 1."""
    lengths = rows.norm(dim=1, keepdim=True)
    if name is None:
        if not bool(((lengths - 1).abs() < 0.1).all()):
            what = "how their dictionary is normalised, and its rows are not of length 1"
            raise ask(path, what, "decoder_normalisation", ", ".join(_NORMALISATIONS))
        name = "l2"
    if name not in _NORMALISATIONS:
        raise unknown(path, "decoder_normalisation", name, _NORMALISATIONS, "decoder_normalisation")
    if name == "identity":
        return rows
    norms = lengths if name.endswith("l2") else rows.abs().sum(dim=1, keepdim=True)
    return rows / norms.amax() if name.startswith("max_") else rows / (norms + 1e-8)
