"""Weights: reading them from files without executing anything in them, and telling which ones a model has."""

from __future__ import annotations

import hashlib
import pickle
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from milan_ray import hub
from milan_ray.config import models_dir
from milan_ray.errors import MilanError, reason
from milan_ray.models.view import Preprocess
from milan_ray.tensorfiles import check_sizes

_READ = (".json", ".safetensors", ".txt", ".model", ".jinja")
_CHUNK = 2**22  # bytes that are hashed at a time
_WRAPPERS = ("state_dict", "model_state_dict", "model")


@dataclass(frozen=True)
class WeightsFile:
    """A published file of weights.

    Attributes:
        file: Its name.
        url: Where it is published; None when whoever has it keeps it to themselves.
        also: Other names under which it may lie in the models directory.
        preprocess: The inputs that these weights expect, where they are not the model's.
    """

    file: str
    url: str | None = None
    also: tuple[str, ...] = ()
    preprocess: Preprocess | None = None

    @classmethod
    def at(cls, url: str, *also: str, preprocess: Preprocess | None = None) -> WeightsFile:
        """The file behind an address."""
        return cls(urlsplit(url).path.rsplit("/", 1)[-1], url, also, preprocess)

    def places(self) -> tuple[Path, ...]:
        """Where it is looked for: ``MILAN_MODELS_DIR`` (default ``./models``), then torch.hub's own cache."""
        return models_dir(), Path(torch.hub.get_dir(), "checkpoints")

    def is_here(self) -> bool:
        """Whether it can be used without a download."""
        return any((folder / name).is_file() for folder in self.places() for name in (self.file, *self.also))

    def find(self, download: bool = False, option: str = "--weights") -> str:
        """Finds the file; a download goes into the models directory.

        Args:
            download: Whether to fetch it when it is absent.
            option: The option that names a file of the user's own, for the message.

        Returns:
            Its absolute path.

        Raises:
            MilanError: It is absent, or the download failed; see :func:`milan_ray.hub.find`.
        """
        hint = f"or name a file of your own with {option}"
        if self.url is not None and not download:
            hint = f"let --download do so, {hint}"
        path = hub.find(
            self.file,
            self.places(),
            self.url,
            download=download,
            variable="MILAN_MODELS_DIR",
            sha256=hub.digest_in(self.file),
            also=self.also,
            hint=hint,
        )
        return str(path)


def read_state_dict(path: str) -> dict[str, torch.Tensor]:
    """Reads a ``.pth``, ``.pt`` or ``.safetensors`` file of weights.

    Pickled code is never executed. A dict around the weights (``state_dict``, ``model_state_dict``, ``model``) and the
    ``module.`` prefix that data parallelism leaves are taken off.

    Args:
        path: The file.

    Returns:
        Parameter and buffer names → tensors, on the CPU.

    Raises:
        MilanError: The file is missing, damaged, or holds something else than tensors.
    """
    if not Path(path).is_file():
        raise MilanError(f"no weights file at {path}: give the path of a .pth, .pt or .safetensors file.")
    try:
        check_sizes(path)
        if path.endswith(".safetensors"):
            content: object = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise MilanError(
            f"weights file {path} is damaged or holds more than tensors, which is never executed: save the model's "
            "state_dict() again."
        ) from error
    except Exception as error:  # whatever a damaged file may raise inside the readers
        raise MilanError(f"weights file {path} cannot be read ({reason(error)}): fetch or save it again.") from error
    for _ in _WRAPPERS:  # one in another, but never endlessly: a file may hold a dict that holds itself
        if isinstance(content, dict):
            content = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), dict)), content)
    if (
        not isinstance(content, dict)
        or not content
        or not all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in content.items())
    ):
        raise MilanError(f"weights file {path} holds no state dict (names → tensors): save the model's state_dict().")
    if all(name.startswith("module.") for name in content):
        content = {name.removeprefix("module."): tensor for name, tensor in content.items()}
    return content


def save_weights(state: dict[str, torch.Tensor], path: str | Path) -> None:
    """Writes a state dict as ``.safetensors``, or as torch's own format with any other ending.

    Raises:
        MilanError: It cannot be written there.
    """
    try:
        if str(path).endswith(".safetensors"):
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
        else:
            torch.save(state, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise MilanError(
            f"cannot write weights to {path} ({reason(error)}); give a file in a folder that is there."
        ) from error


def load_strictly(model: nn.Module, state: dict[str, torch.Tensor], path: str) -> None:
    """Loads weights into a model, every name and shape of which must match; half precision becomes float32.

    Args:
        model: The model.
        state: Its weights.
        path: Where they come from, for messages.

    Raises:
        MilanError: A name is missing or unexpected, or a shape differs; the text names the first ones.
    """
    own = model.state_dict()
    # Counters of BatchNorm that old files lack; torch fills them in.
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in own]
    different = [name for name in own if name in state and own[name].shape != state[name].shape]
    problems = [
        f"{len(names)} {what} (first: {', '.join(names[:3])})"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", different))
        if names
    ]
    if problems:
        raise MilanError(f"weights file {path} does not fit {type(model).__name__}: weights {', '.join(problems)}.")
    model.load_state_dict(state, strict=False)


def weights_digest(model: nn.Module) -> str:
    """The identity of a model's weights: a hash over names, types, shapes and bytes of its state dict, in order.

    Args:
        model: The model, on any device.

    Returns:
        sha256, hex.
    """
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def folder_digest(folder: str) -> str:
    """The identity of a model's folder: a hash over names and bytes of all files that libraries read models from.

    Args:
        folder: The folder, subfolders included.

    Returns:
        sha256, hex.
    """
    digest = hashlib.sha256()
    root = Path(folder)
    for path in sorted(path for path in root.rglob("*") if path.suffix in _READ and path.is_file()):
        digest.update(f"{path.relative_to(root).as_posix()} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()
