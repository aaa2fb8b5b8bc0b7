"""Reads dictionaries of features from the files of other projects, without executing anything in them."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

from milan_ray.errors import MilanError, unknown_name
from milan_ray.models.features import (
    dictionary_learning,
    matrices,
    overcomplete,
    prisma,
    saelens,
    saev,
    sparsify,
)
from milan_ray.models.features.contents import read_config, read_tensors
from milan_ray.models.features.dictionary import Dictionary
from milan_ray.models.features.options import FORMATS, ReadingOptions

__all__ = ["ReadingOptions", "layer_of", "read_dictionary"]

_READERS: dict[str, ModuleType] = {
    "saelens": saelens,
    "prisma": prisma,
    "saev": saev,
    "overcomplete": overcomplete,
    "sparsify": sparsify,
    "dictionary_learning": dictionary_learning,
    "matrix": matrices,
}

_FOLDERS = {"saelens": saelens.WEIGHTS, "sparsify": sparsify.WEIGHTS}
"""Formats that are folders, and the file in them that names the format."""


def read_dictionary(path: str | Path, options: ReadingOptions | None = None) -> Dictionary:
    """Reads a dictionary of features.

    Args:
        path: A folder, or a file in it.
        options: What the files do not say. An option that a format has no use for is refused.

    Returns:
        The dictionary, on the CPU.

    Raises:
        MilanError: The files are missing, damaged, of another layer's width or of a kind that is not read, or do not
            say something that an option has to say.
    """
    place, options = Path(path), options or ReadingOptions()
    if not place.exists():
        raise MilanError(f"there are no features at {place}: give a file or a folder.")
    if options.format is not None and options.format not in FORMATS:
        raise unknown_name("format of features", options.format, FORMATS)
    name = options.format or _detect(place)
    reader = _READERS[name]
    needless = set(options.given()) - {"format", "width", *reader.USES}
    if needless:
        raise MilanError(f"features {place} are of the format {name}, which has no {min(needless)}: leave it out.")
    dictionary: Dictionary = reader.read(_target(place, name), options)
    if options.width not in (None, dictionary.width):
        raise MilanError(
            f"features {place} are of a layer with {dictionary.width} units, and this layer has {options.width}: give "
            "those of this layer."
        )
    return dictionary


def layer_of(path: str | Path) -> str | None:
    """The layer that files of features say they are of: SAELens' ``hook_name``, where that names a module.

    Returns:
        Its module path; None where they say none, or name a hook point of another library (``blocks.3.hook_mlp_out``).

    Raises:
        MilanError: The files are damaged.
    """
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    if not (folder / saelens.WEIGHTS).is_file() or (Path(path) != folder and _detect(Path(path)) != "saelens"):
        return None
    config = read_config(folder / saelens.CONFIG)
    name = config.inner("metadata").text("hook_name") or config.text("hook_name", "hook_point")
    return None if name is None or any(part.startswith("hook_") for part in name.split(".")) else name


def _target(path: Path, name: str) -> Path:
    """The folder or the file that a format's reader takes."""
    if name in _FOLDERS:
        return path if path.is_dir() else path.parent
    if path.name == dictionary_learning.CONFIG:
        path = path.parent
    if not path.is_dir():
        return path
    if name == "dictionary_learning":
        return path / dictionary_learning.WEIGHTS
    if name == "prisma":
        return prisma.find_weights(path)
    raise MilanError(f"features {path} are a folder, and those of the format {name} are a file: give the file.")


def _detect(path: Path) -> str:
    """The format that the files say.

    Raises:
        MilanError: They say none.
    """
    folder = path if path.is_dir() else path.parent
    # A file that stands beside others is read on its own unless it is one of theirs.
    for name, weights in _FOLDERS.items():
        if (folder / weights).is_file() and (path.is_dir() or path.name in (weights, "cfg.json")):
            return name
    config = folder / dictionary_learning.CONFIG
    if config.is_file() and (path.is_dir() or path.suffix in (".pt", ".pth", ".pkl", ".json", ".safetensors")):
        entries = read_config(config).entries
        if isinstance(entries.get("trainer"), dict) and "dict_class" in entries["trainer"]:
            return "dictionary_learning"
        if "activation_fn_str" in entries:
            return "prisma"
    if path.is_dir():
        raise MilanError(
            f"folder {path} holds no features of a known format ({', '.join(FORMATS)}): give the file, or fetch the "
            "whole folder again."
        )
    return _detect_file(path)


def _detect_file(path: Path) -> str:
    if path.suffix == ".npy":
        return "matrix"
    with path.open("rb") as file:
        if file.read(1) == b"{" and _is_json(path):
            return "saev"
    names = read_tensors(path).names
    if any(name.startswith("dictionary.") for name in names):
        return "overcomplete"
    if path.suffix == ".safetensors" and "W_dec" not in names and "decoder.weight" not in names:
        return "matrix"
    raise MilanError(
        f"features {path} do not say their format (they have the tensors {', '.join(names[:6])}): give format, one of "
        f"{', '.join(FORMATS)}."
    )


def _is_json(path: Path) -> bool:
    with path.open("rb") as file:
        line = file.readline(2**20)
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
