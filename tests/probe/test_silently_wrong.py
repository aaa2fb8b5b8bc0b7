"""Pictures, labels and shards that were read wrongly without a word: right, or one sentence."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, TiffImagePlugin

from milan_ray.errors import MilanError, UnreadableImage
from milan_ray.probe.base import LatentProbe
from milan_ray.probe.decode import probe_image
from milan_ray.probe.files import tell
from milan_ray.probe.manifest import image_refs
from milan_ray.probe.registry import resolve_probe

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)


def png(number: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(PIXELS[number]).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(autouse=True)
def said_anew() -> None:
    tell.cache_clear()


def parquet(file: Path, labels: pa.Array | None, name: str = "label", classes: list[str] | None = None) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    count = 2 if labels is None else len(labels)
    table = pa.table({"image": [png(n) for n in range(count)]} | ({} if labels is None else {name: labels}))
    if classes:
        feature = '{"info": {"features": {"%s": {"_type": "ClassLabel", "names": %s}}}}'
        metadata = {"huggingface": feature % (name, str(classes).replace("'", '"'))}
        table = table.replace_schema_metadata(metadata)
    pq.write_table(table, file)
    return file


def tar(file: Path, members: list[tuple[str, bytes | tuple[bytes, str]]]) -> Path:
    with tarfile.open(file, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, tuple):
                info.type, info.linkname = content
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return file


def listed(*source: Path, **options: str) -> tuple[list[int], list[str | None]]:
    """The numbers of the pictures, and their classes."""
    probe = resolve_probe([str(one) for one in source], **options)
    assert not isinstance(probe, LatentProbe)
    manifest = probe.manifest()
    found = [np.asarray(probe.read(ref).image) for ref in image_refs(manifest)]
    numbers = [next(n for n, one in enumerate(PIXELS) if np.array_equal(one, pixels)) for pixels in found]
    return numbers, manifest["class_label"].to_pylist()


def test_shards_given_twice_count_once(tmp_path, capsys):
    file = parquet(tmp_path / "p/0.parquet", pa.array(["a", "b"]))
    (tmp_path / "q").symlink_to(tmp_path / "p")
    assert listed(tmp_path / "p", file) == listed(file, tmp_path / "q") == ([0, 1], ["a", "b"])
    (tmp_path / "t").mkdir()
    archive = tar(tmp_path / "t/0.tar", [("0.png", png(0)), ("0.cls", b"a"), ("1.png", png(1)), ("1.cls", b"b")])
    assert listed(tmp_path / "t", archive) == ([0, 1], ["a", "b"])
    assert "listed already" in capsys.readouterr().err


def test_members_of_any_name_or_kind_are_read_or_counted(tmp_path, capsys):
    members: list[tuple[str, bytes | tuple[bytes, str]]] = [
        ("/cat/0.png", png(0)), ("a/../1.png", png(1)), ("../2.png", png(2)), ("./dog/./3.png", png(3)),
        ("dog/4.png", (tarfile.LNKTYPE, "/cat/0.png")), ("dog/5.png", (tarfile.SYMTYPE, "../cat/0.png")),
        ("dog/6.png", (tarfile.LNKTYPE, "none.png")), ("pipe", (tarfile.FIFOTYPE, "")),
    ]  # fmt: skip
    assert listed(tar(tmp_path / "a.tar", members)) == ([0, 3, 0], ["cat", "dog", "dog"])
    told = capsys.readouterr().err
    assert "links 2" in told and "names with .. 2" in told and "devices 1" in told
    folder = tmp_path / "cats"
    (folder / "cat").mkdir(parents=True)
    (folder / "cat/0.png").write_bytes(png(0))
    os.link(folder / "cat/0.png", folder / "cat/4.png")
    assert listed(folder) == ([0, 0], ["cat", "cat"])  # hard links are files in folders, too


def test_parts_that_no_sample_has_are_refused(tmp_path, capsys):
    file = tar(tmp_path / "a.tar", [("0.png", png(0)), ("0.cls", b"a")])
    for option in ("label_column", "image_column"):
        with pytest.raises(MilanError, match="they have cls, png"):
            listed(file, **{option: "nope"})
    assert listed(tar(tmp_path / "b.tar", [("0.png", png(0)), ("1.png", png(1)), ("0.cls", b"a")]))[1] == [None, None]
    told = capsys.readouterr().err
    assert "1 labels" in told and "follow each other" in told and "2 of 2 images" in told
    with pytest.raises(MilanError, match="is no JSON"):
        listed(tar(tmp_path / "c.tar", [("0.png", png(0)), ("0.json", b"[" * 100_000)]))
    with pytest.raises(MilanError, match="ends at the first"):
        listed(tar(tmp_path / "d.tar", [("a.1.png", png(0)), ("a.2.png", png(1))]))


@pytest.mark.parametrize(
    ("labels", "classes", "expected"),
    [
        (pa.array([1.0, float("nan")]), ["cat", "dog"], ["dog", None]),
        (pa.array([1.0, 2.0]), None, ["1", "2"]),
        (pa.array([0.5, None]), None, ["0.5", None]),
        (pa.array(["Käse".encode(), b"b"]), None, ["Käse", "b"]),
        (pa.array([0, -1]), ["cat", "dog"], ["cat", None]),
        (pa.array(["a", "b"]).dictionary_encode(), None, ["a", "b"]),
    ],
)
def test_classes_of_any_type_are_their_names(labels, classes, expected, tmp_path, capsys):
    assert listed(parquet(tmp_path / "a.parquet", labels, classes=classes), image_column="image")[1] == expected
    assert ("1 of 2 images" in capsys.readouterr().err) == (None in expected)


@pytest.mark.parametrize("labels", [pa.array([["a"], ["b"]]), pa.array([{"a": 1}, {"a": 2}]), pa.array([b"\xff", b""])])
def test_columns_that_are_no_classes_are_refused(labels, tmp_path):
    with pytest.raises(MilanError, match="--label-column"):
        listed(parquet(tmp_path / "a.parquet", labels), image_column="image")


def test_missing_and_mixed_classes_are_said_or_refused(tmp_path, capsys):
    parquet(tmp_path / "a/0.parquet", pa.array([0, 1]), classes=["cat", "dog"])
    parquet(tmp_path / "a/1.parquet", pa.array([0, 1]), classes=["dog", "cat"])
    with pytest.raises(MilanError, match="has other classes"):
        listed(tmp_path / "a")
    parquet(tmp_path / "b/0.parquet", pa.array(["cat", "dog"]), "Label")
    assert listed(tmp_path / "b")[1] == [None, None]
    told = capsys.readouterr().err
    assert "Label may be meant" in told and "2 of 2 images" in told
    for place in ("c/0.png", "c/cat/1.png"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_bytes(png(0))
    assert listed(tmp_path / "c")[1] == [None, "cat"]
    assert "1 of 2 images" in capsys.readouterr().err
    twice = pa.Table.from_arrays([pa.array([png(0)]), pa.array([png(1)])], ["image", "image"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(MilanError, match="two columns 'image'"):
        listed(tmp_path / "twice.parquet")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("file,label\n1.png,cat\n", "may be a/1.png or b/1.png"),
        ('file,label\na/1.png,"cat\nb/1.png,dog\n', "no CSV"),
        ('a/1.png,"cat\nb/1.png,dog\n', "no CSV"),
        ("file,label\na/1.png,cat, big\nb/1.png,dog\n", "more than the first line's 2"),
        ("file,label\na/1.png,c\0at\n", "control characters|cannot read"),
    ],
)
def test_labels_that_can_be_meant_in_two_ways_are_refused(text, match, tmp_path):
    for place in ("p/a/1.png", "p/b/1.png"):
        (tmp_path / place).parent.mkdir(parents=True)
        (tmp_path / place).write_bytes(png(0))
    (tmp_path / "l.csv").write_text(text)
    with pytest.raises(MilanError, match=match):
        listed(tmp_path / "p", labels=str(tmp_path / "l.csv"))


def tiff(pixels: np.ndarray, **tags: int) -> bytes:
    """A TIFF file whose tags are changed behind Pillow's back."""
    out, info = io.BytesIO(), TiffImagePlugin.ImageFileDirectory_v2()
    info[339] = 1
    Image.fromarray(pixels).save(out, "TIFF", tiffinfo=info)
    data = bytearray(out.getvalue())
    numbers = {"photometric": 262, "sampleformat": 339}
    changed = {numbers[name]: value for name, value in tags.items()}
    start = int.from_bytes(data[4:8], "little")
    for entry in range(int.from_bytes(data[start : start + 2], "little")):
        place = start + 2 + 12 * entry
        number = int.from_bytes(data[place : place + 2], "little")
        if number in changed:
            data[place + 8 : place + 10] = changed.pop(number).to_bytes(2, "little")
    assert not changed
    return bytes(data)


def test_inverted_16_bit_tiff_is_turned_round():
    pixels = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    plain, turned = tiff(pixels), tiff(65535 - pixels, photometric=0)
    assert (np.asarray(probe_image(plain).image) == np.asarray(probe_image(turned).image)).all()


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_signed_tiff_is_unreadable(kind):
    probe_image(tiff(np.full((8, 8), 200, kind), sampleformat=1))
    with pytest.raises(UnreadableImage, match="signed pixels"):
        probe_image(tiff(np.full((8, 8), 200, kind), sampleformat=2))


def test_files_that_pillow_misreads_are_unreadable(tmp_path):
    Image.fromarray(PIXELS[0]).quantize(64).save(tmp_path / "a.pcx")
    data = (tmp_path / "a.pcx").read_bytes()
    probe_image(data)
    with pytest.raises(UnreadableImage, match="palette is missing"):
        probe_image(data[:-769])
