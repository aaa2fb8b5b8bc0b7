"""The reference's models and layers, written down once more and held against the architectures."""

from __future__ import annotations

import pytest
import torch

from milan_ray.models.hooks import LayerTap
from milan_ray.models.registry import RANDOM, get_model
from milan_ray.plugins import load_plugins

load_plugins()


def features(*indices: int) -> dict[str, None]:
    return {f"features.{index}": None for index in indices}


def convs(*units: int) -> dict[str, int]:
    return {f"conv{number}": count for number, count in enumerate(units, 1)}


def stages(*units: int) -> dict[str, int]:
    return dict(zip(("conv1", "layer1", "layer2", "layer3", "layer4"), units, strict=True))


def densenet(*units: int) -> dict[str, int]:
    return dict(zip(("features.conv0", *(f"features.denseblock{i}" for i in range(1, 5))), units, strict=True))


SMALL, LARGE = stages(64, 64, 128, 256, 512), stages(64, 256, 512, 1024, 2048)
# Layer → its units, where the number is in the paper or in the name of the architecture.
IMAGENET: dict[str, dict[str, int | None]] = {
    "alexnet": {**convs(64, 192, 384, 256, 256)},
    "densenet121": {**densenet(64, 256, 512, 1024, 1024)},
    "densenet201": {**densenet(64, 256, 512, 1792, 1920)},
    "mobilenet_v2": {**features(0, 2, 4, 6, 8, 10, 12, 14, 16, 18)},
    "resnet18": {**SMALL},
    "resnet34": {**SMALL},
    "resnet50": {**LARGE},
    "resnet101": {**LARGE},
    "resnet152": {**LARGE},
    "shufflenet_v2_x1_0": {"conv1": 24, "stage2": 116, "stage3": 232, "stage4": 464, "conv5": 1024},
    "squeezenet1_0": {**features(0, 3, 4, 5, 7, 8, 9, 10, 12)},
    "vgg11": dict(zip(features(0, 3, 8, 13, 18), (64, 128, 256, 512, 512), strict=True)),
    "vgg13": dict(zip(features(2, 7, 12, 17, 22), (64, 128, 256, 512, 512), strict=True)),
    "vgg16": dict(zip(features(2, 7, 14, 21, 28), (64, 128, 256, 512, 512), strict=True)),
    "vgg19": dict(zip(features(2, 7, 16, 25, 34), (64, 128, 256, 512, 512), strict=True)),
}
BLURRED: dict[str, dict[str, int | None]] = {
    **IMAGENET,
    "alexnet": dict(zip(features(0, 3, 6, 8, 10), (64, 192, 384, 256, 256), strict=True)),
}
PLACES: dict[str, dict[str, int | None]] = {
    "alexnet": {**convs(96, 256, 384, 384, 256)},
    "resnet18": {**SMALL},
    "resnet152": dict(zip("04567", LARGE.values(), strict=True)),
    "vgg16": IMAGENET["vgg16"],
}
ALL: dict[str, dict[str, int | None]] = {
    **{f"{name}/imagenet": layers for name, layers in IMAGENET.items()},
    **{f"{name}/imagenet-blurred": layers for name, layers in BLURRED.items()},
    **{f"{name}/places365": layers for name, layers in PLACES.items()},
    "dino_vits8/imagenet": {f"blocks.{block}.mlp.fc1": 1536 for block in range(12)},
}


@pytest.mark.parametrize("name", ALL)
def test_parity_zoo_layers_are_the_reference_s_and_exist(name: str) -> None:
    """On the meta device: shapes without weights or arithmetic."""
    spec = get_model(name)
    assert spec.layers == tuple(ALL[name])
    assert spec.preprocess.view.key == "r256-c224-bilinear-224x224"
    with torch.device("meta"):
        model = spec.factory(RANDOM)
    views = torch.zeros((2, 224, 224, 3), dtype=torch.uint8, device="meta")
    with LayerTap(model.eval(), [*spec.layers, "outputs"]) as tap, torch.no_grad():
        outputs = tap(spec.prepare(views))
    classes = outputs.pop("outputs").shape[1]
    assert classes == {"places365": 365, "dino_vits8": 384}.get(name.split("/")[name.endswith("places365")], 1000)
    for layer, output in outputs.items():
        assert output.ndim == (3 if spec.prefix_tokens else 4), layer
        units = output.shape[-1 if spec.prefix_tokens else 1]
        assert units == (ALL[name][layer] or units), layer


def test_parity_zoo_batches_of_dino_are_32() -> None:
    assert [get_model(f"{name}/imagenet").batch(128) for name in ("dino_vits8", "resnet18")] == [32, 128]


@pytest.mark.parametrize("name", [name for name in ALL if not name.endswith("blurred")])
def test_parity_zoo_published_weights_lead_with_the_reference_s(name: str) -> None:
    first, file = next(iter(get_model(name).published.items()))
    if name.endswith("places365"):
        assert file.url is not None and file.url.startswith("https://dissect.csail.mit.edu/models/")
        assert file.also == (f"{name}.pth",)
    elif name.startswith("dino"):
        assert file.url == "https://dl.fbaipublicfiles.com/dino/dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth"
    else:
        assert first == "IMAGENET1K_V1"
