import pytest

from milan_ray.annotations.groups import BASE, GROUPS, training_groups
from milan_ray.errors import MilanError
from milan_ray.world import plugin  # registers groups

ALEXNET = ("alexnet/imagenet", "alexnet/places365")


def test_training_groups_of_the_paper_one_model_and_ones_own_have_their_models() -> None:
    found = training_groups(["alexnet", "not-biggan/imagenet", "mine/net", "both=mine/net,a"], [*BASE, "mine/net", "a"])
    assert found == {
        "alexnet": ALEXNET,
        "not-biggan-imagenet": tuple(name for name in BASE if name != "biggan/imagenet"),
        "mine-net": ("mine/net",),
        "both": ("mine/net", "a"),
    }


def test_training_groups_all_are_those_whose_models_are_all_annotated() -> None:
    assert training_groups(["all"], ALEXNET) == {"alexnet": ALEXNET}
    assert training_groups(["all"], BASE) == GROUPS


def test_training_groups_of_the_world_are_the_papers_with_other_sets_in_their_places() -> None:
    sets = {**plugin.CLASSIFIERS, **plugin.GENERATORS}
    found = training_groups(["all"], list(sets.values()))
    play = {
        "alexnet": "cnn",
        "resnet152": "resnet",
        "biggan": "generator",
        "imagenet": "objects",
        "places365": "places",
    }
    for name, models in GROUPS.items():
        renamed = "-".join(["world", *(play.get(part, part) for part in name.split("-"))])
        pairs = [(play[network], play[data]) for network, data in (model.split("/") for model in models)]
        assert found.pop(renamed) == tuple(sets[pair] for pair in pairs)
    assert not found


@pytest.mark.parametrize(
    ("names", "annotated", "message"),
    [
        (["alexnet"], ["alexnet/imagenet"], "alexnet/places365 have no annotations"),
        (["x=a,b"], ["a"], "group x: b have no annotations"),
        (["alexnett"], ALEXNET, "unknown group 'alexnett'; nearest: alexnet"),
        (["all"], ["a"], "no group has annotations of all its models: there are a"),
        (["x=a", "x=b"], ["a", "b"], "two groups are called x"),
    ],
)
def test_training_groups_errors_say_what_to_do(names: list[str], annotated: list[str], message: str) -> None:
    with pytest.raises(MilanError, match=message):
        training_groups(names, annotated)
