"""F4: what files of tensors claim is compared with what they hold, before anything is allocated."""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from milan_ray import tensorfiles
from milan_ray.annotations.layout import _array
from milan_ray.errors import MilanError
from milan_ray.models.weights import read_state_dict
from milan_ray.probe.labelled import _numbers, read_legend
from milan_ray.probe.latents import LatentFiles
from milan_ray.probe.registry import resolve_probe
from milan_ray.studies.auditing.statistics import read_review
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
def test_latents_that_claim_16_gib_are_one_sentence(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(CLAIMS[name])
    with pytest.raises(
        MilanError, match=rf"{name} cannot be read as tensors \(.*(claims|header|offset|Header|Incomplete)"
    ):
        LatentFiles([file]).manifest()


@pytest.mark.parametrize("name", [name for name in CLAIMS if not name.endswith(("npy", "npz"))])
def test_weights_that_claim_16_gib_are_one_sentence(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(CLAIMS[name])
    with pytest.raises(MilanError, match=rf"{name} cannot be read \(.*(claims|header|Header|Incomplete)"):
        read_state_dict(str(file))


def test_arrays_of_annotations_that_claim_16_gib_are_one_sentence(tmp_path: Path) -> None:
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
def test_latents_that_are_no_numbers_are_one_sentence(tmp_path: Path, values: np.ndarray, told: str, kind: str) -> None:
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


def deflated(total: int) -> bytes:
    """An archive that unpacks to zeros: a directory says how many."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", array_header((total // 4,)) + bytes(total))
    return buffer.getvalue()


@pytest.mark.parametrize("ending", ["ckpt", "bin", "pkl", ""])
@pytest.mark.parametrize("legacy", [True, False])
def test_weights_are_compared_with_their_size_whatever_their_ending(tmp_path: Path, ending: str, legacy: bool) -> None:
    file = tmp_path / f"weights.{ending}".rstrip(".")
    file.write_bytes(claiming(torch_file(legacy=legacy)))
    with pytest.raises(MilanError, match=r"weights.* cannot be read \(.*claims 34,359,738,368|claims 17,179,869,184"):
        read_state_dict(str(file))


@pytest.mark.parametrize("name", ["shape.npz", "shape.pth", "shape.pt"])
def test_arrays_with_another_files_ending_are_compared_too(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(CLAIMS["shape.npy"])
    with pytest.raises(ValueError, match="claims 17,179,869,184 bytes"):
        check_sizes(file)


def test_arrays_of_version_3_are_compared_too(tmp_path: Path) -> None:
    file = tmp_path / "z.npy"
    file.write_bytes(array_header((HUGE,), 3) + bytes(64))
    with pytest.raises(ValueError, match="claims 17,179,869,184 bytes"):
        check_sizes(file)
    file.write_bytes(array_header((16,), 3) + bytes(64))
    check_sizes(file)
    assert np.load(file).shape == (16,)
    file.write_bytes(b"\x93NUMPY\3\0" + struct.pack("<I", 9) + b"{'shape':")
    with pytest.raises(ValueError, match="header is damaged"):
        check_sizes(file)


def test_archives_that_unpack_to_more_than_the_memory_are_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "z.npz"
    file.write_bytes(deflated(4_000_000))
    check_sizes(file)
    monkeypatch.setattr(tensorfiles, "_memory", lambda: 1_000_000)
    with pytest.raises(MilanError, match=r"unpacks to 4,000,\d+ bytes, and this machine has 1,000,000 of memory"):
        LatentFiles([file]).manifest()


def test_tables_of_images_that_claim_too_much_are_one_sentence(tmp_path: Path) -> None:
    sound = pa.table({"image": [os.urandom(5000) for _ in range(3)], "label": ["a", "b", "c"]})
    for name, ending in (("rows", "parquet"), ("rows", "arrow")):
        file = tmp_path / f"{name}.{ending}"
        if ending == "parquet":
            pq.write_table(pa.table({"image": pa.nulls(300_000, pa.binary())}), file)
        else:
            with pa.ipc.new_file(file, pa.schema([("image", pa.null())])) as writer:
                writer.write_batch(pa.record_batch({"image": pa.nulls(2**20)}))
        with pytest.raises(MilanError, match=rf"cannot read .*{name}\.{ending} \(it claims [\d,]+ rows"):
            resolve_probe((str(file),)).manifest()
    file = tmp_path / "columns.parquet"
    pq.write_table(sound, file)
    data = file.read_bytes()
    file.write_bytes(data[:4] + data[-(8 + int.from_bytes(data[-8:-4], "little")) :])
    with pytest.raises(
        MilanError, match=r"cannot read .*columns\.parquet \(its footer claims more than the file holds"
    ):
        resolve_probe((str(file),)).manifest()


def test_huge_fields_and_numbers_of_csv_files_are_one_sentence(tmp_path: Path) -> None:
    field = "x" * 200_000
    legend = tmp_path / "legend.csv"
    for line, told in ((f"1,{field}", "is no CSV"), (f"{'9' * 5000},cat", "is no legend"), ("²,cat", "is no legend")):
        legend.write_text(line + "\n")
        with pytest.raises(MilanError, match=told):
            read_legend(legend)
    with pytest.raises(MilanError, match=r"review\.csv is no CSV \(field larger than field limit"):
        read_review(f"model,layer,unit,description,verdict,note,card\n{field},", "review.csv")


def test_label_maps_that_are_no_images_are_one_sentence(tmp_path: Path) -> None:
    huge = Image.new("L", (8, 8))
    huge.save(tmp_path / "map.png")
    data = (tmp_path / "map.png").read_bytes()
    header = b"IHDR" + struct.pack(">II", 40_000, 40_000) + data[24:29]
    bomb = data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
    for content in (bomb, data[:30], b"", b"\x89PNG\r\n\x1a\n" + bytes(40), data[:-20] + bytes(20)):
        (tmp_path / "map.png").write_bytes(content)
        with pytest.raises(MilanError, match=r"cannot read the label map .*map\.png"):
            _numbers(tmp_path / "map.png")
