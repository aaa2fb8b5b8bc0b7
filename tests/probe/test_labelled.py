"""Folders with label maps: the published layouts, and what is wrong with a folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from milan_ray.errors import MilanError
from milan_ray.probe.base import ImageRef
from milan_ray.probe.folder import FolderProbe
from milan_ray.probe.labelled import (
    Ade20kFolder,
    BrodenFolder,
    LabelledFolder,
    NumberedFolder,
    is_labelled,
    labelled_folder,
    read_legend,
)
from milan_ray.probe.manifest import digest, image_refs
from milan_ray.probe.registry import resolve_probe

CAMVID = [
    "Sky",
    "Building",
    "Pole",
    "Road",
    "Pavement",
    "Tree",
    "SignSymbol",
    "Fence",
    "Car",
    "Pedestrian",
    "Bicyclist",
    "Unlabelled",
]


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def refs(probe: LabelledFolder) -> list[ImageRef]:
    return image_refs(probe.manifest())


@pytest.fixture
def numbered(tmp_path) -> Path:
    for n, name in enumerate("ab"):
        save(tmp_path / f"images/{name}.jpg", np.zeros((4, 6, 3)))
        save(tmp_path / f"labels/{name}.png", np.full((4, 6), n) + np.eye(4, 6) * 2)
    (tmp_path / "classes.txt").write_text("0 sky\n1 void\n2 car\n")
    return tmp_path


def test_numbers_become_concepts(numbered):
    probe = labelled_folder(numbered)
    assert isinstance(probe, NumberedFolder) and is_labelled(numbered)
    first, second = refs(probe)
    assert first.path == "images/a.jpg" and probe.read(first).image.size == (6, 4)
    maps = probe.concept_maps(first)
    assert maps is not None and sorted(maps) == ["car", "sky"]
    np.testing.assert_array_equal(maps["car"], np.eye(4, 6) > 0)
    assert probe.concept_maps(second) == {}  # void, and a number without a name
    (numbered / "labels/b.png").unlink()
    assert probe.concept_maps(second) is None


def test_a_label_map_or_legend_that_changes_is_another_probe(numbered):
    found = [digest(labelled_folder(numbered).manifest())]
    save(numbered / "labels/a.png", np.zeros((8, 12)))
    found.append(digest(labelled_folder(numbered).manifest()))
    (numbered / "classes.txt").write_text("0 heaven\n")
    found.append(digest(labelled_folder(numbered).manifest()))
    assert len(set(found)) == 3


def test_a_folder_without_legend_or_maps_says_what_to_do(numbered):
    (numbered / "classes.txt").unlink()
    assert not is_labelled(numbered)
    assert isinstance(resolve_probe([str(numbered)]), FolderProbe)
    (numbered.parent / "legend.txt").write_text("0 sky")
    assert isinstance(resolve_probe([str(numbered)], legend=str(numbered.parent / "legend.txt")), NumberedFolder)
    with pytest.raises(MilanError, match="a legend is for one local folder"):
        resolve_probe([str(numbered), str(numbered)], legend="legend.txt")
    with pytest.raises(MilanError, match="give --legend FILE with lines of `number name`"):
        labelled_folder(numbered)
    with pytest.raises(MilanError, match="has no label maps: give a folder with images/ and labels/"):
        labelled_folder(numbered / "images")
    assert not is_labelled(numbered / "images")


def test_a_damaged_map_is_named(numbered):
    (numbered / "labels/a.png").write_bytes(b"no image")
    probe = labelled_folder(numbered)
    with pytest.raises(MilanError, match=r"cannot read the label map .*a\.png"):
        probe.concept_maps(refs(probe)[0])


@pytest.mark.parametrize(
    ("text", "legend"),
    [
        ("0 Sky\n1 Sign symbol\n", {0: "Sky", 1: "Sign symbol"}),
        ("index,name\n0,Sky\n7,Sign symbol\n", {0: "Sky", 7: "Sign symbol"}),
        ("401 car, auto, automobile\n\n,odd\n", {401: "car"}),
        ("Idx\tRatio\tStuff\tName\n1\t0.15\t1\twall\n2\t0.1\t1\tbuilding, edifice\n", {1: "wall", 2: "building"}),
    ],
)
def test_legends(tmp_path, text, legend):
    (tmp_path / "names.txt").write_text(text)
    assert read_legend(tmp_path / "names.txt") == legend


def test_a_legend_without_numbers_says_so(tmp_path):
    (tmp_path / "names.txt").write_text("Sky\nRoad\n")
    with pytest.raises(MilanError, match="is no legend of label maps"):
        read_legend(tmp_path / "names.txt")


def test_broden(tmp_path):
    save(tmp_path / "images/ade/a.jpg", np.zeros((8, 8, 3)))
    save(tmp_path / "images/dtd/b.jpg", np.zeros((8, 8, 3)))
    colours, objects = np.zeros((4, 4, 3)), np.zeros((4, 4, 3))
    colours[:2, :, 0], objects[..., 0], objects[..., 1] = 3, 44, 1  # object 300
    save(tmp_path / "images/ade/a_color.png", colours)
    save(tmp_path / "images/ade/a_object.png", objects)
    save(tmp_path / "images/ade/a_part_2.png", colours)
    (tmp_path / "label.csv").write_text(
        "number,name,category\n3,black-c,color(9)\n300,bed,object(9)\n5,street-s,scene\n"
    )
    (tmp_path / "index.csv").write_text(
        "image,split,ih,iw,sh,sw,color,object,part,material,scene,texture\n"
        "ade/a.jpg,train,8,8,4,4,ade/a_color.png,ade/a_object.png,ade/a_part_2.png,,5,\n"
        "dtd/b.jpg,val,8,8,4,4,,,,,,300;9\n"
    )
    probe = labelled_folder(tmp_path)
    assert isinstance(probe, BrodenFolder)
    assert probe.manifest()["class_label"].to_pylist() == ["street", None]
    first, second = (probe.concept_maps(ref) for ref in refs(probe))
    assert first is not None and second is not None
    assert {name: int(shown.sum()) for name, shown in first.items()} == {"black": 8, "bed": 16, "street": 16}
    assert list(second) == ["bed"] and second["bed"].shape == (4, 4)


def test_ade20k(tmp_path):
    save(tmp_path / "a.jpg", np.zeros((6, 8, 3)))
    segmentation = np.zeros((6, 8, 3))
    segmentation[:3] = (10, 145, 255)  # object 256 + 145
    save(tmp_path / "a_seg.png", segmentation)
    things = [
        {"name": "car, auto", "name_ndx": 401, "parts": {"part_level": 0}, "polygon": {"x": [0], "y": [0]}},
        {
            "name": "wheel",
            "name_ndx": 3000,
            "parts": {"part_level": 1},
            "polygon": {"x": [1, 3, 3, 1], "y": [1, 1, 2, 2]},
        },
    ]
    (tmp_path / "a.json").write_text(json.dumps({"annotation": {"scene": ["outdoor", "street"], "object": things}}))
    probe = labelled_folder(tmp_path)
    assert isinstance(probe, Ade20kFolder)
    assert probe.manifest()["class_label"].to_pylist() == ["street"]
    maps = probe.concept_maps(refs(probe)[0])
    assert maps is not None
    assert {name: int(shown.sum()) for name, shown in maps.items()} == {"car": 24, "wheel": 6, "street": 48}


def test_real_camvid(shared, tmp_path):
    (tmp_path / "legend.txt").write_text("".join(f"{n} {name}\n" for n, name in enumerate(CAMVID)))
    probe = labelled_folder(shared / "data/images/camvid_val", tmp_path / "legend.txt")
    found = refs(probe)
    assert len(found) == 101
    maps = probe.concept_maps(found[0])
    assert maps is not None and sorted(maps) == sorted(CAMVID[:-1])
    assert maps["Road"].shape == (360, 480) == probe.read(found[0]).image.size[::-1]
    assert np.argwhere(maps["Sky"])[:, 0].mean() < 180 < np.argwhere(maps["Road"])[:, 0].mean()


def test_real_ade20k(shared):
    probe = labelled_folder(shared / "data/images/ade20k_3")
    assert probe.manifest()["class_label"].to_pylist() == ["street"] * 3
    maps = probe.concept_maps(refs(probe)[0])
    assert maps is not None
    assert {"road", "building", "person", "car", "window", "street"} <= maps.keys()
    assert maps["car"].shape == (1536, 2048) and maps["street"].all()
    assert (maps["window"] & maps["building"]).sum() > 0.5 * maps["window"].sum()
