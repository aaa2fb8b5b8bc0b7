from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from milan_ray.errors import MilanError, UnreadableImage
from milan_ray.probe.arrays import ArrayProbe, ParquetProbe
from milan_ray.probe.manifest import digest, image_refs

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 6, 5, 3), dtype=np.uint8)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files, several row groups, a null and a broken image."""
    encoded: list[bytes | None] = [png(pixels) for pixels in IMAGES]
    labels = [f"class {i % 2}" for i in range(7)]
    pq.write_table(pa.table({"image": encoded[:5], "label": labels[:5]}), tmp_path / "a.parquet", row_group_size=2)
    pq.write_table(pa.table({"image": [*encoded[5:], None, b"x"], "label": [0, 1, 2, 3]}), tmp_path / "b.parquet")
    return tmp_path


def test_arrays_are_read_back_with_labels_and_concept_maps() -> None:
    maps = [{"sky": np.eye(6, 5, dtype=bool)} for _ in IMAGES]
    probe = pickle.loads(pickle.dumps(ArrayProbe(IMAGES, list("abcdefg"), maps)))
    manifest = probe.manifest()
    assert manifest["class_label"].to_pylist() == list("abcdefg")
    for i, ref in enumerate(image_refs(manifest)):
        found = probe.read(ref)
        np.testing.assert_array_equal(found.image, IMAGES[i])
        assert found.sha256 == manifest["sha256"][i].as_py()
        np.testing.assert_array_equal(probe.concept_maps(ref)["sky"], maps[i]["sky"])


def test_arrays_digest_follows_the_pixels() -> None:
    changed = IMAGES.copy()
    changed[3, 0, 0, 0] += 1
    assert digest(ArrayProbe(IMAGES).manifest()) == digest(ArrayProbe(IMAGES.copy()).manifest())
    assert digest(ArrayProbe(IMAGES).manifest()) != digest(ArrayProbe(changed).manifest())


@pytest.mark.parametrize(
    ("images", "labels"), [(IMAGES.astype(float), None), (IMAGES[0], None), (IMAGES[..., :0], None), (IMAGES, ["a"])]
)
def test_arrays_of_another_kind_are_refused(images: np.ndarray, labels: list[str] | None) -> None:
    with pytest.raises(MilanError):
        ArrayProbe(images, labels)


def test_arrays_empty_probe_is_refused() -> None:
    with pytest.raises(MilanError, match="has no images"):
        ArrayProbe(IMAGES[:0]).manifest()


@pytest.mark.parametrize("uri", [False, True])
def test_parquet_folder_reads_rows_across_files_and_row_groups(folder: Path, uri: bool) -> None:
    probe = pickle.loads(pickle.dumps(ParquetProbe(folder.as_uri() if uri else folder)))
    manifest = probe.manifest()
    assert manifest["class_label"].to_pylist() == [*(f"class {i % 2}" for i in range(5)), "0", "1", "2", "3"]
    refs = image_refs(manifest, [6, 0, 4, 1, 5, 3, 2])
    for ref in refs:
        np.testing.assert_array_equal(probe.read(ref).image, IMAGES[ref.image_id])


def test_parquet_null_and_broken_images_are_unreadable(folder: Path) -> None:
    probe = ParquetProbe(folder / "b.parquet")
    refs = image_refs(probe.manifest())
    with pytest.raises(UnreadableImage, match="is null"):
        probe.read(refs[2])
    with pytest.raises(UnreadableImage, match="is no image"):
        probe.read(refs[3])


def test_parquet_hub_style_struct_and_other_columns_are_read(tmp_path: Path) -> None:
    rows = [{"bytes": png(pixels), "path": "x.png"} for pixels in IMAGES]
    pq.write_table(pa.table({"img": rows, "kind": list("abcdefg")}), tmp_path / "t.parquet")
    probe = ParquetProbe(tmp_path / "t.parquet", "img", "kind")
    refs = image_refs(probe.manifest())
    np.testing.assert_array_equal(probe.read(refs[6]).image, IMAGES[6])


def test_parquet_wrong_column_missing_file_and_no_rows_are_named(folder: Path) -> None:
    with pytest.raises(MilanError, match=r"a\.parquet has no column 'photo': it has image, label"):
        ParquetProbe(folder, "photo").manifest()
    with pytest.raises(MilanError, match=r"cannot read .*absent\.parquet"):
        ParquetProbe(folder / "absent.parquet").manifest()
    (folder / "bad.parquet").write_bytes(b"PAR1 not at all")
    with pytest.raises(MilanError, match=r"cannot read .*bad\.parquet"):
        ParquetProbe(folder / "bad.parquet").manifest()
    (folder / "empty").mkdir()
    with pytest.raises(MilanError, match="no images in"):
        ParquetProbe(folder / "empty").manifest()
