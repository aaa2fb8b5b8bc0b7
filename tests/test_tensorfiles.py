"""F4: what files of tensors claim is compared with what they hold, before anything is allocated."""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from milan_ray.annotations.layout import _array
from milan_ray.errors import MilanError
from milan_ray.models.weights import read_state_dict
from milan_ray.probe.latents import LatentFiles
from milan_ray.tensorfiles import check_sizes

HUGE = 2**32
"""Numbers that a small file claims: 16 GiB as float32."""


def array_header(shape: tuple[int, ...], version: int = 1) -> bytes:
    text = repr({"descr": "<f4", "fortran_order": False, "shape": shape}).encode() + b"\n"
    width = "<H" if version == 1 else "<I"
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack(width, len(text)) + text


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def torch_file(legacy: bool) -> bytes:
    buffer = io.BytesIO()
    state = {"weight": torch.zeros(7001), "other": torch.zeros(3, dtype=torch.int64), "again": torch.ones(7001)}
    torch.save(state, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def claiming(data: bytes) -> bytes:
    """A torch file whose last tensor claims more numbers; the archive around it is written anew."""
    small, large = b"M" + struct.pack("<H", 7001), b"\x8a\x05" + HUGE.to_bytes(5, "little")
    if not zipfile.is_zipfile(io.BytesIO(data)):
        return data.replace(small, large)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    return zipped({name: data.replace(small, large) for name, data in members.items()})


def tensors_header() -> bytes:
    header = {"x": {"dtype": "F32", "shape": [HUGE], "data_offsets": [0, 4 * HUGE]}}
    return struct.pack("<Q", len(text := json.dumps(header).encode())) + text


CLAIMS = {
    "shape.npy": array_header((HUGE,)) + bytes(64),
    "shape2.npy": array_header((HUGE, 3), 2) + bytes(64),
    "header.npy": b"\x93NUMPY\2\0" + struct.pack("<I", 2**32 - 1) + bytes(64),
    "shape.npz": zipped({"x.npy": array_header((HUGE,)) + bytes(64)}),
    "zip.pth": claiming(torch_file(legacy=False)),
    "legacy.pth": claiming(torch_file(legacy=True)),
    "header.safetensors": struct.pack("<Q", 2**34) + b"{}",
    "shape.safetensors": tensors_header(),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_f4_latents_that_claim_16_gib_are_one_sentence(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(CLAIMS[name])
    with pytest.raises(
        MilanError, match=rf"{name} cannot be read as tensors \(.*(claims|header|offset|Header|Incomplete)"
    ):
        LatentFiles([file]).manifest()


@pytest.mark.parametrize("name", [name for name in CLAIMS if not name.endswith(("npy", "npz"))])
def test_f4_weights_that_claim_16_gib_are_one_sentence(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(CLAIMS[name])
    with pytest.raises(MilanError, match=rf"{name} cannot be read \(.*(claims|header|Header|Incomplete)"):
        read_state_dict(str(file))


def test_f4_arrays_of_annotations_that_claim_16_gib_are_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "images.npy"
    file.write_bytes(CLAIMS["shape.npy"])
    with pytest.raises(MilanError, match=r"is no complete \.npy array .*claims 17,179,869,184 bytes"):
        _array(file)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (np.array(["2026-11-28"], "datetime64[D]"), "dates"),
        (np.array([3], "timedelta64[s]"), "durations"),
        (np.array(["a", "bc"]), "texts"),
        (np.array([b"a"]), "byte strings"),
        (np.zeros(2, [("x", "f4")]), "records"),
    ],
)
@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_f4_latents_that_are_no_numbers_are_one_sentence(
    tmp_path: Path, values: np.ndarray, told: str, kind: str
) -> None:
    file = tmp_path / f"z.{kind}"
    np.save(file, values) if kind == "npy" else np.savez(file, values)
    with pytest.raises(MilanError, match=rf"z\.{kind} holds {told} \(.*\) where numbers should be"):
        LatentFiles([file]).manifest()


def test_latents_of_the_other_byte_order_are_read(tmp_path: Path) -> None:
    np.save(tmp_path / "z.npy", np.arange(3, dtype=">f4"))
    probe = LatentFiles([tmp_path / "z.npy"])
    assert len(probe.manifest()) == 3


def test_sound_files_of_every_kind_pass(tmp_path: Path) -> None:
    state = {"a": torch.zeros(300, 5), "b": torch.zeros(3, dtype=torch.int64), "c": torch.zeros(0)}
    state["view"] = state["a"][10:20]
    for legacy in (False, True):
        for protocol in (2, 4):
            torch.save(state, tmp_path / "z.pth", _use_new_zipfile_serialization=not legacy, pickle_protocol=protocol)
            check_sizes(tmp_path / "z.pth")
            if protocol == 2:  # torch reads no other without executing it
                assert read_state_dict(str(tmp_path / "z.pth")).keys() == state.keys()
    save_file({"a": state["a"]}, tmp_path / "z.safetensors")
    np.save(tmp_path / "z.npy", np.asfortranarray(np.zeros((3, 4))))
    np.savez_compressed(tmp_path / "z.npz", np.zeros((1000, 100)), np.float32(3))
    (tmp_path / "short.pth").write_bytes(b"")
    for file in sorted(os.listdir(tmp_path)):
        check_sizes(tmp_path / file)
