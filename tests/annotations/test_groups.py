"""Names of sets, groups of them, and where they are found."""

from __future__ import annotations

import shutil

import pytest

from milan_ray.annotations.groups import BASE, GROUPS, RELEASED, locate
from milan_ray.annotations.load import load
from milan_ray.errors import MilanError


@pytest.fixture
def data(tmp_path, monkeypatch):
    """An empty data folder."""
    monkeypatch.setenv("MILAN_DATA_DIR", str(tmp_path / "data"))
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def test_groups_have_the_published_sets_in_order():
    assert GROUPS["base"] == BASE
    assert GROUPS["cls"] == (
        "alexnet/imagenet", "alexnet/places365", "resnet152/imagenet", "resnet152/places365"
    )  # fmt: skip
    assert GROUPS["gen"] == GROUPS["biggan"] == ("biggan/imagenet", "biggan/places365")
    assert GROUPS["imagenet"] == ("alexnet/imagenet", "resnet152/imagenet", "biggan/imagenet")
    assert GROUPS["not-resnet152-imagenet"] == (
        "alexnet/imagenet", "alexnet/places365", "resnet152/places365", "biggan/imagenet", "biggan/places365"
    )  # fmt: skip
    singles = {"base", "cls", "gen", "imagenet", "places365", "alexnet", "resnet152", "biggan"}
    assert set(GROUPS) == singles | {f"not-{name.replace('/', '-')}" for name in BASE}
    assert set(RELEASED) - set(BASE) == {"dino_vits8/imagenet"}


def test_locate_group_finds_folders_and_zips_in_order(data, write_set):
    root = write_set()
    shutil.copytree(root, data / "biggan/imagenet")
    shutil.make_archive(str(data / "biggan-places365"), "zip", root)
    found = locate("gen")
    assert [(place.name, place.root, place.annotation_count) for place in found] == [
        ("biggan/imagenet", data / "biggan/imagenet", 3),
        ("biggan/places365", data / "biggan/places365", 3),
    ]
    assert [len(one) for one in load("gen")] == [1, 1]  # of units with three annotations
    assert [len(one) for one in load("gen", annotation_count=0)] == [5, 5]


def test_locate_absent_release_names_file_address_and_variable(data):
    with pytest.raises(MilanError) as caught:
        locate("alexnet/imagenet")
    for part in ("alexnet-imagenet.zip", "http://milan.csail.mit.edu/data/alexnet-imagenet.zip", "MILAN_DATA_DIR"):
        assert part in str(caught.value)


def test_locate_download_unpacks_into_the_data_folder(data, write_set, monkeypatch):
    shutil.make_archive(str(data.parent / "published/data/alexnet-imagenet"), "zip", write_set())
    monkeypatch.setattr("milan_ray.annotations.groups.HOST", (data.parent / "published").as_uri())
    (place,) = locate("alexnet/imagenet", download=True)
    assert place.root == data / "alexnet/imagenet"
    assert (place.root / "10/units.npy").exists()


def test_locate_own_sets_by_path_zip_and_name(data, write_set):
    root = write_set()
    shutil.copytree(root, data / "mine/photos")
    zips = [shutil.make_archive(str(data.parent / name), "zip", root) for name in ("some", "resnet152-imagenet")]
    assert [
        (place.name, place.root, place.annotation_count)
        for text in (str(root), "mine/photos", *zips)
        for place in locate(text)
    ] == [
        ("net/photos", root, None),
        ("mine/photos", data / "mine/photos", None),
        ("some", data / "some", None),
        ("resnet152/imagenet", data / "resnet152/imagenet", 3),
    ]


def test_locate_unknown_name_names_the_nearest(data):
    with pytest.raises(MilanError, match=r"unknown set of annotations 'alexnet-imagenet'; nearest: .*alexnet/imagenet"):
        locate("alexnet-imagenet")
