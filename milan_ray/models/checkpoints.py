"""Reads checkpoints of any training framework as plain data: only tensors and their bytes are used."""

from __future__ import annotations

import collections
import io
import itertools
import math
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import load_file

from milan_ray.errors import MilanError, reason
from milan_ray.tensorfiles import check_sizes

_DEPTH = 8
"""Maximum depth of nested dicts, lists and tuples."""

_MOST = 20_000
"""Maximum number of dicts, lists and tuples to search: a small file may hold the same one in many places."""

_NO_WEIGHTS = re.compile(
    r"(amp_?|grad_?)?(optim|optimi[sz]ers?|(lr_?)?sched(uler)?s?|scalers?|callbacks|loops)"
    r"(_?(states?|dict|scalers?|schedulers?|[gd]|gen(erator)?|disc(riminator)?|\d+))*"
)
"""Names of checkpoint entries that hold tensors of the training state, not of a network."""


class Ignored:
    """Placeholder for an object in a file. All operations that the file requests on it do nothing."""

    def __new__(cls, *_: object, **__: object) -> Ignored:
        """Creates an empty placeholder."""
        return object.__new__(cls)

    def __init__(self, *_: object, **__: object) -> None: ...

    def __call__(self, *_: object, **__: object) -> Ignored:
        """Does nothing."""
        return self

    append = extend = add = __setitem__ = __setstate__ = __call__


class _Stored(Ignored):
    """A tensor that is not read yet: its type, its shape and the place of its bytes."""

    def __init__(
        self,
        read: Callable[[], torch.Tensor],
        numbers: int,
        dtype: torch.dtype,
        offset: int,
        shape: tuple[int, ...],
        stride: tuple[int, ...],
    ) -> None:
        # Strides of 0, or many copies of one storage, could make a small file fill the memory.
        if math.prod(shape) > numbers:
            raise ValueError(f"a tensor of shape {shape} in {numbers} numbers")
        self._read, self.dtype, self.offset, self.shape, self.stride = read, dtype, offset, shape, stride

    def tensor(self) -> torch.Tensor:
        return torch.as_strided(self._read(), self.shape, self.stride, self.offset)  # checks that it stays inside


@dataclass(frozen=True)
class StateDict:
    """A state dict in a checkpoint.

    Attributes:
        address: The keys that lead to it, joined by dots; empty where it is the whole file.
        shapes: Names → shapes of its tensors, in order.
        others: Names of its entries that are not tensors.
    """

    address: str
    shapes: dict[str, tuple[int, ...]]
    others: tuple[str, ...]
    _entries: Mapping[str, Any] = field(repr=False)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Reads all tensors, onto the CPU."""
        return {name: _tensor(self._entries[name]) for name in self.shapes}


@dataclass(frozen=True)
class Checkpoint:
    """The content of a weights file.

    Attributes:
        path: The file.
        states: Its state dicts, outer ones first.
        ignored: Classes and functions that the file names and that were ignored, e.g. ``argparse.Namespace``.
    """

    path: str
    states: tuple[StateDict, ...]
    ignored: tuple[str, ...] = ()


def read_checkpoint(path: str) -> Checkpoint:
    """Reads a ``.pth``, ``.pt``, ``.ckpt`` or ``.safetensors`` file.

    No code in it is executed. Where torch's restricted reader rejects a file because it holds objects besides tensors
    (a ``Namespace`` of options, numpy numbers, callbacks), these objects are ignored.

    Raises:
        MilanError: The file is missing or damaged, or holds no state dict.
    """
    if not Path(path).is_file():
        raise MilanError(f"no weights file at {path}: give the path of a .pth, .pt, .ckpt or .safetensors file.")
    ignored: set[str] = set()
    try:
        check_sizes(path)
        if path.endswith(".safetensors"):
            content: object = load_file(path)
        else:
            try:
                content = torch.load(path, map_location="cpu", weights_only=True)
            except pickle.UnpicklingError:
                if not zipfile.is_zipfile(path):
                    raise
                content = _read_ignoring(path, ignored)
        states = tuple(_states(content, "", _DEPTH, itertools.count()))
    except pickle.UnpicklingError as error:
        raise MilanError(
            f"weights file {path} is damaged or holds more than tensors, which is never executed: save the model's "
            "state_dict() again."
        ) from error
    except Exception as error:  # whatever a damaged file may raise inside the readers
        raise MilanError(f"weights file {path} cannot be read ({reason(error)}): fetch or save it again.") from error
    if not states:
        objects = f" but {', '.join(sorted(ignored)[:3])}, which is never executed" if ignored else ""
        raise MilanError(
            f"weights file {path} holds no state dict (names → tensors){objects}: save the model's state_dict()."
        )
    return Checkpoint(path, states, tuple(sorted(ignored)))


def _states(content: object, address: str, depth: int, seen: Iterator[int]) -> Iterator[StateDict]:
    """Yields the state dicts in a file's content; the depth is limited because a dict may contain itself."""
    if not isinstance(content, dict | list | tuple) or not depth:
        return
    if next(seen) >= _MOST:
        raise ValueError(f"it holds more than {_MOST} dicts and lists")
    if not isinstance(content, dict):
        for number, value in enumerate(
            tuple.__iter__(content) if isinstance(content, tuple) else list.__iter__(content)
        ):
            yield from _states(value, f"{address}.{number}" if address else str(number), depth - 1, seen)
        return
    # Called on the class, because a file may set attributes on its dicts, such as one called "items".
    entries = {name: value for name, value in dict.items(content) if isinstance(name, str)}
    shapes = {name: tuple(value.shape) for name, value in entries.items() if _is_tensor(value)}
    if shapes and len(entries) == len(content):
        others = tuple(name for name, value in entries.items() if name not in shapes and not isinstance(value, dict))
        yield StateDict(address, shapes, others, entries)
    for name, value in entries.items():
        if _NO_WEIGHTS.fullmatch(name.lower()) is None:
            yield from _states(value, f"{address}.{name}" if address else name, depth - 1, seen)


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor | _Stored)


def _tensor(value: torch.Tensor | _Stored) -> torch.Tensor:
    return value.tensor() if isinstance(value, _Stored) else value


STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}
"""torch's classes of storages, which files of ``torch.save`` name, → the type of their numbers."""


def index_of(archive: zipfile.ZipFile, path: str | Path) -> str:
    """The name of the pickle in a zip of ``torch.save``.

    Raises:
        ValueError: The zip unpacks to more bytes than the file has.
        pickle.UnpicklingError: It is no file of ``torch.save``.
    """
    entries = archive.infolist()
    packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    if packed or sum(entry.file_size for entry in entries) > Path(path).stat().st_size:
        raise ValueError("it unpacks to more than it holds")
    indices = [entry.filename for entry in entries if entry.filename.endswith("/data.pkl")]
    if len(indices) != 1:
        raise pickle.UnpicklingError("not a file of torch.save")
    return indices[0]


def numbers_of(content: bytes, dtype: torch.dtype) -> torch.Tensor:
    """The numbers in the bytes of a storage, (n,)."""
    raw = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
    return raw.view(dtype)


def _read_ignoring(path: str, ignored: set[str]) -> object:
    """Reads a file of ``torch.save``; adds the names of classes and functions that it ignores to ``ignored``.

    Raises:
        Exception: Anything that readers raise on invalid content.
    """
    with zipfile.ZipFile(path) as archive:
        index = index_of(archive, path)
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
        return _Reader(io.BytesIO(archive.read(index)), path, index.removesuffix("data.pkl"), sizes, ignored).load()


# Python's own implementation of the reader: the one in C reserves as much memory as a number in the file requests.
class _Reader(pickle._Unpickler):
    """Reads a pickle that may name any object: tensors are recorded, everything else becomes :class:`Ignored`."""

    def __init__(self, file: BinaryIO, path: str, root: str, sizes: Mapping[str, int], ignored: set[str]) -> None:
        super().__init__(file)
        self._path, self._root, self._sizes, self._ignored = path, root, sizes, ignored
        self._storages: dict[tuple[str, torch.dtype], torch.Tensor] = {}
        # A pickle may set attributes on a class or function, so each file gets its own class.
        self._class = type("Ignored", (Ignored,), {})

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return lambda *items: collections.OrderedDict(*items)
        if module in ("torch", "torch.storage") and name in STORAGES:
            return STORAGES[name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) in (("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_tensor_v3")):
            return _rebuilt
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda data, *_: data
        self._ignored.add(f"{module}.{name}")
        return type(name, (self._class,), {})

    def persistent_load(self, pid: Any) -> tuple[Callable[[torch.dtype], torch.Tensor], int, torch.dtype]:
        kind, dtype, key, _, _ = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise ValueError(f"a reference to {kind!r}")
        name = f"{self._root}data/{key}"

        def read(of: torch.dtype) -> torch.Tensor:
            if (name, of) not in self._storages:
                with zipfile.ZipFile(self._path) as archive:
                    self._storages[name, of] = numbers_of(archive.read(name), of)
            return self._storages[name, of]

        return read, self._sizes[name], dtype


def _rebuilt(storage: Any, offset: int, shape: Any, stride: Any, *rest: Any) -> _Stored:
    read, size, dtype = storage
    # Types newer than typed storages come as the last argument, after requires_grad and hooks.
    dtype = next((item for item in rest if isinstance(item, torch.dtype)), dtype)
    return _Stored(lambda: read(dtype), size // dtype.itemsize, dtype, int(offset), tuple(shape), tuple(stride))
