"""Sizes that files of tensors claim, compared with the files' own before anything is allocated for them."""

from __future__ import annotations

import ast
import io
import math
import os
import pickletools
import struct
import zipfile
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

_INFLATES = 1032
"""Bytes that deflate makes of one at most."""

_MAX_HEADER = 1 << 20
"""Bytes of the header of an array that are read."""

_MAX_INDEX = 1 << 26
"""Bytes of the pickle in an archive of ``torch.save`` that are read in addition to as many as the file has."""

_ARRAY = b"\x93NUMPY"
"""How files of numpy's arrays begin."""

_ITEM = {"Double": 8, "Long": 8, "ComplexFloat": 8, "ComplexDouble": 16, "Float": 4, "Int": 4, "Half": 2, "Short": 2,
         "BFloat16": 2}  # fmt: skip
"""Bytes of a number in torch's storages; 1 in others."""


def check_sizes(path: str | Path) -> None:
    """Compares what a file of arrays, of safetensors or of ``torch.save`` claims with what it holds.

    What kind of file it is says its content, as for those who read it; but safetensors are known by their ending. What
    is no such file at all is left to its reader.

    Raises:
        ValueError: It claims more than it holds.
        OSError: It cannot be read.
    """
    path = Path(path)
    size = path.stat().st_size
    kind = path.suffix.lower()
    with path.open("rb") as file:
        if kind == ".safetensors":
            (header,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
            _claim(header, size - 8, "its header")
            return
        is_array = file.read(6) == _ARRAY
        file.seek(0)
        if is_array:
            _check_array(file, size)
        elif zipfile.is_zipfile(file):
            _check_archive(file, size, arrays=kind in (".npz", ".npy"))
        else:
            file.seek(0)
            _check_pickles(file, size)


def _check_archive(file: BinaryIO, size: int, arrays: bool) -> None:
    with zipfile.ZipFile(file) as archive:
        _claim(sum(entry.compress_size for entry in archive.infolist()), size, "the archive")
        packed = [entry for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
        if (unpacked := sum(entry.file_size for entry in packed)) > (memory := _memory()):
            raise _ClaimsTooMuch(f"it unpacks to {unpacked:,} bytes, and this machine has {memory:,} of memory")
        for entry in archive.infolist():
            _claim(entry.compress_size, size, entry.filename)
            stored = entry.compress_type == zipfile.ZIP_STORED
            _claim(entry.file_size, entry.compress_size * (1 if stored else _INFLATES) + 64, entry.filename)
            if arrays:
                with archive.open(entry) as member:
                    _check_array(io.BytesIO(member.read(min(entry.file_size, _MAX_HEADER))), entry.file_size)
        if not arrays:
            sizes = {entry.filename.rpartition("/data/")[2]: entry.file_size for entry in archive.infolist()}
            for name in archive.namelist():
                if name.endswith("/data.pkl"):
                    _claim(archive.getinfo(name).file_size, size + _MAX_INDEX, name)
                    with archive.open(name) as member:
                        _check_pickles(io.BytesIO(member.read()), size, sizes)


def _check_array(file: BinaryIO, size: int) -> None:
    """Compares an array's header with what there is behind it."""
    magic = file.read(8)
    if magic[:6] != _ARRAY:
        return
    width = 2 if magic[6] == 1 else 4
    (length,) = struct.unpack("<H" if width == 2 else "<I", file.read(width).ljust(width, b"\0"))
    _claim(length, min(size - 8 - width, _MAX_HEADER), "its header")
    file.seek(8)
    version = (magic[6], magic[7])
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    elif version == (3, 0):  # as version 2, with names of fields in UTF-8
        shape, dtype = _header(file.read(4 + length)[4:])
    else:
        return
    if any(side < 0 for side in shape):
        raise ValueError(f"its header claims the shape {shape}")
    if not dtype.hasobject:
        _claim(math.prod(shape) * dtype.itemsize, size - 8 - width - length, "its array")


def _header(text: bytes) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type in an array's header.

    Raises:
        ValueError: It is damaged.
    """
    try:
        header = ast.literal_eval(text.decode())
        return tuple(int(side) for side in header["shape"]), np.lib.format.descr_to_dtype(header["descr"])
    except (SyntaxError, TypeError, KeyError, UnicodeError, RecursionError, MemoryError) as error:
        raise ValueError("its header is damaged") from error


def _memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _check_pickles(file: BinaryIO, size: int, sizes: dict[str, int] | None = None) -> None:
    """Compares the storages that torch's pickles ask for with what there is; nothing is executed.

    Args:
        file: The pickles, one after the other, in a file of before version 1.6 with the numbers behind them.
        size: Bytes that storages may have.
        sizes: Storage → bytes of its record, in later files.
    """
    try:
        while True:
            pushed: list[object] = []
            memo: dict[int, object] = {}
            for opcode, argument, _ in pickletools.genops(file):
                name = opcode.name
                if name in ("BINPERSID", "PERSID"):
                    _check_storage(pushed, size, sizes)
                    pushed = []
                elif name == "MEMOIZE":
                    memo[len(memo)] = pushed[-1] if pushed else None
                elif name.endswith("PUT"):
                    memo[int(str(argument))] = pushed[-1] if pushed else None
                elif name.endswith("GET"):
                    pushed.append(memo.get(int(str(argument))))
                elif name == "GLOBAL":
                    pushed.append(_Name(str(argument).rpartition(" ")[2]))
                elif name == "STACK_GLOBAL":
                    pushed.append(_Name(next((value for value in reversed(pushed) if type(value) is str), "")))
                elif argument is not None:
                    pushed.append(argument)
            if sizes is not None:
                return
    except _ClaimsTooMuch:
        raise
    except Exception:  # no pickle, or the end of them: the reader says what is wrong
        return


def _check_storage(pushed: list[object], size: int, sizes: dict[str, int] | None) -> None:
    """Compares a storage, ``("storage", type, key, location, numbers)``, with what there is."""
    numbers = [value for value in pushed if type(value) is int]
    if not numbers:
        return
    names = [value for value in pushed if isinstance(value, _Name)]
    item = _ITEM.get(names[-1].removesuffix("Storage"), 1) if names else 1
    keys = [value for value in pushed if type(value) is str]
    records = [] if sizes is None else [sizes[key] for key in keys if key in sizes]
    _claim(numbers[-1] * item, max(records, default=size), "a tensor")


class _Name(str):
    """The name of something that a pickle refers to."""


class _ClaimsTooMuch(ValueError):
    """A size that cannot be."""


def _claim(claimed: int, there: int, what: str) -> None:
    if claimed > there:
        raise _ClaimsTooMuch(f"{what} claims {claimed:,} bytes, and the file has {max(there, 0):,}")


def describe_dtype(dtype: np.dtype) -> str | None:
    """What an array holds that no tensor can; None for numbers and booleans."""
    kinds = {"M": "dates", "m": "durations", "U": "texts", "S": "byte strings", "V": "records", "O": "objects"}
    return kinds.get(dtype.kind)


def check_groups(metadata: pq.FileMetaData, size: int) -> None:
    """Compares what the footer of a Parquet file claims of its rows and columns with what the file holds.

    Args:
        metadata: The footer.
        size: Bytes of the file.

    Raises:
        pa.ArrowInvalid: It claims more, or contradicts itself.
    """
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    if sum(group.num_rows for group in groups) != metadata.num_rows:
        raise pa.ArrowInvalid("its footer contradicts itself")
    for group in groups:
        for column in map(group.column, range(group.num_columns)):
            first = column.data_page_offset
            if column.has_dictionary_page and column.dictionary_page_offset is not None:
                first = min(first, column.dictionary_page_offset)
            if min(first, column.total_compressed_size) < 0 or first + column.total_compressed_size > size:
                raise pa.ArrowInvalid("its footer claims more than the file holds")
