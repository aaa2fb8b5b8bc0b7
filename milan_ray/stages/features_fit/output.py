"""Files of fitted feature sets: folders of SAELens, and matrices with a YAML file that says how they are read."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
import yaml
from safetensors.torch import load, save

from milan_ray.models.features.dictionary import Dictionary, Weights
from milan_ray.models.features.saelens import CONFIG, saelens_files
from milan_ray.storage import Storage

FIT = "milan_ray_fit"
"""Entry of a set's metadata: the hash of all that decided it."""

MATRIX = ".safetensors"
DESCRIPTION = ".yaml"


def is_matrix(dictionary: Dictionary) -> bool:
    """Whether a dictionary is written as a plain matrix: signed components are none of SAELens' kinds."""
    return dictionary.activation == "identity"


def place_of(name: str, matrix: bool) -> str:
    """The file or folder of a set, as ``--features`` takes it, below the folder of all sets."""
    return f"{name}{DESCRIPTION}" if matrix else name


def files_of(name: str, dictionary: Dictionary, layer: str, metadata: Mapping[str, object]) -> dict[str, bytes]:
    """The files of a set, below the folder of all sets; the last one makes it complete.

    Args:
        name: Name of the set.
        dictionary: The set.
        layer: The layer that it reads.
        metadata: What is known of it; values that JSON has.
    """
    if not is_matrix(dictionary):
        return {f"{name}/{file}": content for file, content in saelens_files(dictionary, metadata).items()}
    assert dictionary.decoder_bias is not None
    tensors = {"components": dictionary.encoder, "mean": dictionary.decoder_bias}
    said = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    description = {"file": f"{name}{MATRIX}", "layer": layer, "name": name, "format": "matrix", "transposed": False}
    text = f"# {FIT}: {metadata[FIT]}\n" + yaml.safe_dump(description, sort_keys=False, allow_unicode=True)
    return {
        f"{name}{MATRIX}": save({key: tensor.contiguous() for key, tensor in tensors.items()}, metadata=said),
        f"{name}{DESCRIPTION}": text.encode(),
    }


def why_written(folder: Storage, name: str, matrix: bool, fit: str) -> str | None:
    """Why the files of a set have to be written; None where they are there, of this very fit."""
    place = place_of(name, matrix)
    path = place if matrix else f"{place}/{CONFIG}"
    if not folder.exists(path):
        return "its files are missing"
    try:
        content = folder.get(path).decode()
        if matrix:
            found = content.splitlines()[0].removeprefix(f"# {FIT}: ")
        else:
            found = json.loads(content)["metadata"].get(FIT, "")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):  # whatever lies there instead
        return "its files are damaged"
    return None if found == fit else "its files are of another fit"


def to_bytes(dictionary: Dictionary) -> bytes:
    """A dictionary as a work file, for workers."""
    tensors = dict(dictionary.named_buffers())
    how = {
        "activation": dictionary.activation,
        "k": dictionary.sparse,
        "normalisation": dictionary.normalisation,
        "reconstructs": dictionary.reconstructs,
    }
    return save({name: tensor.clone() for name, tensor in tensors.items()}, metadata={"how": json.dumps(how)})


def of_bytes(content: bytes) -> Dictionary:
    """The dictionary of :func:`to_bytes`."""
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    how, tensors = json.loads(header["__metadata__"]["how"]), load(content)
    encoder = tensors.pop("encoder")
    decoder: torch.Tensor = tensors.pop("decoder", encoder)
    weights = Weights(encoder, decoder, **tensors)
    return Dictionary(weights, how["activation"], how["k"], how["normalisation"], how["reconstructs"])
