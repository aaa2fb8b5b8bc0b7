"""Probes of a generator's inputs: tensors in files, one row per image (MILAN's ``TensorDatasetOnDisk``)."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import load_file

from milan_ray.errors import MilanError, explained
from milan_ray.probe.base import ImageRef
from milan_ray.probe.manifest import Entry, build
from milan_ray.tensorfiles import check_sizes, describe_dtype

EXTENSIONS = (".pth", ".pt", ".npy", ".npz", ".safetensors")
"""File name endings of tensor files."""


class LatentFiles:
    """Tensors of equal length in one or several files; the rows ``i`` of all tensors generate image ``i``.

    Files are memory-mapped if their format allows it (all but ``.npz`` and old ``.pth``), so that only the requested
    rows are read. Pickled code is not executed.
    """

    def __init__(self, sources: Sequence[str | Path]) -> None:
        """Stores the paths; reads no files.

        Args:
            sources: One folder, or several files in the order of the generator's arguments. A folder's tensors are
                ordered floating-point first (MILAN's order: codes, then classes), then by file name.
        """
        self._sources = tuple(str(Path(source).expanduser().resolve()) for source in sources)
        self.name = "+".join(Path(source).name for source in self._sources)

    def manifest(self) -> pa.Table:
        """Lists the rows; their version tag covers the names, sizes and modification times of all files.

        Raises:
            MilanError: The files do not exist, hold no tensors, or hold tensors of different lengths.
        """
        files = self._files()
        identity = hashlib.sha256()
        for file in files:
            status = file.stat()
            identity.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
        root, etag = "+".join(self._sources), identity.hexdigest()[:16]
        return build([Entry(root, str(row), etag=etag) for row in range(len(self._tensors(files)[0]))])

    def latents(self, refs: Sequence[ImageRef]) -> tuple[torch.Tensor, ...]:
        """The given rows of every tensor.

        Raises:
            MilanError: The files have fewer rows than before.
        """
        tensors = self._tensors(self._files())
        rows = torch.tensor([int(ref.path) for ref in refs], dtype=torch.int64)
        if len(rows) and int(rows.max()) >= len(tensors[0]):
            raise MilanError(f"{self.name} has only {len(tensors[0])} rows now: run the job again.")
        return tuple(tensor[rows] for tensor in tensors)

    def concept_maps(self, ref: ImageRef) -> dict[str, np.ndarray] | None:
        """None: this probe has no concept maps."""
        return None

    def _files(self) -> list[Path]:
        first = Path(self._sources[0])
        files = latent_files(first) if first.is_dir() else [Path(source) for source in self._sources]
        if not files:
            raise MilanError(f"no tensors in {first}: looked for files ending in {', '.join(EXTENSIONS)}.")
        missing = next((file for file in files if not file.is_file()), None)
        if missing is not None:
            raise MilanError(f"no file {missing}: give a folder of tensors, or one or several files of them.")
        return files

    def _tensors(self, files: Sequence[Path]) -> tuple[torch.Tensor, ...]:
        named = _open(tuple(files), tuple(file.stat().st_mtime_ns for file in files))
        lengths = {name: len(tensor) if tensor.ndim else 0 for name, tensor in named}
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            told = ", ".join(f"{name} {length}" for name, length in lengths.items())
            raise MilanError(
                f"the tensors of {', '.join(self._sources)} have {told} rows: give each as many, one row per image."
            )
        tensors = [tensor for _, tensor in named]
        if Path(self._sources[0]).is_dir():
            tensors.sort(key=lambda tensor: not tensor.dtype.is_floating_point)  # stable: keeps the order by name
        return tuple(tensors)


def latent_files(folder: Path) -> list[Path]:
    """The tensor files directly in a folder, sorted by name."""
    return sorted(
        file for file in folder.iterdir() if file.suffix.lower() in EXTENSIONS and not file.name.startswith(".")
    )


@lru_cache(maxsize=1)
def _open(files: tuple[Path, ...], mtimes: tuple[int, ...]) -> tuple[tuple[str, torch.Tensor], ...]:
    """(name for messages, tensor) of all tensors; modification times are part of the cache key."""
    return tuple(item for file in files for item in _read(file))


def _read(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    with explained(f"{file} cannot be read as tensors", "save the tensors alone."):
        content = _content(file)
    for name, tensor in content.items():
        if not isinstance(tensor, torch.Tensor):
            raise MilanError(
                f"{file} holds a {type(tensor).__name__} where a tensor should be: save the tensors alone."
            )
        yield name, tensor.detach()


def _content(file: Path) -> dict[str, object]:
    """A file's content by name; a single tensor has the file's name."""
    kind = file.suffix.lower()
    check_sizes(file)
    if kind == ".safetensors":
        return dict(load_file(file))
    if kind == ".npz":
        with np.load(file, allow_pickle=False) as arrays:
            return {f"{file.name}:{name}": _tensor(file, arrays[name]) for name in arrays.files}
    if kind == ".npy":
        # Copy-on-write rather than read-only, because torch does not support read-only tensors.
        return {file.name: _tensor(file, np.load(file, mmap_mode="c", allow_pickle=False))}
    content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    if isinstance(content, dict):
        return {f"{file.name}:{name}": tensor for name, tensor in content.items()}
    if isinstance(content, (list, tuple)):
        return {f"{file.name}:{place}": tensor for place, tensor in enumerate(content)}
    return {file.name: content}


def _tensor(file: Path, array: np.ndarray) -> torch.Tensor:
    told = describe_dtype(array.dtype)
    if told is not None:
        raise MilanError(f"{file} holds {told} ({array.dtype}) where numbers should be: save the tensors alone.")
    return torch.from_numpy(array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("=")))
