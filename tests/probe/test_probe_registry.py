from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

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
