from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from milan_ray.errors import MilanError
from milan_ray.probe.base import ImageRef, LatentProbe
from milan_ray.probe.folder import FolderProbe
from milan_ray.probe.latents import LatentFiles
from milan_ray.probe.manifest import digest, image_refs
from milan_ray.probe.registry import resolve_probe

Z, Y = torch.randn(7, 3, generator=torch.Generator().manual_seed(1)), torch.arange(7)


def written(folder: Path, kind: str) -> list[Path]:
    """Classes and codes on disk, classes first by name."""
    names = {"a classes": Y, "codes": Z}
    files = [folder / f"{name}{kind}" for name in names]
    for file, tensor in zip(files, names.values(), strict=True):
        if kind in (".pth", ".pt"):
            torch.save(tensor, file)
        elif kind == ".npy":
            np.save(file, tensor.numpy())
        elif kind == ".npz":
            np.savez(file, tensor.numpy())
        else:
            save_file({"it": tensor}, file)
    return files


@pytest.mark.parametrize("kind", [".pth", ".pt", ".npy", ".npz", ".safetensors"])
def test_latents_of_a_folder_come_floats_first(tmp_path, kind):
    written(tmp_path, kind)
    probe = resolve_probe([str(tmp_path)])
    assert isinstance(probe, LatentProbe) and len(probe.manifest()) == 7
    z, y = pickle.loads(pickle.dumps(probe)).latents(image_refs(probe.manifest(), [5, 0]))
    assert torch.equal(z, Z[[5, 0]]) and y.tolist() == [5, 0]
    assert probe.concept_maps(image_refs(probe.manifest())[0]) is None


def test_latents_of_files_keep_the_order_given(tmp_path):
    classes, codes = written(tmp_path, ".pth")
    probe = resolve_probe([str(classes), str(codes)])
    assert isinstance(probe, LatentProbe)
    first, second = probe.latents([ImageRef(0, "", "6")])
    assert first.tolist() == [6] and torch.equal(second, Z[6:])
    torch.save({"z": Z, "y": Y}, tmp_path / "both.pth")
    z, y = LatentFiles([tmp_path / "both.pth"]).latents([ImageRef(0, "", "2")])
    assert torch.equal(z, Z[2:3]) and y.tolist() == [2]


def test_latents_are_mapped_not_read(tmp_path):
    codes = written(tmp_path, ".npy")[1]
    probe = LatentFiles([codes])
    refs = image_refs(probe.manifest(), [3])
    before = codes.stat()
    with codes.open("r+b") as file:
        file.seek(-Z.numel() * 4 + 3 * 3 * 4, os.SEEK_END)
        file.write(np.array([9, 9, 9], np.float32).tobytes())
    os.utime(codes, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert probe.latents(refs)[0].tolist() == [[9, 9, 9]]


def test_latents_changed_file_is_another_probe(tmp_path):
    codes = written(tmp_path, ".pth")[1]
    probe = LatentFiles([tmp_path])
    before, last = digest(probe.manifest()), image_refs(probe.manifest())[-1:]
    torch.save(Z[:4], codes)
    torch.save(Y[:4], tmp_path / "a classes.pth")
    assert digest(probe.manifest()) != before
    with pytest.raises(MilanError, match="only 4 rows now"):
        probe.latents(last)


def test_latents_of_different_lengths_are_refused_by_name(tmp_path):
    torch.save(Z, tmp_path / "z.pth")
    torch.save(Y[:5], tmp_path / "y.pth")
    with pytest.raises(MilanError, match=r"y\.pth 5, z\.pth 7 rows"):
        LatentFiles([tmp_path]).manifest()


def test_latents_that_are_no_tensors_are_refused_and_nothing_is_executed(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    torch.save({"z": Bomb()}, tmp_path / "z.pth")
    with pytest.raises(MilanError, match=r"z\.pth cannot be read as tensors"):
        LatentFiles([tmp_path]).manifest()
    assert not (tmp_path / "exploded").exists()
    np.save(tmp_path / "o.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(MilanError, match=r"o\.npy cannot be read"):
        LatentFiles([tmp_path / "o.npy"]).manifest()
    torch.save(["a"], tmp_path / "list.pth")
    with pytest.raises(MilanError, match="a str where a tensor should be"):
        LatentFiles([tmp_path / "list.pth"]).manifest()


def test_latents_missing_or_absent_files_are_named(tmp_path):
    with pytest.raises(MilanError, match="no tensors in"):
        LatentFiles([tmp_path]).manifest()
    with pytest.raises(MilanError, match=r"no file .*gone\.pth"):
        resolve_probe([str(tmp_path / "gone.pth")]).manifest()
    torch.save(Z, tmp_path / "z.pth")
    with pytest.raises(MilanError, match="labels are for images"):
        resolve_probe([str(tmp_path)], labels="labels.csv")


def test_folder_of_images_beside_an_array_stays_a_folder_of_images(tmp_path):
    (tmp_path / "class").mkdir()
    np.save(tmp_path / "features.npy", Z.numpy())
    assert isinstance(resolve_probe([str(tmp_path)]), FolderProbe)
