"""Folders of dictionary_learning: ``config.json`` and ``ae.pt``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from milan_ray.models.features.contents import (
    Config,
    Tensors,
    ask,
    check_k,
    common_weights,
    first,
    gated_weights,
    read_config,
    read_tensors,
    unknown,
    with_bias,
)
from milan_ray.models.features.dictionary import Dictionary, Weights
from milan_ray.models.features.options import ReadingOptions

CONFIG, WEIGHTS = "config.json", "ae.pt"

USES = ("architecture", "k")
"""Options that are read; a file without its configuration needs them."""

_CLASSES = (
    "AutoEncoder",
    "AutoEncoderNew",
    "GatedAutoEncoder",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
    "JumpReluAutoEncoder",
)


def read(path: Path, options: ReadingOptions) -> Dictionary:
    """Reads a file of weights, with the ``config.json`` beside it if there is one.

    Codes are those of the stored weights: where a version of the project multiplies them by the norms of the decoder's
    rows, it divides by these again before it decodes.

    Raises:
        MilanError: It is damaged or of a kind that is not read, or an option is missing.
    """
    name = str(path)
    config = path.parent / CONFIG
    settings = read_config(config).inner("trainer") if config.is_file() else Config(name, {})
    kind = options.architecture or settings.text("dict_class")
    if kind is None:
        raise ask(name, "their class", "architecture", ", ".join(_CLASSES))
    if kind not in _CLASSES:
        raise unknown(name, "architecture", kind, _CLASSES, "architecture")
    tensors = read_tensors(path)
    if kind in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"):
        weights = with_bias(tensors, common_weights(tensors, subtract=kind == "MatryoshkaBatchTopKSAE"))
    else:
        weights = _linear(tensors, kind)
    for entry, size in (("activation_dim", weights.encoder.shape[1]), ("dict_size", weights.encoder.shape[0])):
        if settings.integer(entry) not in (None, size):
            raise settings.wrong(entry, settings.integer(entry))
    return _built(tensors, weights, kind, first(options.k, settings.integer("k")))


def _built(tensors: Tensors, weights: Weights, kind: str, k: int | None) -> Dictionary:
    count = len(weights.encoder)
    if kind == "GatedAutoEncoder":
        return Dictionary(gated_weights(tensors, weights, "gate_bias", "mag_bias", "r_mag"), "gated")
    if kind == "AutoEncoderTopK":
        if k is None and "k" in tensors:
            k = int(tensors.number("k"))
        return Dictionary(weights, "topk", check_k(tensors.path, k, count))
    if kind == "JumpReluAutoEncoder":
        return Dictionary(replace(weights, threshold=tensors.tensor("threshold", count)), "threshold")
    if kind in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        # −1 until a training has measured it: all positive values are codes then.
        threshold = torch.full((count,), tensors.number("threshold"))
        return Dictionary(replace(weights, threshold=threshold), "threshold")
    return Dictionary(weights, "relu")


def _linear(tensors: Tensors, kind: str) -> Weights:
    """Weights that are stored as those of torch's linear layers."""
    encoder = tensors.matrix("encoder.weight")
    count, width = encoder.shape
    decoder = tensors.tensor("decoder.weight", width, count).T.contiguous()
    names = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias", "GatedAutoEncoder": "decoder_bias"}
    bias = tensors.tensor(names.get(kind, "b_dec"), width)
    encoder_bias = None if kind == "GatedAutoEncoder" else tensors.tensor("encoder.bias", count)
    return Weights(encoder, decoder, encoder_bias, bias, None if kind == "AutoEncoderNew" else bias)
