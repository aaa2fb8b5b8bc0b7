from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from milan_ray.errors import MilanError
from milan_ray.probe.arrays import ArrayProbe, ParquetProbe
from milan_ray.probe.folder import FolderProbe
from milan_ray.probe.registry import probe_names, register_probe, resolve_probe


@pytest.fixture(autouse=True)
def registered() -> None:
    register_probe("tiny/val", lambda: ArrayProbe(np.zeros((1, 2, 2, 3), np.uint8), name="tiny"))


def test_resolve_registered_name_makes_the_probe() -> None:
    assert "tiny/val" in probe_names()
    assert resolve_probe(["tiny/val"]).name == "tiny"


def test_resolve_folders_and_uris_are_joined(tmp_path: Path) -> None:
    probe = resolve_probe([str(tmp_path), "s3://bucket/photos"])
    assert isinstance(probe, FolderProbe) and probe.name == f"{tmp_path.name}+photos"


def test_resolve_parquet_file_is_a_table_of_images(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"x"]}), tmp_path / "t.parquet")
    assert isinstance(resolve_probe([str(tmp_path / "t.parquet")]), ParquetProbe)


def test_resolve_wrong_name_gives_the_nearest_and_the_alternative() -> None:
    with pytest.raises(MilanError, match=r"unknown probe 'tiny/vall'; nearest: tiny/val.*existing folder"):
        resolve_probe(["tiny/vall"])


def test_resolve_nothing_or_labels_for_a_registered_probe_are_refused() -> None:
    with pytest.raises(MilanError, match="no probe given"):
        resolve_probe([])
    with pytest.raises(MilanError, match="brings its own labels"):
        resolve_probe(["tiny/val"], "labels.csv")


@pytest.mark.parametrize("name", ["one.png", "packed.tgz", "packed.tar.gz", "packed.zip"])
def test_c_one_file_that_is_no_table_and_no_shard_is_said_to_be_a_file(tmp_path, name):
    (tmp_path / name).write_bytes(b"some")
    with pytest.raises(MilanError, match=r"is one file, and none that ends in .parquet.*the folder of images"):
        resolve_probe((str(tmp_path / name),))


def test_c_folders_are_read_by_what_they_hold_whatever_they_are_called(tmp_path):
    pictures, tables = tmp_path / "pictures.parquet", tmp_path / "tables.parquet"
    pictures.mkdir()
    tables.mkdir()
    rng = np.random.default_rng(0)
    for number in range(3):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(pictures / f"{number}.png")
        rows = pa.table({"image": [(pictures / f"{number}.png").read_bytes()], "label": ["a"]})
        pq.write_table(rows, tables / f"part-{number}.parquet")
    found = resolve_probe((str(pictures),)).manifest()
    assert found["path"].to_pylist() == ["0.png", "1.png", "2.png"]
    assert resolve_probe((str(tables),)).manifest().equals(ParquetProbe(tables).manifest())
