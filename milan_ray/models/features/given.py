"""Feature sets as users give them: files of ``--features``, and objects of Python."""

from __future__ import annotations

import hashlib
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from milan_ray.errors import MilanError
from milan_ray.models.features.checkpoints import layer_of, read_dictionary
from milan_ray.models.features.dictionary import Dictionary, Weights
from milan_ray.models.features.options import ReadingOptions
from milan_ray.models.features.sets import FeatureSet
from milan_ray.models.weights import weights_digest
from milan_ray.names import SIGN, checked_name
from milan_ray.textfiles import decode_text
from milan_ray.yaml_files import mapping, wrong

DESCRIPTIONS = (".yaml", ".yml")
"""Suffixes of files that describe a checkpoint which does not describe itself."""

Features = torch.Tensor | np.ndarray | Dictionary | FeatureSet | str | Path
"""A matrix of directions (F, C), a dictionary, a feature set, or the path of a checkpoint."""


@dataclass(frozen=True)
class Described:
    """What a YAML file may say of a file of features, besides :class:`ReadingOptions`.

    Attributes:
        file: The checkpoint or matrix, from the YAML file's folder.
        layer: The layer that it was made for; None where nothing says so.
        name: The set's name; None for the file's own.
    """

    file: str
    layer: str | None = None
    name: str | None = None


def file_features(given: str) -> FeatureSet:
    """Reads a feature set.

    Args:
        given: ``LAYER=PATH`` or ``PATH``, of a checkpoint, of a matrix, or of a YAML file that describes one
            (docs/features.md). Without ``LAYER=``, the file has to name the layer.

    Raises:
        MilanError: The file is missing, damaged or of an unknown kind, or the layer is not known.
    """
    layer, path = split_given(given)
    said, reading = _described(Path(path).expanduser())
    layer = layer or said.layer or layer_of(Path(said.file))
    if not layer:
        raise MilanError(f"--features {given}: which layer? Give --features LAYER={path}.")
    file = Path(said.file)
    name = said.name or (file.name if file.is_dir() else file.stem).replace(SIGN, "-")
    return _from_file(layer, name, said.file, reading)


def feature_set(path: str, given: Features) -> FeatureSet:
    """Makes a feature set of what Python users have.

    Args:
        path: ``LAYER#NAME``.
        given: A matrix, a dictionary, the path of a checkpoint, or a set, which is renamed.

    Raises:
        MilanError: The name has another form, or the file cannot be read.
    """
    layer, sign, name = path.partition(SIGN)
    if not layer or not sign:
        raise MilanError(f"features={{{path!r}: …}}: give the layer's path, {SIGN!r} and a name, as 'layer4{SIGN}sae'.")
    if isinstance(given, FeatureSet):
        return replace(given, layer=layer, name=name)
    if isinstance(given, str | Path):
        said, reading = _described(Path(given).expanduser())
        return _from_file(layer, name, said.file, reading)
    if not isinstance(given, Dictionary):
        rows = torch.as_tensor(given)
        if rows.ndim != 2 or not (rows.is_floating_point() or rows.dtype == torch.int64):
            raise MilanError(f"features {path!r}: give a matrix of numbers (features, units), not {tuple(rows.shape)}.")
        given = Dictionary(Weights(rows.float(), rows.float()), "identity", reconstructs=False)
    return _of(layer, name, given, _digest(given), "given in Python")


def split_given(given: str) -> tuple[str | None, str]:
    """Splits ``LAYER=PATH``; an existing path that contains ``=`` is a path."""
    layer, sign, path = given.partition("=")
    if sign and not Path(given).expanduser().exists():
        return layer, path
    return None, given


def _from_file(layer: str, name: str, file: str, reading: ReadingOptions) -> FeatureSet:
    dictionary, digest = _loaded(file, reading, _stamp(file))
    return _of(layer, name, dictionary, digest, file)


def _of(layer: str, name: str, dictionary: Dictionary, digest: str, source: str) -> FeatureSet:
    checked_name("a feature set", name)
    if SIGN in layer or SIGN in name:
        raise MilanError(f"features {name!r} of {layer!r}: neither may contain {SIGN!r}, which stands between them.")
    return FeatureSet(
        name, layer, dictionary.count, dictionary.width, dictionary.rectified, digest,
        lambda: deepcopy(dictionary), dictionary.reconstructs, lambda: dictionary.directions, source,
    )  # fmt: skip


def _described(path: Path) -> tuple[Described, ReadingOptions]:
    """What a path, or the YAML file there, says of a file of features."""
    if not path.exists():
        raise MilanError(f"no features at {path}: give a checkpoint's file or folder, a matrix, or a YAML file.")
    if path.suffix not in DESCRIPTIONS:
        return Described(str(path.absolute())), ReadingOptions()
    values = mapping(decode_text(path.read_bytes()), str(path), Described, ReadingOptions)
    own = {field.name for field in fields(Described)}
    said = Described(**{key: value for key, value in values.items() if key in own})
    for key, value in vars(said).items():
        if not isinstance(value, str | None):
            raise wrong(str(path), key, value, "a text")
    file = (path.parent / Path(said.file).expanduser()).absolute()
    reading = ReadingOptions(**{key: value for key, value in values.items() if key not in own})
    return replace(said, file=str(file)), reading


def _stamp(file: str) -> tuple[tuple[str, int, int], ...]:
    """Changes with the file, or with a file of the folder."""
    path = Path(file)
    if not path.exists():
        raise MilanError(f"no features at {path}: give a checkpoint's file or folder, or a matrix.")
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    stats = [(each.name, each.stat()) for each in files if each.is_file()]
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


@lru_cache(maxsize=4)
def _loaded(file: str, reading: ReadingOptions, stamp: object) -> tuple[Dictionary, str]:
    """The dictionary in a file, and its digest; read again when the stamp changes."""
    dictionary = read_dictionary(file, reading)
    return dictionary, _digest(dictionary)


def _digest(dictionary: Dictionary) -> str:
    """A digest of all that decides a dictionary's codes."""
    return hashlib.sha256(f"{dictionary.identity()!r} {weights_digest(dictionary)}".encode()).hexdigest()
