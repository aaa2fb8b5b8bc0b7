from __future__ import annotations

import hashlib
import json
import math
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision import models

from milan_ray.errors import MilanError
from milan_ray.models import torchvision_zoo
from milan_ray.models.describe import layer_table
from milan_ray.models.hooks import LayerTap
from milan_ray.models.registry import OUTPUTS, RANDOM, get_model, model_names
from milan_ray.models.resolve import resolve_model
from milan_ray.models.weights import weights_digest

ARCHITECTURES = models.list_models(module=models)
# Their constructors compute with tensor values, which the meta device has not; the smallest stands for its family.
NOT_ON_META = [name for name in ARCHITECTURES if name.startswith("regnet") and name != "regnet_y_400mf"]


def test_zoo_every_classifier_is_registered_and_picklable_without_building_any() -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(nn.Conv2d, "__init__", lambda *_, **__: pytest.fail("a network is built"))
        torchvision_zoo.register()
    assert {f"{name}/imagenet" for name in ARCHITECTURES} <= set(model_names())
    spec = pickle.loads(pickle.dumps(get_model("resnet18/imagenet")))
    assert spec.layers == ("conv1", "layer1", "layer2", "layer3", "layer4")
    assert spec.preprocess.view.key == "r256-c224-bilinear-224x224"
    assert spec.classes[207] == "golden retriever"


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name not in NOT_ON_META])
def test_zoo_default_layers_put_out_maps_of_units(architecture: str) -> None:
    """On the meta device: shapes without arithmetic."""
    spec = get_model(f"{architecture}/imagenet")
    if architecture.startswith("regnet"):
        model = spec.factory(RANDOM).to("meta")
    else:
        with torch.device("meta"):
            model = spec.factory(RANDOM)
    assert OUTPUTS not in spec.layers
    views = torch.zeros((2, *spec.preprocess.view.shape, 3), dtype=torch.uint8, device="meta")
    with LayerTap(model.eval(), spec.layers) as tap, torch.no_grad():
        outputs = tap(spec.prepare(views))
    for layer, output in outputs.items():
        if output.ndim == 3:
            assert spec.prefix_tokens is not None
            assert output.shape[1] - spec.prefix_tokens == math.isqrt(output.shape[1]) ** 2 > 1
            continue
        maps = output.permute(0, 3, 1, 2) if spec.is_channels_last(layer) else output
        assert maps.shape[0] == 2 and maps.shape[2] == maps.shape[3] > 1, (layer, output.shape)
        assert maps.shape[1] >= 8


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name.startswith("vgg")])
def test_zoo_default_layers_of_vggs_are_the_last_convolutions_of_their_stages(architecture: str) -> None:
    with torch.device("meta"):
        features = torchvision_zoo.build(architecture, RANDOM).get_submodule("features")
    kinds = [type(module).__name__ for module in features.children()]
    last = [
        max(i for i in range(pool) if kinds[i] == "Conv2d") for pool, kind in enumerate(kinds) if kind == "MaxPool2d"
    ]
    assert get_model(f"{architecture}/imagenet").layers == tuple(f"features.{i}" for i in last)


def test_zoo_random_weights_are_seed_0_and_leave_the_generator_alone(golden: Path) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    model = resolve_model("resnet18/imagenet", RANDOM).load()
    assert torch.equal(torch.get_rng_state(), state)
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    meta = json.loads((golden / "exemplars/resnet18/conv1/meta.json").read_text())
    assert digest.hexdigest() == meta["state_dict_sha256"]


@pytest.mark.parametrize(
    ("architecture", "file", "classes"),
    [
        ("squeezenet1_0", "squeezenet1_0_deepcompression.pth", 1000),
        ("mobilenet_v2", "mobilenet_v2_tf2_ptq.pth", 1000),
        ("mobilenet_v2", "mobilenet_v2_inat_bird_fp16.pth", 965),
    ],
)
def test_zoo_real_weights_load_strictly_with_their_own_classes(
    shared: Path, architecture: str, file: str, classes: int
) -> None:
    spec = resolve_model(f"{architecture}/imagenet", str(shared / "data/weights" / file))
    model = spec.load()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with LayerTap(model, [*spec.layers, OUTPUTS]) as tap, torch.inference_mode():
        outputs = tap(torch.zeros(1, 3, 224, 224))
    assert outputs[OUTPUTS].shape == (1, classes)


def test_zoo_weights_of_another_architecture_are_refused(shared: Path) -> None:
    spec = resolve_model("resnet18/imagenet", str(shared / "data/weights/mobilenet_v2_tf2_ptq.pth"))
    with pytest.raises(MilanError, match=r"does not fit ResNet: weights \d+ missing \(first: conv1\.weight"):
        spec.load()


@pytest.mark.parametrize("architecture", ["googlenet", "inception_v3"])
def test_zoo_auxiliary_heads_in_a_file_are_left_out(tmp_path: Path, architecture: str) -> None:
    torch.save(models.get_model(architecture, weights=None, init_weights=False).state_dict(), tmp_path / "w.pth")
    model = resolve_model(f"{architecture}/imagenet", str(tmp_path / "w.pth")).load()
    assert model.transform_input and not any(name.lower().startswith("aux") for name in model.state_dict())


def test_zoo_absent_weights_error_names_file_places_and_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("MILAN_MODELS_DIR", str(tmp_path / "models"))
    with pytest.raises(MilanError) as caught:
        resolve_model("resnet18/imagenet")
    text = str(caught.value)
    assert "resnet18-f37072fd.pth" in text and "https://" in text and "\n" not in text
    assert str(tmp_path / "hub/hub/checkpoints") in text and str(tmp_path / "models") in text


def test_zoo_weights_in_the_models_directory_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("MILAN_MODELS_DIR", str(tmp_path))
    random = resolve_model("squeezenet1_1/imagenet", RANDOM).load()
    torch.save(random.state_dict(), tmp_path / "squeezenet1_1-b8a52dc0.pth")
    spec = resolve_model("squeezenet1_1/imagenet")
    assert spec.weights == str(tmp_path / "squeezenet1_1-b8a52dc0.pth")
    assert weights_digest(spec.load()) == weights_digest(random)


def test_zoo_published_name_gives_preprocessing_wherever_the_file_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("MILAN_MODELS_DIR", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    for path in ("resnet50-0676ba61.pth", "resnet50-11ad3fa6.pth", "elsewhere/resnet50-11ad3fa6.pth"):
        (tmp_path / path).touch()
    resizes = {
        weights: resolve_model("resnet50/imagenet", weights and weights.format(tmp_path)).preprocess.view.resize
        for weights in (None, "IMAGENET1K_V1", "IMAGENET1K_V2", "{}/elsewhere/resnet50-11ad3fa6.pth", RANDOM)
    }
    assert list(resizes.values()) == [256, 256, 232, 232, 256]
    with pytest.raises(MilanError, match=r"give the path of an existing file, one of IMAGENET1K_V1, IMAGENET1K_V2, or"):
        resolve_model("resnet50/imagenet", "IMAGENET1K_V3")


def test_zoo_weights_by_file_address_are_used_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("MILAN_MODELS_DIR", str(tmp_path / "models"))
    state = models.squeezenet1_1(weights=None, num_classes=7).state_dict()
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, tmp_path / "mine.pth")
    spec = resolve_model("squeezenet1_1/imagenet", (tmp_path / "mine.pth").as_uri())
    assert spec.weights == str(tmp_path / "mine.pth") and not (tmp_path / "models").exists()
    assert all(torch.equal(tensor, state[name]) for name, tensor in spec.load().state_dict().items())


@pytest.mark.parametrize("family", ["densenet", "alexnet"])
def test_zoo_names_of_published_files_become_torchvision_s(tmp_path: Path, family: str) -> None:
    """The oldest DenseNets write ``norm.1``; PyTorch's ImageNet example leaves ``module.`` inside ``features``."""
    if family == "densenet":
        model: torch.nn.Module = models.DenseNet(8, (1, 1, 1, 1), 16)
        old = {re.sub(r"(norm|conv)([12])\.", r"\1.\2.", name): name for name in model.state_dict()}
        assert "features.denseblock1.denselayer1.norm.1.weight" in old
    else:
        model = models.alexnet(weights=None)
        old = {name.replace("features.", "features.module."): name for name in model.state_dict()}
    assert {name: torchvision_zoo.published_name(name) for name in old} == old


def test_zoo_vision_transformer_takes_the_image_size_of_its_file(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = models.get_model("vit_b_16", weights=None, image_size=384)
    sizes = torchvision_zoo._sizes("vit_b_16", models.get_model("vit_b_16", weights=None), model.state_dict())
    assert sizes == {"image_size": 384}


def test_zoo_alexnet_by_name_computes_what_torchvision_s_does() -> None:
    torch.manual_seed(0)
    plain = models.alexnet(weights=None).eval()
    images = torch.rand(2, 3, 224, 224)
    with LayerTap(plain, ["features.0", "features.10", "outputs"]) as tap, torch.inference_mode():
        expected = list(tap(images).values())
    named = torchvision_zoo.alexnet_by_name(plain)
    with LayerTap(named, ["conv1", "conv5", "outputs"]) as tap, torch.inference_mode():
        for got, want in zip(tap(images).values(), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_layer_table_of_an_absent_model_lists_layers_without_weights() -> None:
    table = {info.path: info for info in layer_table(get_model("squeezenet1_1/imagenet"))}
    assert table["features.3"].kind == "Fire"
    assert table["features.3"].shape == (128, 55, 55) and table["features.3"].units == 128
    assert table["features.3"].default and not table["features.1"].default
    assert table[OUTPUTS].shape == (1000,) and table[OUTPUTS].units == 1000
