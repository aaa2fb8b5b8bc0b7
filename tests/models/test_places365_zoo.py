"""Published scene classifiers: their files' names for parameters, and what the rearranged networks compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision import models

from milan_ray.errors import MilanError
from milan_ray.models import places365_zoo
from milan_ray.models.resolve import resolve_model


def chain_names(model: models.ResNet) -> dict[str, str]:
    """A ResNet's names → those of the published chain; a block is (branches, sum, ReLU), branches (main, shortcut)."""
    module = {"conv1": 0, "bn1": 1, "conv2": 3, "bn2": 4, "conv3": 6, "bn3": 7}
    renamed = {}
    for name in model.state_dict():
        part, *rest = name.split(".")
        if part.startswith("layer"):
            block, kind, *leaf = rest
            where = ["1", leaf.pop(0)] if kind == "downsample" else ["0", str(module[kind])]
            renamed[name] = ".".join([str(int(part[5]) + 3), block, "0", *where, *leaf])
        else:
            renamed[name] = ".".join([{"conv1": "0", "bn1": "1", "fc": "10.1"}[part], *rest])
    return renamed


def test_places_resnet152_names_of_the_chain_become_torchvision_s() -> None:
    with torch.device("meta"):
        names = chain_names(models.resnet152(weights=None))
    assert "7.2.0.0.6.weight" in names.values() and "4.0.0.1.0.weight" in names.values()
    assert {places365_zoo.resnet152_name(published): own for own, published in names.items()} == {
        own: own for own in names
    }


def test_places_vgg16_names_of_layers_become_torchvision_s() -> None:
    with torch.device("meta"):
        model = models.vgg16(weights=None)
    convs = [name for name, module in model.features.named_children() if isinstance(module, nn.Conv2d)]
    published = [f"conv{stage}_{i}" for stage, count in enumerate((2, 2, 3, 3, 3), 1) for i in range(1, count + 1)]
    names = {
        f"features.{layer}.weight": f"features.{conv}.weight" for layer, conv in zip(published, convs, strict=True)
    }
    names |= {f"classifier.{layer}.bias": f"classifier.{i}.bias" for layer, i in (("fc6", 0), ("fc7", 3), ("fc8a", 6))}
    assert {name: places365_zoo.vgg16_name(name) for name in names} == names


def test_places_resnet18_file_with_its_wrapping_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILAN_MODELS_DIR", str(tmp_path))
    state = models.resnet18(weights=None, num_classes=365).state_dict()
    (tmp_path / "resnet18").mkdir()
    content = {"epoch": 90, "arch": "resnet18", "state_dict": {f"module.{name}": t for name, t in state.items()}}
    torch.save(content, tmp_path / "resnet18/places365.pth")  # where the reference keeps it
    model = resolve_model("resnet18/places365").load()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_places_resnet_in_order_computes_what_torchvision_s_does() -> None:
    torch.manual_seed(0)
    model = models.resnet18(weights=None, num_classes=5).eval()
    chain, images = places365_zoo.in_order(model), torch.rand(2, 3, 64, 64)
    assert [type(chain[i]).__name__ for i in (0, 4, 7, 10)] == ["Conv2d", "Sequential", "Sequential", "Linear"]
    with torch.inference_mode():
        torch.testing.assert_close(chain(images), model(images), rtol=0, atol=0)


def test_places_alexnet_computes_caffe_s_groups_without_normalisation() -> None:
    torch.manual_seed(0)
    with torch.device("meta"):
        assert places365_zoo.build_alexnet(None)(torch.zeros(1, 3, 224, 224)).shape == (1, 365)
    features: Any = places365_zoo.alexnet(classes=2)[:4].eval()
    x = torch.rand(1, 3, 64, 64) * 20
    with torch.inference_mode():
        pooled = F.max_pool2d(features.conv1(x).relu(), 3, 2)
        halves = [
            F.conv2d(half, weight, padding=2)
            for half, weight in zip(pooled.chunk(2, 1), features.conv2.weight.chunk(2), strict=True)
        ]
        conv2 = torch.cat(halves, 1) + features.conv2.bias.view(1, -1, 1, 1)
        torch.testing.assert_close(features(x), conv2, rtol=1e-4, atol=1e-4)


def test_places_absent_weights_are_named_both_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("MILAN_MODELS_DIR", str(tmp_path))
    with pytest.raises(MilanError, match=r"alexnet_places365-6d3c0e75\.pth or alexnet/places365\.pth is neither in .*"):
        resolve_model("alexnet/places365")
