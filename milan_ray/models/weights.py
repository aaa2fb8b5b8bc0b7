"""Reads weights from files without executing code in them, and computes digests of a model's weights."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from milan_ray import hub
from milan_ray.config import models_dir
from milan_ray.errors import MilanError, explained, reason
from milan_ray.models.checkpoints import Checkpoint, read_checkpoint
from milan_ray.models.folders import packaged_folder, require_packaged
from milan_ray.models.partial import accepts_parts, fill
from milan_ray.models.view import Preprocess
from milan_ray.models.weights_fit import Fit, describe_problems, find_fits, misfit, same_tensors, tied_names
from milan_ray.progress import say

_READ = (".json", ".safetensors", ".txt", ".model", ".jinja", ".gguf")
_CHUNK = 2**22  # bytes that are hashed at a time
_WRAPPERS = ("module.", "_orig_mod.")
_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.Size, torch.device)


@dataclass(frozen=True)
class WeightsFile:
    """A published file of weights.

    Attributes:
        file: Its name.
        url: Where it is published; None for a file that is not public.
        also: Other names under which it may lie in the models directory.
        preprocess: The preprocessing that these weights expect, where it differs from the model's.
    """

    file: str
    url: str | None = None
    also: tuple[str, ...] = ()
    preprocess: Preprocess | None = None

    @classmethod
    def at(cls, url: str, *also: str, preprocess: Preprocess | None = None) -> WeightsFile:
        """The file at an address."""
        return cls(urlsplit(url).path.rsplit("/", 1)[-1], url, also, preprocess)

    def places(self) -> tuple[Path, ...]:
        """The folders to search: ``MILAN_MODELS_DIR`` (default ``./models``), then torch.hub's own cache."""
        return models_dir(), Path(torch.hub.get_dir(), "checkpoints")

    def is_here(self) -> bool:
        """Whether it can be used without a download."""
        return any((folder / name).is_file() for folder in self.places() for name in (self.file, *self.also))

    def find(self, download: bool = False, option: str = "--weights") -> str:
        """Finds the file; a download goes into the models directory.

        Args:
            download: Whether to download it when it is absent.
            option: The command-line option that names a user's own file, for the message.

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


@dataclass(frozen=True)
class PackagedWeights(WeightsFile):
    """A file of weights that a Python package holds.

    Attributes:
        package: Name of the package.
        extra: The extra of milan-ray that installs it.
    """

    package: str = ""
    extra: str = ""

    def places(self) -> tuple[Path, ...]:
        """The folder in the package, if that is installed."""
        folder = packaged_folder(self.package)
        return () if folder is None else (folder / "models",)

    def find(self, download: bool = False, option: str = "--weights") -> str:
        """Finds the file; there is nothing to download.

        Raises:
            MilanError: The package is not installed, or has no such file.
        """
        require_packaged(self.package, f"the weights {self.file} come", self.extra)
        return super().find(download, option)


def split_weights(weights: str | Path) -> tuple[str, str]:
    """Splits ``FILE#PART`` into the file and the part; the part is empty where the whole file is meant."""
    weights = str(weights)
    path, mark, part = weights.rpartition("#")
    return (path, part) if mark and path and not Path(weights).is_file() else (weights, "")


def read_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    """Reads a weights file for an unknown network; see :func:`read_weights` for a given one.

    Pickled code is never executed. A dict around the weights (``state_dict``, ``model``, …) is removed, and so are the
    prefixes ``module.`` and ``_orig_mod.`` that data parallelism and compilation add.

    Args:
        path: The file, or ``FILE#PART`` where it holds several state dicts.

    Returns:
        Parameter and buffer names → tensors, on the CPU.

    Raises:
        MilanError: The file is missing, damaged, or holds no state dict or several.
    """
    path, part = split_weights(path)
    states = [state for state in read_checkpoint(path).states if _is_part(state.address, part)]
    if not states:
        raise MilanError(f"weights file {path} holds no part {part!r}: leave out #{part}.")
    addresses = {state.address for state in states}
    outer = [
        state for state in states if not any(_is_part(state.address, other) for other in addresses - {state.address})
    ]
    if len(outer) > 1:
        raise _several(path, [state.address for state in outer])
    if outer[0].others:
        raise MilanError(
            f"weights file {path} holds no state dict (names → tensors) but also {', '.join(outer[0].others[:3])}: "
            "save the model's state_dict()."
        )
    return _unwrapped(outer[0].tensors())


def read_weights(
    path: str | Path,
    model: nn.Module,
    *,
    rename: Callable[[str], str] = str,
    needless: Callable[[str], bool] = lambda name: False,
    sizes: bool = True,
    parts: bool = False,
) -> dict[str, torch.Tensor]:
    """Reads the weights of a network from a file, whatever else the file holds.

    A file may hold several state dicts in nested dicts, and each may hold networks under prefixes (``model.``,
    ``_orig_mod.``, ``backbone.``). The part that fits the network by names and shapes is used and reported. There must
    be one such part, or identical copies of it. Pickled code is never executed.

    Args:
        path: The file, or ``FILE#PART`` to search only a part: keys and prefixes joined by dots, as in messages.
        model: The network.
        rename: Converts a parameter's name in the file, without the prefix, to the network's name.
        needless: Whether a parameter, by the network's name, is optional in the file.
        sizes: Whether shapes must fit, too.
        parts: Whether the file may lack weights where that is accepted (:mod:`milan_ray.models.partial`).

    Returns:
        The network's names of parameters and buffers → tensors, on the CPU.

    Raises:
        milan_ray.models.weights_fit.UnfitWeights: Nothing in the file fits; the message names the nearest part.
        MilanError: The file is missing or damaged, or several different parts fit; the message names them.
    """
    path, part = split_weights(path)
    checkpoint = read_checkpoint(path)
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if hasattr(tensor, "shape")}
    tied = tied_names(model)
    every = (fit for state in checkpoint.states for fit in find_fits(state, own, tied, rename, needless))
    fits = [fit for fit in every if _is_part(fit.path, part)]
    if not fits:
        raise MilanError(f"weights file {path} holds no part {part!r}: leave out #{part}.")
    # Counters of BatchNorm that old files lack; torch fills them in.
    needed = {name for name in own if not name.endswith("num_batches_tracked") and not needless(name)}
    good = [fit for fit in fits if not fit.problems(own, needed, sizes)]
    if not good and parts and accepts_parts():
        some = [fit for fit in fits if fit.matching(own)[0] and not fit.problems(own, set(), sizes)]
        good = sorted(some, key=lambda fit: fit.matching(own), reverse=True)[:1]
    if not good:
        nearest = max(fits, key=lambda fit: fit.matching(own))
        raise misfit(path, type(model).__name__, nearest.problems(own, needed, sizes), nearest, own)
    chosen, tensors = good[0], good[0].tensors()
    chosen.check_twins(path)
    for other in good[1:]:
        if other.sources != chosen.sources and not same_tensors(tensors, other.tensors()):
            raise _several(path, [fit.path for fit in good])
    _say_once(path, type(model).__name__, checkpoint, chosen)
    return tensors


def _unwrapped(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    for prefix in _WRAPPERS * 2:  # either may be around the other
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _is_part(path: str, part: str) -> bool:
    return not part or path == part or path.startswith(f"{part}.")


def _several(path: str, parts: Sequence[str]) -> MilanError:
    named = [part or "the weights beside them" for part in parts]
    choice = next(part for part in parts if part)
    return MilanError(
        f"weights file {path} holds several networks, {', '.join(named[:5])}: choose one by --weights "
        f"{path}#{choice}, or save its state_dict() alone."
    )


_said: set[tuple[str, str]] = set()


def _say_once(path: str, model: str, checkpoint: Checkpoint, chosen: Fit) -> None:
    """Reports, once, the part of a file that is used and what is left; nothing where the whole file is used."""
    left = (*chosen.left, *chosen.state.others)
    compiled = any(
        name.removeprefix(chosen.prefix) != own for own, name in chosen.names.items() if "_orig_mod." in name
    )
    if not (chosen.path or left or compiled or checkpoint.ignored) or (path, model) in _said:
        return
    _said.add((path, model))
    parts = [f"weights of {model}: {chosen.path or 'those'} of {path}{', without _orig_mod.' if compiled else ''}"]
    if left:
        parts.append(f"{len(left)} other entries are not used (first: {left[0]})")
    if checkpoint.ignored:
        parts.append(f"objects in it were neither read nor executed ({', '.join(checkpoint.ignored[:3])})")
    say("; ".join(parts))


def save_weights(state: dict[str, torch.Tensor], path: str | Path) -> None:
    """Writes a state dict as ``.safetensors``, or in torch's own format with any other ending.

    Raises:
        MilanError: The file cannot be written.
    """
    remedy = "give a file in a folder that is there."
    with explained(f"cannot write weights to {path}", remedy, OSError, RuntimeError, SafetensorError):
        if str(path).endswith(".safetensors"):
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
        else:
            torch.save(state, path)


def load_strictly(model: nn.Module, state: dict[str, torch.Tensor], path: str, *, parts: bool = False) -> None:
    """Loads weights into a model. Every name and shape must match; half precision becomes float32.

    Args:
        model: The model.
        state: Its weights.
        path: The file of the weights, for messages.
        parts: Whether weights may be missing where that is accepted (:mod:`milan_ray.models.partial`).

    Raises:
        MilanError: A name is missing or unexpected, or a shape differs; the message names the first ones.
    """
    own = model.state_dict()
    # Counters of BatchNorm that old files lack; torch fills them in.
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in own]
    shared = [name for name in own if name in state and isinstance(own[name], torch.Tensor)]
    different = [name for name in shared if own[name].shape != state[name].shape]
    # Numbers that are not weights yet, such as those of a compressed file, would be loaded without an error.
    real = [name for name in shared if own[name].is_floating_point() and own[name].dtype != state[name].dtype]
    whole = [name for name in real if not _is_real(state[name])]
    if parts and missing and not (unexpected or different) and fill(model, missing, path):
        missing = []
    problems = describe_problems(missing, unexpected, different)
    if whole:
        problems.append(f"{len(whole)} of another type (first: {whole[0]} {state[whole[0]].dtype})")
    if problems:
        raise MilanError(f"weights file {path} does not fit {type(model).__name__}: weights {', '.join(problems)}.")
    broken = [name for name in shared if _is_real(state[name]) and bool(state[name].isnan().any())]
    if broken and (path, "NaN") not in _said:
        _said.add((path, "NaN"))
        say(
            f"weights file {path} has NaN in {len(broken)} weights (first: {broken[0]}): what comes after them is NaN; "
            "take a file from before its training broke.",
            level="warning",
        )
    try:
        model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # from networks that process their state dict themselves
        raise MilanError(f"weights file {path} does not fit {type(model).__name__} ({reason(error)}).") from error


def load_weights(model: nn.Module, path: str, *, parts: bool = False) -> None:
    """Loads a weights file into a model, whatever else the file holds; see :func:`read_weights`.

    Raises:
        MilanError: The file is missing or damaged, or does not fit.
    """
    load_strictly(model, read_weights(path, model, parts=parts), path, parts=parts)


def _is_real(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds usable weights; 8-bit numbers need scales that are stored elsewhere."""
    return tensor.is_floating_point() and not tensor.is_quantized and tensor.dtype.itemsize > 1


def nbytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers."""
    return sum(tensor.nbytes for tensor in model.state_dict().values() if isinstance(tensor, torch.Tensor))


def weights_digest(model: nn.Module) -> str:
    """Digest of a model's weights: a hash over names, types, shapes and bytes of its state dict, in order.

    Supports all number types, sparse and quantised tensors, and the objects that quantised modules store instead of
    tensors.

    Args:
        model: The model, on any device.

    Returns:
        sha256, hex.

    Raises:
        MilanError: The state dict holds an object whose content cannot be read.
    """
    digest = hashlib.sha256()
    needs = "tables need that to tell networks apart; give a network whose state_dict() holds tensors."
    # A state dict may hold any object, and networks may build it themselves.
    with explained(f"the weights of {type(model).__name__} cannot be identified", needs):
        for name, value in model.state_dict().items():
            _add(digest, name, value)
    return digest.hexdigest()


def _add(digest: hashlib._Hash, name: str, value: object) -> None:
    """Adds an entry of a state dict to a digest; of plain tensors, only name, type, shape and bytes.

    Raises:
        Exception: The entry's content cannot be read.
    """
    if isinstance(value, torch.Tensor):
        for part, tensor in _plain_tensors(value):
            digest.update(f"{name}{part} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    elif isinstance(value, tuple | list):
        digest.update(f"{name} {len(value)} items\n".encode())
        for index, item in enumerate(value):
            _add(digest, f"{name}[{index}]", item)
    elif isinstance(value, Mapping):
        digest.update(f"{name} {len(value)} entries\n".encode())
        for key, item in value.items():
            _add(digest, f"{name}[{key!r}]", item)
    elif isinstance(value, torch.ScriptObject):  # packed weights
        _add(digest, f"{name} {value._type()}", value.__getstate__())
    elif isinstance(value, io.BytesIO):
        digest.update(f"{name} {len(value.getvalue())} bytes\n".encode() + value.getvalue())
    elif value is None or isinstance(value, _PLAIN):
        digest.update(f"{name} {value!r}\n".encode())
    else:
        raise TypeError(f"{name} is a {type(value).__name__}")


def _plain_tensors(tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Splits a tensor into CPU tensors whose bytes hold its whole content; most tensors stay one tensor."""
    tensor = tensor.detach()
    if tensor.is_meta:
        raise ValueError("it was built without memory, on the meta device")
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.coalesce()
        parts = {".indices": tensor.indices(), ".values": tensor.values()}
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        parts = {".crow": tensor.crow_indices(), ".col": tensor.col_indices(), ".values": tensor.values()}
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        parts = {".ccol": tensor.ccol_indices(), ".row": tensor.row_indices(), ".values": tensor.values()}
    elif tensor.is_quantized and tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        scale = torch.tensor([tensor.q_scale(), tensor.q_zero_point()], dtype=torch.float64)
        parts = {f" {tensor.dtype}": tensor.int_repr(), ".scale": scale}
    elif tensor.is_quantized:
        scales = {".scales": tensor.q_per_channel_scales(), ".zeros": tensor.q_per_channel_zero_points()}
        parts = {f" {tensor.dtype} {tensor.q_per_channel_axis()}": tensor.int_repr(), **scales}
    elif hasattr(tensor, "__tensor_flatten__"):  # tensor subclasses that hold several tensors, such as packed weights
        inner, rest = tensor.__tensor_flatten__()
        parts = {f" {type(tensor).__name__} {rest!r}.{name}": getattr(tensor, name) for name in inner}
        for name, part in parts.items():
            yield from ((f"{name}{deeper}", plain) for deeper, plain in _plain_tensors(part))
        return
    else:
        parts = {"": tensor.resolve_conj().resolve_neg()}
    if tensor.layout != torch.strided:
        parts = {f" {tuple(tensor.shape)}{name}": part for name, part in parts.items()}
    yield from ((name, part.cpu()) for name, part in parts.items())


def folder_digest(folder: str) -> str:
    """Digest of a model's folder: a hash over names and bytes of all files that model libraries read.

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
