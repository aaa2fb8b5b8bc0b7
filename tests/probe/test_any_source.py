"""The same images from any source: folders, Parquet, tar, Arrow, PIL objects; links, odd endings, columns, labels."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from milan_ray.errors import MilanError, UnreadableImage
from milan_ray.library.probe_images import ImagesInMemory
from milan_ray.probe.arrays import ParquetProbe
from milan_ray.probe.base import ImageRef, Probe
from milan_ray.probe.decode import FORMATS, IMAGE_FOLDER, decode, heic_is_read, probe_image
from milan_ray.probe.folder import FolderProbe
from milan_ray.probe.manifest import image_refs
from milan_ray.probe.registry import register_probe, resolve_probe

PIXELS = np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8)
RGB = Image.fromarray(PIXELS)


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def drawn(number: int) -> bytes:
    return encode(Image.fromarray(np.roll(PIXELS, number, axis=1)))


def put(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def paths(probe: Probe) -> list[str]:
    return probe.manifest()["path"].to_pylist()


def classes(probe: Probe) -> list[str | None]:
    return probe.manifest()["class_label"].to_pylist()


def pixels(probe: Any) -> list[np.ndarray]:
    return [np.asarray(probe.read(ref).image) for ref in image_refs(probe.manifest())]


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


HUB = {
    "image": {"_type": "Image"},
    "label": {"names": ["cat", "dog"], "_type": "ClassLabel"},
}


def hub_table(images: list[Any], labels: list[Any], **rename: str) -> pa.Table:
    """A table as Hugging Face's ``datasets`` writes it."""
    names = [rename.get(name, name) for name in ("image", "label")]
    info = {"info": {"features": dict(zip(names, HUB.values(), strict=True))}}
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({names[0]: pa.array(images, struct), names[1]: pa.array(labels, pa.int64())})
    return table.replace_schema_metadata({"huggingface": json.dumps(info)})


def save_to_disk(folder: Path, tables: list[pa.Table]) -> Path:
    """A folder as ``datasets.Dataset.save_to_disk`` leaves it."""
    folder.mkdir(parents=True)
    names = [f"data-{n:05d}-of-{len(tables):05d}.arrow" for n in range(len(tables))]
    for name, table in zip(names, tables, strict=True):
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    state = {"_data_files": [{"filename": name} for name in names], "_indices_data_files": None, "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": HUB}))
    return folder


# One decoder.


@pytest.mark.parametrize("mode", ["I;16", "L", "P", "RGBA", "LA", "CMYK", "1", "RGB"])
def test_a_pil_image_gives_what_its_file_gives(mode: str) -> None:
    if mode == "I;16":
        image = Image.fromarray(np.arange(117, dtype=np.uint16).reshape(9, 13) * 560)
    else:
        image = RGB.quantize(9) if mode == "P" else RGB.convert("RGBA").convert(mode) if mode != "RGB" else RGB
    data = encode(image, "TIFF" if mode == "CMYK" else "PNG")
    expected = np.asarray(decode(data))
    for given in (image, Image.open(io.BytesIO(data))):
        probe = ImagesInMemory([given])
        np.testing.assert_array_equal(pixels(probe)[0], expected)


def test_what_a_file_is_refused_for_a_pil_image_is_too() -> None:
    floats = Image.fromarray(np.ones((2, 2), np.float32))
    broken = Image.open(io.BytesIO(encode(RGB)[:-30]))
    for image, reason in ((floats, "floating-point"), (broken, "cannot be decoded")):
        with pytest.raises(UnreadableImage, match=reason):
            ImagesInMemory([image]).read(ImageRef(0, "memory:", "0"))
    with pytest.raises(UnreadableImage, match="32-bit pixels from 0 to 70000"):
        ImagesInMemory([Image.fromarray(np.array([[0, 70_000]], np.int32))]).read(ImageRef(0, "memory:", "0"))


# Links.


@pytest.mark.parametrize("uri", [False, True])
def test_link_to_its_parent_lists_each_folder_once(tmp_path: Path, uri: bool, capsys: Any) -> None:
    root = tmp_path / "photos"
    for name in ("cats/1.png", "dogs/1.png", "dogs/2.png"):
        put(root / name, drawn(0))
    (root / "dogs/all").symlink_to("..")
    (root / "a").symlink_to("dogs")  # before the real folder by name, which wins all the same
    (root / "dogs/3.png").symlink_to("2.png")
    assert paths(FolderProbe([root.as_uri() if uri else root])) == ["cats/1.png", "dogs/1.png", "dogs/2.png"]
    assert "left out 3 links" in capsys.readouterr().err


def test_links_out_of_the_folder_show_each_file_once(tmp_path: Path) -> None:
    for name in ("elsewhere/x/1.png", "root/b/2.png"):
        put(tmp_path / name, drawn(0))
    (tmp_path / "root/far").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root/near").symlink_to(tmp_path / "elsewhere/x")
    (tmp_path / "elsewhere/x/back").symlink_to(tmp_path / "root")
    assert paths(FolderProbe([tmp_path / "root"])) == ["b/2.png", "far/x/1.png"]


def test_overlapping_roots_show_each_file_once(tmp_path: Path) -> None:
    for name in ("a/1.png", "b/2.png"):
        put(tmp_path / name, drawn(0))
    probe = FolderProbe([tmp_path / "b", tmp_path])
    assert paths(probe) == ["2.png", "a/1.png"]


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    put(tmp_path / "a.png", drawn(0))
    for name in ("b.png", "pipe"):
        os.mkfifo(tmp_path / name)
    probe = FolderProbe([tmp_path])
    assert paths(probe) == ["a.png", "b.png"]
    with pytest.raises(UnreadableImage, match="is no plain file"):
        probe.read(image_refs(probe.manifest(), [1])[0])


# Endings.


def test_odd_endings_are_read_by_content_and_the_rest_is_counted(tmp_path: Path, capsys: Any) -> None:
    for name, kind in {"a.jfif": "JPEG", "b.gif": "GIF", "c.avif": "AVIF", "d.jpg": "JPEG", "e": "PNG", "f.jpg_large":
                       "JPEG", "g.dat": "WEBP", "h.txt": "BMP", "i.png": "JPEG", "j.raw": "PPM"}.items():  # fmt: skip
        put(tmp_path / name, encode(RGB, kind))
    for name in ("notes.txt", "P1 list.txt", "clip.mp4", "LICENSE"):
        put(tmp_path / name, b"BM and P5 begin many a text")
    for name in ("Thumbs.db", ".DS_Store", "desktop.ini", "__MACOSX/a.png", "._a.jpg", "x/Thumbs.db"):
        put(tmp_path / name, encode(RGB))
    found = FolderProbe([tmp_path])
    assert "".join(Path(path).stem for path in paths(found)) == "abcdefghij"
    assert {image.shape for image in pixels(found)} == {(9, 13, 3)}
    assert "left out 4 files that are no images" in (told := capsys.readouterr().err)
    assert ".txt 2, .mp4 1, no ending 1" in told and "Thumbs" not in told


def test_images_that_others_know_by_number_are_those_of_imagefolder(tmp_path: Path, capsys: Any) -> None:
    for name, kind in {"a/1.gif": "GIF", "a/2.png": "PNG", "b/3": "PNG", "b/4.webp": "WEBP"}.items():
        put(tmp_path / name, encode(RGB, kind))
    assert paths(FolderProbe([tmp_path], endings=IMAGE_FOLDER)) == ["a/2.png", "b/4.webp"]
    assert "left out 2 files" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["AVIF", "JPEG2000", "TGA", "ICO", "DDS", "PCX", "SGI", "QOI", "DIB", "XBM"])
def test_what_pillow_decodes_is_decoded(kind: str) -> None:
    image = RGB.convert("1") if kind == "XBM" else RGB
    options = {"sizes": [(13, 9)]} if kind == "ICO" else {}
    assert decode(encode(image, kind, **options)).mode == "RGB"
    assert not {"EPS", "WMF", "FITS"} & set(FORMATS)


def test_heic_without_its_package_is_left_out_with_the_remedy(tmp_path: Path, capsys: Any) -> None:
    if heic_is_read():
        pytest.skip("pillow-heif is installed here")
    head = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)
    put(tmp_path / "a.heic", head)
    put(tmp_path / "b.png", drawn(0))
    assert paths(FolderProbe([tmp_path])) == ["b.png"]
    assert "left out 1 file that is no image" in (told := capsys.readouterr().err)
    assert ".heic 1 (pip install 'milan-ray[heic]'" in told
    with pytest.raises(UnreadableImage, match=r"is HEIC: pip install"):
        decode(head)


def test_heic_with_its_package_is_read(tmp_path: Path) -> None:
    heif = pytest.importorskip("pillow_heif", reason="HEIC takes the optional package pillow-heif")
    heif.register_heif_opener()
    RGB.resize((64, 64)).save(tmp_path / "a.heic", "HEIF")
    assert pixels(FolderProbe([tmp_path]))[0].shape == (64, 64, 3)


# Tables and archives.


def test_a_folder_of_shards_gives_images_and_class_names(tmp_path: Path) -> None:
    for n in range(2):
        rows = [{"bytes": drawn(2 * n + i), "path": None} for i in range(2)]
        file = tmp_path / f"data/train-{n:05d}-of-00002.parquet"
        file.parent.mkdir(exist_ok=True)
        pq.write_table(hub_table(rows, [n, -1], image="img", label="fine"), file)
    (tmp_path / "README.md").write_text("about")
    files = [str(file) for file in sorted(tmp_path.glob("data/*"))]
    for given in ([str(tmp_path)], files, [tmp_path.as_uri()]):
        probe = pickle.loads(pickle.dumps(resolve_probe(given)))
        assert classes(probe) == ["cat", None, "dog", None]
        for n, image in enumerate(pixels(probe)):
            np.testing.assert_array_equal(image, np.roll(PIXELS, n, axis=1))


@pytest.mark.parametrize("arrow", [False, True])
def test_paths_are_followed_where_bytes_are_null(tmp_path: Path, arrow: bool) -> None:
    put(tmp_path / "set/images/1.png", drawn(1))
    absolute = put(tmp_path / "far/2.png", drawn(2))
    rows = [
        {"bytes": drawn(0), "path": "0.png"},
        {"bytes": None, "path": "images/1.png"},
        {"bytes": None, "path": str(absolute)},
        {"bytes": None, "path": "images/gone.png"},
        {"bytes": None, "path": "https://example.org/5.png"},
        {"bytes": None, "path": None},
        None,
    ]
    table = hub_table(rows, [0] * 7)
    if arrow:
        save_to_disk(tmp_path / "disk", [table])
        (tmp_path / "disk").rename(tmp_path / "moved")
        (tmp_path / "set/images").rename(tmp_path / "moved/images")
        probe: Any = resolve_probe([str(tmp_path / "moved")])
    else:
        pq.write_table(table, tmp_path / "set/t.parquet")
        probe = resolve_probe([str(tmp_path / "set/t.parquet")])
    manifest = probe.manifest()
    refs = image_refs(manifest)
    for n in range(3):
        np.testing.assert_array_equal(probe.read(refs[n]).image, np.roll(PIXELS, n, axis=1))
    for ref, why in zip(
        refs[3:], ("gone.png, which cannot be read", "nothing is fetched", "is null", "is null"), strict=True
    ):
        with pytest.raises(UnreadableImage, match=why):
            probe.read(ref)
    tags = manifest["etag"].to_pylist()
    os.utime(absolute, ns=(1, 1))
    assert [a == b for a, b in zip(tags, probe.manifest()["etag"].to_pylist(), strict=True)] == [
        True,
        True,
        False,
        *[True] * 4,
    ]


def test_the_column_of_images_is_found_or_asked_for(tmp_path: Path) -> None:
    left, right = [drawn(0)], [drawn(1)]
    pq.write_table(pa.table({"left": left, "right": right, "kind": ["a"]}), tmp_path / "two.parquet")
    with pytest.raises(MilanError, match=r"two\.parquet has several columns .*\(left, right\).*--image-column"):
        resolve_probe([str(tmp_path)]).manifest()
    probe = resolve_probe([str(tmp_path)], image_column="right", label_column="kind")
    np.testing.assert_array_equal(pixels(probe)[0], np.roll(PIXELS, 1, axis=1))
    assert classes(probe) == ["a"]
    with pytest.raises(MilanError, match=r"'kind' of .* holds string, no encoded images"):
        resolve_probe([str(tmp_path)], image_column="kind").manifest()
    pq.write_table(pa.table({"kind": ["a"]}), tmp_path / "two.parquet")
    with pytest.raises(MilanError, match=r"no column of encoded images: it has kind"):
        resolve_probe([str(tmp_path)]).manifest()


def test_columns_are_refused_where_there_are_none(tmp_path: Path) -> None:
    register_probe("tiny/columns", lambda: FolderProbe([tmp_path]))
    with pytest.raises(MilanError, match="has no columns"):
        resolve_probe(["tiny/columns"], image_column="img")
    put(tmp_path / "1.png", drawn(0))
    with pytest.raises(MilanError, match=r"holds images as files: --image-column"):
        resolve_probe([str(tmp_path)], image_column="img").manifest()
    with pytest.raises(MilanError, match="cannot be joined"):
        resolve_probe(["tiny/columns", str(tmp_path)])


def test_save_to_disk_folders_are_read_by_their_state(tmp_path: Path) -> None:
    rows = [{"bytes": drawn(n), "path": None} for n in range(6)]
    folder = save_to_disk(tmp_path / "set/train", [hub_table(rows[:4], [0, 1, 0, 1]), hub_table(rows[4:], [1, 0])])
    put(folder / "cache-1234.arrow", b"no part of it")
    probe = resolve_probe([str(folder)])
    assert classes(probe) == ["cat", "dog", "cat", "dog", "dog", "cat"]
    assert paths(probe)[3:5] == ["data-00000-of-00002.arrow#1:1", "data-00001-of-00002.arrow#0:0"]
    for n, image in enumerate(pixels(probe)):
        np.testing.assert_array_equal(image, np.roll(PIXELS, n, axis=1))
    save_to_disk(tmp_path / "set/test", [hub_table(rows[:1], [0])])
    with pytest.raises(MilanError, match=r"several data sets \(test, train\)"):
        resolve_probe([str(tmp_path / "set")]).manifest()
    assert len(resolve_probe([str(tmp_path / "set/test"), str(folder)]).manifest()) == 7
    (folder / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(MilanError, match=r"data-00001-of-00002\.arrow is missing"):
        probe.manifest()


def test_damaged_tables_are_one_sentence(tmp_path: Path) -> None:
    rows = [{"bytes": drawn(n), "path": None} for n in range(6)]
    folder = save_to_disk(tmp_path / "set", [hub_table(rows, [0] * 6)])
    file = folder / "data-00000-of-00001.arrow"
    for damaged in (b"", b"no Arrow", file.read_bytes()[:700], b"\xff\xff\xff\xff\xff\xff\xff\x7f"):
        file.write_bytes(damaged)
        with pytest.raises(MilanError, match=r"cannot read .*arrow"):
            resolve_probe([str(folder)]).manifest()
    (folder / "state.json").write_text("{}")
    with pytest.raises(MilanError, match=r"cannot read .*state\.json"):
        resolve_probe([str(folder)]).manifest()


def test_tar_shards_are_read_in_place(tmp_path: Path, capsys: Any) -> None:
    write_tar(
        tmp_path / "0.tar",
        {
            "a/1.png": drawn(0), "a/1.cls": b"cat\n", "a/1.txt": b"a caption",
            "a/2.jpg": drawn(1), "a/2.json": b'{"label": 7, "caption": "x"}',
            "a/.hidden.png": drawn(9), "a/odd.img": drawn(2), "readme.md": b"about",
        },
    )  # fmt: skip
    write_tar(tmp_path / "1.tar", {"b.png": drawn(3), "b.txt": b"dog"})
    (tmp_path / "0_stats.json").write_text("{}")
    pq.write_table(pa.table({"key": ["a"]}), tmp_path / "0.parquet")  # img2dataset's
    probe = pickle.loads(pickle.dumps(resolve_probe([str(tmp_path)])))
    assert classes(probe) == ["cat", "7", "a", "dog"]
    for n, image in enumerate(pixels(probe)):
        np.testing.assert_array_equal(image, np.roll(PIXELS, n, axis=1))
    assert paths(resolve_probe([str(tmp_path / "1.tar")]))[0].startswith("#b.png@")
    assert ".json 1, .md 1, .parquet 1" in capsys.readouterr().err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["0.parquet", "0.tar", "0_stats.json", "1.tar"]
    assert classes(resolve_probe([str(tmp_path / "0.tar")], label_column="txt"))[0] == "a caption"
    assert classes(resolve_probe([str(tmp_path / "0.tar")], label_column="caption"))[1] == "x"


def test_a_sample_with_two_images_asks_which(tmp_path: Path) -> None:
    file = write_tar(tmp_path / "0.tar", {"1.jpg": drawn(0), "1.seg.png": drawn(1)})
    with pytest.raises(MilanError, match=r"sample 1 of .*0\.tar has several images \(jpg, seg\.png\).*--image-column"):
        resolve_probe([str(file)]).manifest()
    np.testing.assert_array_equal(
        pixels(resolve_probe([str(file)], image_column="seg.png"))[0], np.roll(PIXELS, 1, axis=1)
    )


def test_damaged_and_malicious_archives_are_one_sentence(tmp_path: Path) -> None:
    sound = write_tar(tmp_path / "0.tar", {"1.jpg": drawn(0), "2.jpg": drawn(1), "3.jpg": drawn(2)}).read_bytes()
    second = sound.index(b"2.jpg")
    claims = bytearray(sound)
    claims[second + 124 : second + 136] = b"77777777777\0"  # 8 GiB
    broken = bytearray(sound)
    broken[second + 3] ^= 1
    long = tarfile.TarInfo("x")
    long.size, long.type = 2**34, tarfile.GNUTYPE_LONGNAME
    for data in (claims, broken, sound[: second + 700], b"no tar", long.tobuf(tarfile.GNU_FORMAT)):
        (tmp_path / "0.tar").write_bytes(bytes(data))
        with pytest.raises(MilanError, match=r"cannot read .*0\.tar|hold none"):
            resolve_probe([str(tmp_path)]).manifest()
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        link = tarfile.TarInfo("1.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    with pytest.raises(MilanError, match="hold none"):
        resolve_probe([str(tmp_path)]).manifest()


def test_kinds_of_shards_are_not_mixed_and_packed_ones_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [drawn(0)]}), tmp_path / "a.parquet")
    write_tar(tmp_path / "b.tar", {"1.jpg": drawn(0)})
    with pytest.raises(MilanError, match=r"holds \.parquet and \.tar files"):
        resolve_probe([str(tmp_path)]).manifest()
    labels = tmp_path / "labels.csv"
    labels.write_text("file,label\n1.png,cat\n")
    (tmp_path / "b.tar").unlink()
    with pytest.raises(MilanError, match="brings its own labels"):
        resolve_probe([str(tmp_path)], str(labels)).manifest()
    (tmp_path / "a.parquet").rename(tmp_path / "c.tar.gz")
    with pytest.raises(MilanError, match="packed archives"):
        resolve_probe([str(tmp_path)]).manifest()


def test_sources_of_all_kinds_are_joined(tmp_path: Path) -> None:
    put(tmp_path / "f/cat/0.png", drawn(0))
    (tmp_path / "p").mkdir()
    pq.write_table(pa.table({"image": [drawn(1)]}), tmp_path / "p/a.parquet")
    write_tar(tmp_path / "t.tar", {"x.png": drawn(2)})
    save_to_disk(tmp_path / "d", [hub_table([{"bytes": drawn(3), "path": None}], [1])])
    probe = resolve_probe([str(tmp_path / name) for name in ("f", "p", "t.tar", "d")])
    assert classes(probe) == ["cat", None, None, "dog"] and probe.name == "f+p+t.tar+d"
    for n, image in enumerate(pixels(probe)):
        np.testing.assert_array_equal(image, np.roll(PIXELS, n, axis=1))


def test_parquet_rewritten_is_read_anew(tmp_path: Path) -> None:
    file = tmp_path / "t.parquet"
    for n in range(2):
        pq.write_table(pa.table({"image": [drawn(n)]}), file)
        os.utime(file, ns=(n + 1, n + 1))
        np.testing.assert_array_equal(pixels(ParquetProbe(file))[0], np.roll(PIXELS, n, axis=1))


# Fewer bits than 16.


@pytest.mark.parametrize("kind", ["TIFF", "PNG"])
@pytest.mark.parametrize(("bits", "doubted"), [(12, True), (10, True), (16, False)])
def test_fewer_bits_than_16_are_noted(kind: str, bits: int, doubted: bool) -> None:
    values = np.linspace(0, 2**bits - 1, 40).astype(np.uint16).reshape(5, 8)
    found = probe_image(encode(Image.fromarray(values), kind))
    assert (found.note is not None) == doubted
    if doubted:
        assert found.note is not None and f"use {bits} bits at most" in found.note
