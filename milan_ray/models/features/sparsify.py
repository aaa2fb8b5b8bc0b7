"""Folders of EleutherAI's sparsify: ``cfg.json`` and ``sae.safetensors``."""

from __future__ import annotations

from pathlib import Path

from milan_ray.models.features.contents import check_k, first, read_config, read_tensors, unknown
from milan_ray.models.features.dictionary import Dictionary, Weights
from milan_ray.models.features.options import ReadingOptions

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"

USES = ("k",)
"""Options that are read."""

_OTHERS = ("transcode", "skip_connection", "embed_skip", "gram_lookup", "signed")
"""Settings under which the formula is another one."""


def read(folder: Path, options: ReadingOptions) -> Dictionary:
    """Reads a folder of a hook point.

    Raises:
        MilanError: It is incomplete, damaged, or of a kind that is not read.
    """
    config, tensors = read_config(folder / CONFIG), read_tensors(folder / WEIGHTS)
    for name in _OTHERS:
        if config.flag(name, False):
            raise unknown(str(folder), "setting", name, ("autoencoders with topk or groupmax",))
    activation = config.text("activation") or "topk"
    if activation not in ("topk", "groupmax"):
        raise unknown(str(folder), "activation", activation, ("topk", "groupmax"))
    encoder = tensors.matrix("encoder.weight")
    count, width = encoder.shape
    if config.integer("d_in") not in (None, width):
        raise config.wrong("d_in", config.integer("d_in"))
    bias = tensors.tensor("b_dec", width)
    weights = Weights(
        encoder,
        tensors.tensor("W_dec", count, width),
        encoder_bias=tensors.tensor("encoder.bias", count),
        decoder_bias=bias,
        input_bias=bias,
    )
    k = check_k(str(folder), first(options.k, config.integer("k")), count)
    if activation == "groupmax" and count % k:
        raise config.wrong("k", k)
    return Dictionary(weights, activation, k)
