"""Files that hold a part of a network: layers that need no more are dissected, others are refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from milan_ray.captioner.encoder import get_encoder
from milan_ray.engine import references
from milan_ray.engine.references import ModelRef
from milan_ray.errors import MilanError
from milan_ray.models import registry
from milan_ray.models.registry import build_seeded, register_model
from milan_ray.models.weights_fit import UnfitWeights


class Branches(nn.Module):
    """Two branches and a head that adds them; its ReLU runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.relu = nn.Conv2d(3, 4, 3), nn.ReLU()
        self.left, self.right = nn.Conv2d(4, 4, 1), nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.stem(x))
        return self.head(self.relu(self.left(x) + self.right(x)).mean((2, 3)))


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(registry, "_MODELS", dict(registry._MODELS))
    monkeypatch.setattr(registry, "_PARTS_SAID", set())
    register_model("branches", partial(build_seeded, Branches), ("stem", "left"))
    yield "branches"


def write(folder: Path, *lacking: str) -> str:
    state = Branches().state_dict()
    torch.save({k: v for k, v in state.items() if not k.startswith(lacking)}, folder / "part.pth")
    return str(folder / "part.pth")


def network(model: str, file: str, *layers: str) -> nn.Module:
    return references.network(references.model(ModelRef(model, file, layers=layers)))


def test_layers_that_need_no_more_are_built_and_the_rest_is_named(model, tmp_path, capsys) -> None:
    file = write(tmp_path, "head", "right.0")
    built = network(model, file)
    state = built.state_dict()
    assert torch.equal(state["stem.weight"], torch.load(file)["stem.weight"])
    assert state["head.weight"].isnan().all() and state["right.0.bias"].isnan().all()
    said = capsys.readouterr().err
    assert f"{file} lacks 4 weights of branches (first: right.0.weight, right.0.bias, head.weight)" in said
    assert "cannot be dissected (relu, right, right.0, right.1, head, outputs)" in said
    network(model, file)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("layer", ["right.1", "head", "outputs", "relu@2"])
def test_layers_that_need_missing_weights_are_refused_by_name(model, layer, tmp_path) -> None:
    with pytest.raises(MilanError, match=f"lacks .*which layer {layer} needs: choose other layers with --layers"):
        network(model, write(tmp_path, "head", "right.0"), "stem", layer)


def test_statistics_of_a_norm_count_like_weights(model, tmp_path) -> None:
    with pytest.raises(MilanError, match=r"lacks 1 weights .*first: right\.1\.running_var.* which layer right needs"):
        network(model, write(tmp_path, "right.1.running_var"), "left", "right")


def test_whole_networks_and_other_files_are_checked_as_before(model, tmp_path) -> None:
    file = write(tmp_path, "head")
    with pytest.raises(UnfitWeights, match=r"2 missing \(first: head\.weight"):
        references.model(ModelRef(model, file)).load()  # what runs the whole network, such as an edit
    state = torch.load(file)
    for change in ({"other.weight": torch.zeros(1)}, {"stem.weight": torch.zeros(5, 3, 3, 3)}):
        torch.save({**state, **change}, file)
        with pytest.raises(UnfitWeights, match=r"missing \(first: head\.weight"):
            network(model, file)


@pytest.mark.slow
def test_alexnet_without_its_classifier_is_network_and_encoder(shared: Path) -> None:
    file = str(shared / "data/weights/alexnet_features_imagenet.pth")
    built = network("alexnet/imagenet", file)
    weight = torch.load(file)["features.0.weight"]
    assert torch.equal(built.state_dict()["conv1.weight"], weight)
    with pytest.raises(MilanError, match="which layer fc6 needs"):
        network("alexnet/imagenet", file, "conv5", "fc6")
    encoder = get_encoder("alexnet").factory(file)
    assert torch.equal(encoder.state_dict()["features.0.weight"], weight)
