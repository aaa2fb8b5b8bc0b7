"""Published sets as samples: what is read, in which order, and what is refused."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from milan_ray.annotations.published import PublishedSet
from milan_ray.annotations.quirks import NO_QUIRKS, REFERENCE
from milan_ray.errors import MilanError


def test_sample_images_and_masks_are_the_files(write_set):
    root = write_set()
    found = PublishedSet(root)
    assert (found.name, found.layers, len(found), found.k) == ("net/photos", ["0", "10"], 5, 2)
    assert found.units() == [("0", 0), ("0", 1), ("0", 2), ("10", 5), ("10", 9)]
    images, masks = (np.load(root / "10" / name) for name in ("images.npy", "masks.npy"))
    sample = found[4]
    assert sample.images.dtype == sample.masks.dtype == np.float32
    np.testing.assert_array_equal(sample.images, images[1] * np.float32(1 / 255))
    np.testing.assert_array_equal(sample.masks, masks[1])


def test_annotations_without_count_are_all_of_every_unit(write_set):
    found = PublishedSet(write_set())
    assert [sample.annotations for sample in found] == [("sky",), (), ('Red, "bright"',), (), ("a dog", "", "dogs")]


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, [("10", 9, ("a dog",)), ("0", 2, ('Red, "bright"',)), ("0", 0, ("sky",))]),
        (2, [("10", 9, ("a dog", ""))]),
        (4, []),
    ],
)
def test_annotations_with_count_follow_the_csv(write_set, count, expected):
    found = PublishedSet(write_set(), annotation_count=count)
    assert [(sample.layer, sample.unit, sample.annotations) for sample in found] == expected


def test_digit_layers_lose_annotations_only_with_the_quirk(write_set):
    root = write_set()
    assert not any(sample.annotations for sample in PublishedSet(root, quirks=REFERENCE))
    assert PublishedSet(root).lookup(0, 0).annotations == ("sky",)


def test_lookup_knows_units_by_number_and_by_position_with_the_quirk(write_set):
    root = write_set()
    images = np.load(root / "10/images.npy") * np.float32(1 / 255)
    right, wrong = (PublishedSet(root, annotated=False, quirks=quirks) for quirks in (NO_QUIRKS, REFERENCE))
    np.testing.assert_array_equal(right.lookup(10, 9).images, images[1])
    np.testing.assert_array_equal(wrong.lookup(10, 1).images, images[1])
    with pytest.raises(MilanError, match="no unit 1"):
        right.lookup("10", 1)
    with pytest.raises(MilanError, match="no unit 9"):
        wrong.lookup("10", 9)


def test_lookup_annotated_set_knows_the_kept_units_alone(write_set):
    found = PublishedSet(write_set(), annotation_count=1)
    assert found.lookup("0", 2).annotations == ('Red, "bright"',)
    for layer, unit in (("0", 1), ("conv9", 0)):
        with pytest.raises(MilanError, match="no annotated unit"):
            found.lookup(layer, unit)


def test_set_with_strays_and_other_columns_reads_layers_alone(write_set, capsys):
    root = write_set()
    (root / "viz").mkdir()
    (root / "annotations.csv").write_bytes("\ufeffworker,unit,summary,layer\r\nA,1,zwölf,0\r\n".encode())
    found = PublishedSet(root)
    assert found.layers == ["0", "10"]
    assert found.lookup("0", 1).annotations == ("zwölf",)
    assert "left out viz" in capsys.readouterr().err


def test_set_of_chosen_layers_ignores_annotations_of_others(write_set):
    assert PublishedSet(write_set(), layers=[0], annotation_count=1).units() == [("0", 2), ("0", 0)]


def test_set_without_csv_has_samples_without_annotations(write_set):
    root = write_set()
    (root / "annotations.csv").unlink()
    assert [sample.annotations for sample in PublishedSet(root, annotation_count=3)] == [()] * 5


@pytest.mark.parametrize("scale", [1, 255])
def test_float_images_of_either_scale_give_the_same_samples(tmp_path, write_layer, scale):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 2, 3, 4, 4), dtype=np.uint8)
    stored = (pixels / 255).astype(np.float32) if scale == 1 else pixels.astype(np.float64)
    write_layer(tmp_path / "a/b/conv", np.random.default_rng(1), 2, 2, 4, images=stored)
    found = PublishedSet(tmp_path / "a/b")
    np.testing.assert_array_equal(found.files["conv"].unit_bytes(1), pixels[1])
    np.testing.assert_allclose(found[1].images, pixels[1] / 255, atol=1e-7)


def test_masked_images_darken_what_is_outside(write_set):
    sample = PublishedSet(write_set())[0]
    np.testing.assert_allclose(sample.masked_images(0.5), sample.images * np.where(sample.masks == 1, 1, 0.5))
    assert sample.grid(limit=1).size == (8, 8)  # a single image has no frame
    assert sample.grid(columns=1).size == (12, 22)
    with pytest.raises(ValueError, match="opacity"):
        sample.masked_images(1.5)


def test_huge_images_stay_on_disk(tmp_path, write_layer):
    folder = tmp_path / "net/huge/conv"
    write_layer(folder, np.random.default_rng(0), 1800, 15, 4, images=None, masks=None, ids=None, activations=None)
    for name, channels in (("images", 3), ("masks", 1)):  # sparse files of 4 and 1.3 GB
        shape = (1800, 15, channels, 224, 224)
        np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=np.uint8, shape=shape)
    tracemalloc.start()
    sample = PublishedSet(tmp_path / "net/huge").lookup("conv", 1799)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (folder / "images.npy").stat().st_size > 4e9
    assert sample.images.shape == (15, 3, 224, 224)
    assert peak < 64 * 2**20


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _pickled(path: Path) -> None:
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)


_CSV = "layer,unit,summary\n"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("0/masks.npy", None, "masks.npy is missing"),
        ("0/images.npy", _truncate, "no complete .npy"),
        ("0/images.npy", _pickled, "no complete .npy"),
        ("0/images.npy", b"", "no complete .npy"),
        ("0/images.npy", np.zeros((3, 2, 8, 8), np.uint8), "has shape"),
        ("0/images.npy", np.zeros((3, 2, 1, 8, 8), np.uint8), "has shape"),
        ("0/images.npy", np.zeros((3, 2, 3, 8, 9), np.uint8), "must agree"),
        ("0/images.npy", np.zeros((2, 2, 3, 8, 8), np.uint8), "must agree"),
        ("0/images.npy", np.zeros((3, 2, 3, 8, 8), np.int64), "holds int64"),
        ("0/images.npy", np.full((3, 2, 3, 8, 8), -1.0), "values from -1"),
        ("0/images.npy", np.full((3, 2, 3, 8, 8), np.nan), "values from nan"),
        ("0/masks.npy", np.zeros((3, 2, 1, 8, 8), "U1"), "holds <U1"),
        ("10/units.npy", np.array([5, 5]), "twice"),
        ("10/units.npy", np.array([5, -1]), "negative"),
        ("10/units.npy", np.array([5.0, 9.0]), "channel number"),
        ("10/units.npy", np.array([5]), "channel number"),
        ("0/ids.csv", b"1,2\n3,x\n5,6\n", "cannot be read"),
        ("0/ids.csv", b"1,2\n3,4\n", "2 rows of 2 numbers"),
        ("0/ids.csv", b"1,2\n3,4\n5,-6\n", "negative id"),
        ("0/activations.csv", b"1\n2\n3\n", "3 rows of 1 numbers"),
        ("annotations.csv", b"layer,summary\n0,a\n", "no column unit"),
        ("annotations.csv", b"", "no column layer, unit, summary"),
        ("annotations.csv", f"{_CSV}0,one,a\n".encode(), "line 2"),
        ("annotations.csv", f"{_CSV}0,1,a\n0,2\n".encode(), "line 3"),
        ("annotations.csv", f"{_CSV}0,1,\xff".encode("latin-1"), "cannot be read"),
    ],
)
def test_malformed_file_is_one_sentence(write_set, file, content, message):
    root = write_set()
    if content is None:
        (root / file).unlink()
    elif callable(content):
        content(root / file)
    elif isinstance(content, bytes):
        (root / file).write_bytes(content)
    else:
        np.save(root / file, content)
    with pytest.raises(MilanError, match=message) as caught:
        PublishedSet(root)
    assert file.rpartition("/")[2] in str(caught.value)


def test_annotation_without_images_is_refused_when_counted(write_set):
    root = write_set()
    (root / "annotations.csv").write_text(f"{_CSV}0,7,a\n")
    assert len(PublishedSet(root)) == 5
    with pytest.raises(MilanError, match="layer '0' has no unit 7"):
        PublishedSet(root, annotation_count=1)


def test_set_without_layers_or_folder_is_refused(tmp_path):
    with pytest.raises(MilanError, match="holds no layers"):
        PublishedSet(tmp_path)
    with pytest.raises(MilanError, match="no folder"):
        PublishedSet(tmp_path / "absent")


def test_set_asked_for_an_unknown_layer_names_the_known(write_set):
    with pytest.raises(MilanError, match="unknown layer '11'; nearest: 10"):
        PublishedSet(write_set(), layers=["11"])


def test_images_to_be_merged_are_missed_when_read(write_set):
    found = PublishedSet(write_set(images=None))
    assert len(found) == 5
    with pytest.raises(MilanError, match="merge it"):
        found[0].images  # noqa: B018
