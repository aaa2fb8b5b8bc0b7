"""Checkpoints of saev: a line of JSON, then a state dict."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from milan_ray.errors import MilanError, explained
from milan_ray.models.features.contents import (
    Config,
    Tensors,
    ask,
    check_k,
    common_weights,
    parse_config,
    read_tensors,
    unknown,
    with_bias,
)
from milan_ray.models.features.dictionary import Dictionary
from milan_ray.models.features.options import ReadingOptions

USES = ("subtract_decoder_bias", "threshold")
"""Options that are read; the first versions need them."""

_LONGEST = 2**20
"""Most bytes of the first line."""

_ACTIVATIONS = ("Relu", "TopK", "BatchTopK")


def read(path: Path, options: ReadingOptions) -> Dictionary:
    """Reads a checkpoint of schema 1 to 5, or of before there were schemas.

    Raises:
        MilanError: It is damaged or of a kind that is not read, or an option is missing.
    """
    name = str(path)
    header, tensors = _split(path)
    schema = header.integer("schema")
    if schema is not None and schema > 5:
        raise unknown(name, "schema", schema, ("1 to 5",))
    settings = header if schema is None else header.inner("cfg")
    activation, k = _activation(header, settings)
    weights = with_bias(tensors, common_weights(tensors, _subtracts(name, schema, options)))
    count = len(weights.encoder)
    for entry in ("d_model", "d_vit"):
        if settings.integer(entry) not in (None, weights.encoder.shape[1]):
            raise header.wrong(entry, settings.integer(entry))
    if activation == "Relu":
        return Dictionary(weights, "relu")
    if activation == "TopK":
        return Dictionary(weights, "topk-signed", min(check_k(name, k, max(k or 1, count)), count))
    threshold = options.threshold
    if threshold is None and "activation.threshold" in tensors:
        threshold = tensors.number("activation.threshold")
    if threshold is None:
        raise ask(name, "above which value a feature is on", "threshold", "a number; 0 for all positive values")
    # Below 0, the authors' code takes 0; so does the rectification of "threshold".
    return Dictionary(replace(weights, threshold=torch.full((count,), threshold)), "threshold")


def _split(path: Path) -> tuple[Config, Tensors]:
    """The first line, and the tensors behind it.

    Raises:
        MilanError: It is damaged.
    """
    with tempfile.TemporaryDirectory() as folder:
        rest = Path(folder, "weights.pt")
        reading = explained(f"features {path} cannot be read", "fetch them again.", OSError, ValueError, RecursionError)
        with reading, path.open("rb") as file:
            header = parse_config(str(path), file.readline(_LONGEST))
            # The readers of tensors check the sizes that a whole file claims.
            with rest.open("wb") as copy:
                shutil.copyfileobj(file, copy)
        try:
            tensors = read_tensors(rest, "W_enc", "W_dec")
        except MilanError as error:
            raise MilanError(str(error).replace(str(rest), str(path))) from error
        tensors.path = str(path)
        return header, tensors


def _activation(header: Config, settings: Config) -> tuple[str, int | None]:
    """Name of the activation, and its k."""
    if header.integer("schema") is None:
        return "Relu", None
    inner = settings.inner("activation") if isinstance(settings.entries.get("activation"), dict) else None
    if inner is None and header.text("cls") == "SparseAutoencoderConfig":
        return "Relu", None
    name = header.text("cls") if inner is None else inner.text("cls")
    if name not in _ACTIVATIONS:
        raise unknown(header.path, "activation", name, _ACTIVATIONS)
    return str(name), settings.integer("top_k") if inner is None else inner.inner("params").integer("top_k")


def _subtracts(path: str, schema: int | None, options: ReadingOptions) -> bool:
    """Whether the decoder's bias is subtracted from the input: at first it was, since schema 2 it is not."""
    if options.subtract_decoder_bias is not None:
        return options.subtract_decoder_bias
    if schema == 1:
        what = "whether the decoder's bias is subtracted from the input, as schema 1 is of versions of both kinds"
        raise ask(path, what, "subtract_decoder_bias", "true or false")
    return schema is None
