"""Masks-only sets and the images they were made from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision import transforms

from milan_ray import cli
from milan_ray.annotations.groups import SetLocation
from milan_ray.annotations.load import load, merge_images
from milan_ray.annotations.merge import SourceShape, merge
from milan_ray.annotations.quirks import REFERENCE
from milan_ray.errors import MilanError
from milan_ray.probe.folder import FolderProbe

SIZE = 16


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Eight images of three classes, none of them square."""
    rng = np.random.default_rng(3)
    for index, label in enumerate(["b", "a", "10", "2", "a", "b", "2", "a"]):
        folder = tmp_path / "photos/val" / label
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (5, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((90 + index, 60)).save(folder / f"{index}.png")
    return tmp_path / "photos/val"


@pytest.fixture
def bare(tmp_path: Path, write_layer: Callable[..., None]) -> Path:
    """A set of one layer with float masks and ids, but no images."""
    root, rng = tmp_path / "net/photos", np.random.default_rng(4)
    masks = rng.integers(0, 2, (2, 3, 1, SIZE, SIZE)).astype(np.float32)
    write_layer(root / "conv", rng, 2, 3, SIZE, images=None, masks=masks, ids=np.array([[7, 0, 3], [3, 5, 1]]))
    return root


def expected(photos: Path, transform: object) -> np.ndarray:
    """The images that torchvision's own ImageFolder gives, (2, 3, 3, SIZE, SIZE)."""
    folder = torchvision.datasets.ImageFolder(str(photos), transform)
    return np.stack([np.stack([folder[i][0].numpy() for i in ids]) for ids in ([7, 0, 3], [3, 5, 1])])


def test_merge_gives_the_crop_that_masks_were_computed_on(photos, bare):
    assert merge(bare, FolderProbe([photos])) == ["conv"]
    crop = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), transforms.PILToTensor()])
    crops = torch.from_numpy(expected(photos, crop)).flatten(0, 1)
    right = torch.nn.functional.interpolate(crops, size=SIZE, mode="nearest").reshape(2, 3, 3, SIZE, SIZE)
    np.testing.assert_array_equal(np.load(bare / "conv/images.npy"), right)


def test_merge_quirk_squashes_as_the_reference_does(photos, bare):
    merge(bare, FolderProbe([photos]), quirks=REFERENCE)
    squash = transforms.Compose([transforms.Resize((SIZE, SIZE)), transforms.ToTensor()])
    reference = (expected(photos, squash) * np.float32(255)).astype(np.uint8)
    np.testing.assert_array_equal(np.load(bare / "conv/images.npy"), reference)


def test_reference_quirks_of_the_command_line_squash_and_sets_with_images_refuse_them(
    photos, bare, write_set, tmp_path, capsys
):
    images = ["--images", str(photos)]
    brought = ["annotations", "import", str(bare), *images, "--storage", str(tmp_path / "run")]
    merged = ["annotations", "merge", str(bare), *images]
    found = []
    for command in (merged, [*merged, "--reference-quirks"], brought, [*brought, "--reference-quirks"]):
        assert cli.main(command) == 0
        found.append(np.load(bare / "conv/images.npy"))
    np.testing.assert_array_equal(found[0], found[2])
    np.testing.assert_array_equal(found[1], found[3])
    assert (found[0] != found[1]).any()
    assert cli.main(["annotations", "merge", str(write_set("net/whole")), "--reference-quirks"]) == 1
    assert "came with its images, --reference-quirks would do nothing" in capsys.readouterr().err


def test_merge_again_does_nothing_until_geometry_or_source_change(photos, bare):
    probe = FolderProbe([photos])
    assert [merge(bare, probe), merge(bare, probe)] == [["conv"], []]
    assert merge(bare, probe, quirks=REFERENCE) == ["conv"]
    Image.new("RGB", (70, 60)).save(photos / "a/9.png")
    assert merge(bare, FolderProbe([photos]), quirks=REFERENCE) == ["conv"]


def test_merge_leaves_images_that_came_with_the_set(photos, write_set):
    root = write_set()
    before = (root / "0/images.npy").read_bytes()
    assert merge(root, FolderProbe([photos])) == []
    assert (root / "0/images.npy").read_bytes() == before


@pytest.mark.parametrize("labels", ["names", "numbers"])
def test_merge_flat_folder_with_labels_equals_class_folders(photos, bare, tmp_path, labels):
    merge(bare, FolderProbe([photos]))
    by_class = np.load(bare / "conv/images.npy")
    (bare / "conv/images.npy").unlink()
    flat = tmp_path / "flat"
    flat.mkdir()
    classes = sorted(folder.name for folder in photos.iterdir())
    lines = []
    for path in sorted(photos.glob("*/*.png")):
        (flat / path.name).write_bytes(path.read_bytes())
        label = f"n{path.parent.name}" if labels == "names" else classes.index(path.parent.name)
        lines.append(f"{path.name} {label}")
    (tmp_path / "labels.txt").write_text("\n".join(lines))
    merge(bare, FolderProbe([flat], tmp_path / "labels.txt"))
    np.testing.assert_array_equal(np.load(bare / "conv/images.npy"), by_class)


def test_merge_images_outside_class_folders_do_not_shift_ids(photos, bare):
    merge(bare, FolderProbe([photos]))
    before = np.load(bare / "conv/images.npy")
    Image.new("RGB", (70, 60)).save(photos / "contact-sheet.png")
    assert merge(bare, FolderProbe([photos])) == ["conv"]
    np.testing.assert_array_equal(np.load(bare / "conv/images.npy"), before)


def test_merge_other_layout_is_refused_before_anything_is_read(photos, bare):
    with pytest.raises(MilanError, match=r"8 images in 1 classes, but .* 50,000 in 1,000"):
        merge(bare, FolderProbe([photos.parent]), expect=SourceShape(1000, 50_000))
    assert not (bare / "conv/images.npy").exists()


def test_merge_id_out_of_range_is_refused(photos, bare):
    (bare / "conv/ids.csv").write_text("1,2,3\n4,5,8\n")
    with pytest.raises(MilanError, match=r"speaks of image 8, but val has only 8 images"):
        merge(bare, FolderProbe([photos]))


def test_merge_without_ids_is_refused(photos, bare):
    (bare / "conv/ids.csv").unlink()
    with pytest.raises(MilanError, match=r"neither images.npy nor ids.csv"):
        merge(bare, FolderProbe([photos]))


def test_merge_unreadable_image_leaves_nothing_half_done(photos, bare):
    (photos / "a/1.png").write_bytes(b"broken")
    with pytest.raises(MilanError, match=r"1\.png"):
        merge(bare, FolderProbe([photos]))
    assert sorted(path.name for path in (bare / "conv").iterdir()) == ["activations.csv", "ids.csv", "masks.npy"]


def test_load_merges_with_the_usual_folder(photos, bare, monkeypatch, tmp_path):
    monkeypatch.setenv("MILAN_DATA_DIR", str(tmp_path))
    (found,) = load(str(bare))
    assert found[0].images.shape == (3, 3, SIZE, SIZE)
    monkeypatch.setenv("MILAN_DATA_DIR", str(tmp_path / "elsewhere"))
    assert len(load(str(bare))[0]) == 2  # merged already: the source may be gone


def test_load_bare_set_without_source_says_where_to_put_it(bare, monkeypatch, tmp_path):
    monkeypatch.setenv("MILAN_DATA_DIR", str(tmp_path / "data"))
    with pytest.raises(MilanError, match=r"net/photos came without images .*data/photos/val"):
        load(str(bare))


def test_merge_released_set_expects_the_whole_validation_set(photos, bare):
    with pytest.raises(MilanError, match="50,000 in 1,000"):
        merge_images(SetLocation("resnet152/imagenet", bare, 3), [photos])
