"""Zips from elsewhere: unpacked whole, inside their folder, or not at all."""

from __future__ import annotations

import os
import stat
import warnings
import zipfile
from pathlib import Path

import pytest

from milan_ray.annotations.archive import extract
from milan_ray.errors import MilanError


def pack(path: Path, members: dict[str, bytes], kinds: dict[str, int] | None = None) -> Path:
    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # duplicate names are meant
        for name, data in members.items():
            info = zipfile.ZipInfo(name, (2022, 4, 1, 12, 0, 0))
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = (kinds or {}).get(name, stat.S_IFREG | 0o644) << 16
            archive.writestr(info, data)
    return path


def test_extract_sound_zip_gives_its_files_and_times(tmp_path):
    members = {"conv1/masks.npy": b"1", "annotations.csv": b"2", "__MACOSX/x": b"3", "conv1/.DS_Store": b"4"}
    archive = pack(tmp_path / "set.zip", members)
    target = extract(archive, tmp_path / "data/net/photos")
    found = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    assert found == {"conv1/masks.npy", "annotations.csv", ".archive.json"}
    assert (target / "annotations.csv").read_bytes() == b"2"
    first = (target / "annotations.csv").stat()
    assert extract(archive, target) == target
    assert (target / "annotations.csv").stat().st_ino == first.st_ino


def test_extract_newer_zip_replaces_and_keeps_times(tmp_path):
    archive = pack(tmp_path / "set.zip", {"old.csv": b"1", "a.csv": b"1"})
    target = extract(archive, tmp_path / "set")
    times = (target / "a.csv").stat().st_mtime_ns
    pack(archive, {"a.csv": b"1"})
    os.utime(archive, (1, 1))
    extract(archive, target)
    assert not (target / "old.csv").exists()
    assert (target / "a.csv").stat().st_mtime_ns == times


def test_extract_single_folder_inside_is_the_set(tmp_path):
    archive = pack(tmp_path / "set.zip", {"tmp/alexnet/conv1/masks.npy": b"1", "tmp/alexnet/annotations.csv": b"2"})
    target = tmp_path / "set"
    assert extract(archive, target) == extract(archive, target) == target / "tmp/alexnet"


@pytest.mark.parametrize(
    "name", ["../evil", "a/../../evil", "/evil", "\\evil", "..\\evil", "C:evil", "C:\\evil", "\\\\host\\share\\evil"]
)
def test_extract_member_outside_is_refused(tmp_path, name):
    archive = pack(tmp_path / "set.zip", {"good": b"1", name: b"2"})
    with pytest.raises(MilanError, match="outside its folder"):
        extract(archive, tmp_path / "data/set")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["set.zip"]


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFBLK])
def test_extract_links_and_devices_are_refused(tmp_path, kind):
    archive = pack(tmp_path / "set.zip", {"a": b"/etc/passwd"}, {"a": kind | 0o777})
    with pytest.raises(MilanError, match="link or device"):
        extract(archive, tmp_path / "set")


def test_extract_bomb_is_refused_by_what_it_declares(tmp_path):
    archive = pack(tmp_path / "set.zip", {"a": bytes(2**22), "b": bytes(2**22)})
    assert archive.stat().st_size < 20_000
    with pytest.raises(MilanError, match="declares 2 files of 8,388,608 bytes"):
        extract(archive, tmp_path / "set", max_bytes=2**22)
    assert not (tmp_path / "set").exists()


def test_extract_lying_bomb_stops_at_what_it_declares(tmp_path):
    archive = pack(tmp_path / "set.zip", {"a": bytes(2**22)})
    data = archive.read_bytes()
    archive.write_bytes(data.replace((2**22).to_bytes(4, "little"), (100).to_bytes(4, "little")))
    with pytest.raises(MilanError, match="cannot be unpacked"):
        extract(archive, tmp_path / "set")
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"not a zip",
        lambda data: data[: len(data) // 2],
        lambda data: data[:60] + bytes(40) + data[100:],
    ],
)
def test_extract_damaged_zip_leaves_nothing(tmp_path, damage):
    archive = pack(tmp_path / "set.zip", {"a.npy": os.urandom(1000)})
    archive.write_bytes(damage(archive.read_bytes()))
    with pytest.raises(MilanError, match="cannot be unpacked"):
        extract(archive, tmp_path / "set")
    assert [path.name for path in tmp_path.iterdir()] == ["set.zip"]


def test_extract_member_twice_is_refused(tmp_path):
    archive = tmp_path / "set.zip"
    with zipfile.ZipFile(archive, "w") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file.writestr("a", b"1")
        file.writestr("a", b"2")
    with pytest.raises(MilanError, match="cannot be unpacked"):
        extract(archive, tmp_path / "set")


def test_extract_leaves_a_folder_of_other_origin_alone(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/mine").write_text("mine")
    with pytest.raises(MilanError, match="was not unpacked from"):
        extract(pack(tmp_path / "set.zip", {"a": b"1"}), tmp_path / "set")
    assert (tmp_path / "set/mine").read_text() == "mine"


def test_extract_after_a_kill_begins_anew(tmp_path):
    (tmp_path / ".set.part/conv1").mkdir(parents=True)
    (tmp_path / ".set.part/conv1/torso").write_bytes(b"1")
    target = extract(pack(tmp_path / "set.zip", {"a": b"1"}), tmp_path / "set")
    assert sorted(path.name for path in target.iterdir()) == [".archive.json", "a"]
