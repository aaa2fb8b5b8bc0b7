"""Published sets as the reference loads and merges them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import PIL
import pytest

from milan_ray.annotations.groups import RELEASED_COUNT
from milan_ray.annotations.layout import read_annotations
from milan_ray.annotations.merge import merge
from milan_ray.annotations.published import PublishedSet, kept_annotations
from milan_ray.annotations.quirks import REFERENCE
from milan_ray.errors import MilanError
from milan_ray.probe.folder import FolderProbe
from milan_ray.stages.annotations_export import run_export
from milan_ray.stages.annotations_import import run_import
from milan_ray.storage import Storage


@pytest.fixture(scope="module")
def published(golden: Path) -> Path:
    return golden / "milannotations"


@pytest.mark.parametrize(("count", "file"), [(3, "3"), (None, "_none")])
def test_parity_milannotations_samples_identical(published, count, file):
    reference = json.loads((published / f"loaded_annotation_count{file}.json").read_text())
    found = PublishedSet(published / "toy/shapes", annotation_count=count)
    samples = [{"layer": s.layer, "unit": s.unit, "annotations": list(s.annotations)} for s in found]
    assert samples == reference["samples"]
    assert (found.name, len(found)) == (reference["name"], reference["n"])
    assert reference.get("layers", found.layers) == found.layers
    assert reference.get("k", found.k) == found.k


def test_parity_milannotations_images_masks_and_grid_identical(published):
    reference = np.load(published / "loaded_samples.npz")
    found = PublishedSet(published / "toy/shapes", annotation_count=3)
    for place, key in enumerate(reference["keys"].tolist()):
        layer, unit = key.split("/")
        sample = found.lookup(layer, int(unit))
        np.testing.assert_array_equal(sample.images, reference["images"][place])
        np.testing.assert_array_equal(sample.masks, reference["masks"][place])
        np.testing.assert_array_equal(sample.masked_images(), reference["masked_opacity75"][place])
    np.testing.assert_array_equal(np.asarray(found.lookup("conv1", 3).grid()), reference["grid"])


def _sha256(images: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest()


def test_parity_milannotations_quirks_identical(published):
    reference = json.loads((published / "quirks_loaded.json").read_text())
    root = published / "toy/quirks"
    for count in (None, 1, 2, 3):
        found = PublishedSet(root, annotation_count=count, quirks=REFERENCE)
        samples = [[type(s.layer).__name__, s.layer, s.unit, list(s.annotations)] for s in found]
        assert samples == reference[str(count)]["samples"]
        assert found.layers == reference[str(count)]["layers"]
    found = PublishedSet(root, annotated=False, quirks=REFERENCE)
    assert [list(unit) for unit in found.units()] == reference["top_images_units"]
    for layer, unit, key in (("10", 0, "lookup('10', 0)"), (10, 1, "lookup(10, 1)")):
        sample = found.lookup(layer, unit)
        about = {"layer": sample.layer, "unit": sample.unit, "image_sha256": _sha256(sample.images)}
        assert about == reference[key]
    with pytest.raises(MilanError, match="no unit 5"):
        found.lookup("10", 5)
    assert _sha256(found[3].images) == reference["sample_10_5_image_sha256"]


def test_parity_milannotations_quirks_handled_correctly_without(published):
    reference = json.loads((published / "quirks_loaded.json").read_text())
    found = PublishedSet(published / "toy/quirks")
    assert {(s.layer, s.unit): s.annotations for s in found if s.annotations} == {
        ("0", 0): ('zero, zero "a"', "zero zero b", "", "zero zero d"),
        ("0", 2): ("zero two a",),
        ("4", 1): ("Four one a", "four one b"),
    }
    assert _sha256(found.lookup("10", 5).images) == reference["sample_10_5_image_sha256"]
    for count in (1, 2, 3):  # the order of the CSV is no defect
        counted = PublishedSet(published / "toy/quirks", annotation_count=count)
        samples = [["str", s.layer, s.unit, list(s.annotations)] for s in counted]
        assert samples == reference[str(count)]["samples"]


@pytest.mark.parametrize("name", ["shapes", "quirks"])
def test_parity_milannotations_round_trip_identical_files(published, tmp_path, name):
    storage = Storage(tmp_path / "run")
    model = run_import(storage, PublishedSet(published / "toy" / name))
    run_export(storage, model, tmp_path / "out")
    for path in (published / "toy" / name).rglob("*.*"):
        if path.name != "annotations.csv" or name == "shapes":  # quirks' CSV has one column more
            assert (tmp_path / "out" / path.relative_to(published / "toy" / name)).read_bytes() == path.read_bytes()
    before, after = (PublishedSet(root, annotation_count=1) for root in (published / "toy" / name, tmp_path / "out"))
    assert [s.annotations for s in before] == [s.annotations for s in after]
    assert before.units() == after.units()


def test_parity_milannotations_merge_identical_with_quirk_and_right_without(golden, published, tmp_path):
    shutil.copytree(published / "toy/shapes/conv1", tmp_path / "set/conv1", copy_function=shutil.copyfile)
    (tmp_path / "set/conv1").chmod(0o755)
    file = tmp_path / "set/conv1/images.npy"
    exemplars = np.load(file).astype(np.int16)
    file.unlink()
    merge(tmp_path / "set", FolderProbe([golden / "images"]), quirks=REFERENCE)
    reference = np.load(published / "merged_conv1_images.npz")["images"]
    if int(PIL.__version__.split(".")[0]) >= 13:
        np.testing.assert_array_equal(np.load(file), reference)
    else:  # the reference ran with Pillow 13; earlier ones round a few pixels otherwise when they resize
        off = np.abs(np.load(file).astype(np.int16) - reference)
        assert off.max() <= 1 and np.count_nonzero(off) < 1e-4 * off.size
    assert np.abs(reference - exemplars).max() > 100
    merge(tmp_path / "set", FolderProbe([golden / "images"]))
    truncated = np.load(file).astype(np.int16) - exemplars  # the exemplars' bytes were truncated
    assert set(np.unique(truncated)) <= {0, 1}


def test_parity_milannotations_real_csv_has_three_annotations_of_every_unit(shared):
    rows = read_annotations(shared / "data/annotations/milannotations_resnet152_imagenet.csv")
    kept = kept_annotations(rows, RELEASED_COUNT)
    assert (len(rows), len(kept)) == (11712, 3904)
    units = Counter(layer for layer, _ in kept)
    assert units == {"conv1": 64, "layer1": 256, "layer2": 512, "layer3": 1024, "layer4": 2048}
