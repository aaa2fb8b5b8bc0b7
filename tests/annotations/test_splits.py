"""Splits of annotated units: the paper's, the built-in world's, and a user's own."""

from __future__ import annotations

import pytest

from milan_ray.annotations.groups import BASE, RELEASED
from milan_ray.annotations.splits import (
    KINDS,
    LEAVE_ONE_OUT,
    OWN,
    SPLITS,
    WITHIN,
    chosen_splits,
    register_splits,
    splits_of,
)
from milan_ray.errors import MilanError
from milan_ray.plugins import load_plugins

DINO = "dino_vits8/imagenet"


def test_papers_splits_are_those_of_table_3_and_leave_one_out() -> None:
    assert len([split for split in SPLITS if split.kind != LEAVE_ONE_OUT]) == 13
    assert len(SPLITS) == 19 and list(dict.fromkeys(split.kind for split in SPLITS)) == list(KINDS)
    at = {split.name: split for split in SPLITS}
    assert len(at) == len(SPLITS) and not any("/" in name for name in at)
    assert at["within-biggan-places365"].within and at["within-biggan-places365"].models == ("biggan/places365",)
    assert at["alexnet-to-resnet152"].train_models == ("alexnet/imagenet", "alexnet/places365")
    assert at["base-to-dino_vits8-imagenet"].train_models == BASE
    assert at["base-to-dino_vits8-imagenet"].test_models == (DINO,)
    assert "biggan/imagenet" in at["imagenet-to-places365"].train_models
    assert at["gen-to-cls"].test_models == BASE[:4]
    left = at["not-alexnet-imagenet-to-alexnet-imagenet"]
    assert left.test_models == ("alexnet/imagenet",) and set(left.models) == set(BASE)


def test_no_split_but_within_trains_on_what_it_judges() -> None:
    for split in SPLITS:
        assert split.within == (split.kind == WITHIN) == bool(set(split.train_models) & set(split.test_models))


def test_all_are_those_whose_models_are_annotated() -> None:
    assert chosen_splits(["all"], RELEASED) == SPLITS
    some = chosen_splits(["all"], ["alexnet/imagenet", "resnet152/imagenet", "biggan/imagenet"])
    assert {split.kind for split in some} == {WITHIN}
    assert chosen_splits([WITHIN, "all"], RELEASED)[: len(BASE)] == SPLITS[: len(BASE)]
    assert [split.name for split in chosen_splits(["gen-to-cls"], BASE)] == ["gen-to-cls"]


def test_worlds_splits_play_the_papers() -> None:
    load_plugins()
    annotated = [
        *(f"world/{name}{kind}" for name in ("cnn", "resnet", "generator") for kind in ("", "-places")),
        "world/vit",
    ]
    splits = chosen_splits(["all"], annotated)
    assert len(splits) == len(SPLITS) and all(split.train.startswith("world-") for split in splits)
    at = {split.name: split for split in splits}
    assert at["world-base-to-world-vit-objects"].test_models == ("world/vit",)
    assert at["world-cnn-to-world-resnet"].test_models == ("world/resnet", "world/resnet-places")


def test_own_groups_are_divided_or_set_against_each_other() -> None:
    annotated = ("mine/a", "mine/b", "mine/c")
    (split,) = chosen_splits(["mine/a"], annotated)
    assert (split.kind, split.name, split.within) == (WITHIN, "within-mine-a", True)
    (split,) = chosen_splits(["mine/a,mine/b:mine/c"], annotated)
    assert (split.kind, split.train_models, split.test_models) == (OWN, ("mine/a", "mine/b"), ("mine/c",))
    assert split.name == "mine-a+mine-b-to-mine-c"
    (split,) = chosen_splits(["old=mine/a,mine/b:new=mine/c"], annotated)
    assert split.name == "old-to-new"
    (split,) = chosen_splits(["cls:gen"], BASE)
    assert split in SPLITS
    register_splits(splits_of({("n", "d"): "mine/a"}, {("g", "d"): "mine/b"}, prefix="mine"))
    assert [split.name for split in chosen_splits(["across-tasks"], annotated)] == [
        "mine-cls-to-mine-gen",
        "mine-gen-to-mine-cls",
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("across-tasks", "no split of across-tasks has annotations of all its models: there are x/y"),
        ("gen-to-cls", "biggan/imagenet, .* have no annotations"),
        ("x/y:x/y,x/z", "x/y would train and judge"),
        ("x/y:x/z:x/y", "unknown split"),
        ("nobody", "unknown group 'nobody'"),
        ("alexnet:x/y", "alexnet/imagenet, alexnet/places365 have no annotations"),
    ],
)
def test_wrong_splits_are_one_sentence(text: str, says: str) -> None:
    with pytest.raises(MilanError, match=says):
        chosen_splits([text], ["x/y", "x/z"])


def test_two_splits_of_one_name_are_refused() -> None:
    with pytest.raises(MilanError, match="two splits are called within-g"):
        chosen_splits(["g=x/y", "g=x/z"], ["x/y", "x/z"])
