from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from milan_ray.errors import MilanError
from milan_ray.models.establish import establish
from milan_ray.models.hooks import LayerTap, find_layers, is_activation
from milan_ray.models.registry import Activations, ModelSpec
from milan_ray.models.view import Preprocess
from milan_ray.probe.folder import FolderProbe
from milan_ray.probe.manifest import image_refs


class Pair(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[dict[str, object], torch.Tensor]:
        return {"skipped": None, "kept": x + 1}, x


class Words(nn.Module):
    def forward(self, x: torch.Tensor) -> str:
        return "no tensor"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(4, 4)
        self.pair = Pair()
        self.words = Words()
        self.unused = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        self.words(x)
        return self.pair(self.twice(self.twice(x)))[1] * scale


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_tap_many_layers_collects_them_in_one_forward_in_order() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(16, 5))
    images = torch.randn(2, 3, 4, 4)
    with LayerTap(model, ["outputs", "1", "0"]) as tap:
        collected = tap(images)
    assert list(collected) == ["outputs", "1", "0"]
    torch.testing.assert_close(collected["0"], model[0](images), rtol=0, atol=0)
    torch.testing.assert_close(collected["1"], collected["0"].sigmoid(), rtol=0, atol=0)
    torch.testing.assert_close(collected["outputs"], model(images), rtol=0, atol=0)


def test_tap_inplace_successor_shows_its_result_as_the_reference_does() -> None:
    images = torch.randn(2, 3, 8, 8)
    for inplace in (True, False):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=inplace))
        with LayerTap(model, ["0"]) as tap, torch.no_grad():
            assert (tap(images)["0"].min() >= 0) == inplace


def test_tap_exit_releases_all_hooks_even_after_an_error() -> None:
    model = Net()
    with LayerTap(model, ["twice", "outputs"]):
        assert hooks_of(model) == 2
    assert hooks_of(model) == 0
    with pytest.raises(RuntimeError), LayerTap(model, ["twice"]) as tap:
        tap(torch.zeros(1, 99))
    assert hooks_of(model) == 0


def test_tap_module_called_twice_shows_the_last_output() -> None:
    model, x = Net(), torch.randn(2, 4)
    with LayerTap(model, ["twice"]) as tap:
        torch.testing.assert_close(tap(x)["twice"], model.twice(model.twice(x)))


def test_tap_nested_output_takes_the_first_tensor() -> None:
    model, x = Net(), torch.randn(2, 4)
    with LayerTap(model, ["pair"]) as tap:
        torch.testing.assert_close(tap(x)["pair"], model.twice(model.twice(x)) + 1)


def test_tap_layer_without_tensor_says_what_came() -> None:
    with pytest.raises(MilanError, match="'words' puts out a str"), LayerTap(Net(), ["words"]) as tap:
        tap(torch.zeros(1, 4))


def test_tap_layer_that_does_not_run_is_refused() -> None:
    with pytest.raises(MilanError, match="'unused' does not run"), LayerTap(Net(), ["unused"]) as tap:
        tap(torch.zeros(1, 4))


def test_tap_positional_and_keyword_inputs_reach_the_model() -> None:
    model, x, scale = Net(), torch.randn(2, 4), torch.tensor(2.0)
    with LayerTap(model, ["outputs"]) as tap:
        torch.testing.assert_close(tap((x, scale))["outputs"], model(x) * 2)
        torch.testing.assert_close(tap({"x": x, "scale": scale})["outputs"], model(x) * 2)


def test_find_layers_wrong_path_names_the_nearest() -> None:
    with pytest.raises(MilanError, match=r"unknown layer 'twise'; nearest: twice"):
        find_layers(Net(), ["twise"])


def test_find_layers_shared_module_is_found_under_both_names() -> None:
    model = nn.Module()
    model.a = model.b = nn.Identity()
    assert find_layers(model, ["a", "b"])["b"] is model.a


def golden_models(golden: Path) -> ModuleType:
    """The module that defines the golden networks."""
    spec = importlib.util.spec_from_file_location("golden_models", golden / "models.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "constructor", "layer"),
    [("toyvit_seed11", "ToyViT", "blocks.0.mlp.fc1"), ("toycnn_seed7", "ToyCNN", "conv2")],
)
def test_layers_of_golden_models_have_the_reference_s_maxima(
    golden: Path, name: str, constructor: str, layer: str
) -> None:
    """The whole path from files to units, against the reference's pooled activations of the same images."""
    model = getattr(golden_models(golden), constructor)()
    model.load_state_dict(torch.load(golden / f"{name}.pth", weights_only=True))
    spec = ModelSpec(name, lambda weights: model, (layer,), Preprocess())
    expected = np.load(golden / "exemplars" / name.split("_")[0] / layer / "stats.npz")["pooled"]

    probe = FolderProbe([golden / "images"])
    refs = image_refs(probe.manifest())
    assert len(refs) == len(expected)
    some = range(0, len(refs), 7)
    views = np.stack([spec.preprocess.view(probe.read(refs[i]).image) for i in some])
    with LayerTap(spec.load(), spec.layers) as tap, torch.inference_mode():
        maps = establish(spec, model, [layer])[layer].maps(tap(spec.prepare(torch.from_numpy(views)))[layer])
    np.testing.assert_allclose(maps.amax((2, 3)).numpy(), expected[list(some)], rtol=0, atol=1e-5)


ACTIVATIONS: tuple[Activations, ...] = ("seen", "pre", "post")


def tapped(model: nn.Module, layers: list[str], images: torch.Tensor) -> dict[Activations, dict[str, torch.Tensor]]:
    """What the layers show in each of the three ways."""
    found = {}
    for activations in ACTIVATIONS:
        with LayerTap(model.eval(), layers, activations=activations) as tap, torch.inference_mode():
            found[activations] = tap(images)
    return found


@pytest.mark.parametrize("inplace", [True, False])
def test_activations_before_and_after_do_not_depend_on_working_in_place_what_is_seen_does(inplace: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace), nn.Conv2d(4, 4, 3), nn.GELU(), nn.Flatten(2))
    images = torch.randn(2, 3, 8, 8)
    conv, second = F.conv2d(images, model.get_parameter("0.weight"), model.get_parameter("0.bias")), model[2]
    found = tapped(model, ["0", "2"], images)
    torch.testing.assert_close(found["pre"]["0"], conv)
    torch.testing.assert_close(found["post"]["0"], conv.relu())
    torch.testing.assert_close(found["seen"]["0"], conv.relu() if inplace else conv)
    torch.testing.assert_close(found["post"]["2"], F.gelu(second(conv.relu())))
    torch.testing.assert_close(found["seen"]["2"], found["pre"]["2"])


def test_activations_of_alexnet_are_seen_after_its_in_place_relus_as_the_reference_does() -> None:
    torch.manual_seed(0)
    model, layers = torchvision.models.alexnet(weights=None), [f"features.{i}" for i in (0, 3, 6, 8, 10)]
    found = tapped(model, layers, torch.randn(1, 3, 64, 64))
    for layer in layers:
        torch.testing.assert_close(found["seen"][layer], found["post"][layer], rtol=0, atol=0)
        torch.testing.assert_close(found["pre"][layer].relu(), found["post"][layer], rtol=0, atol=0)
        assert found["pre"][layer].min() < 0


def test_activations_of_layers_without_a_direct_follower_are_what_is_seen() -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(weights=None)
    layers = ["conv1", "bn1", "layer1", "fc"]
    found = tapped(model, layers, torch.randn(2, 3, 64, 64))
    for layer in layers:
        same = layer != "bn1"  # the in-place ReLU behind it
        assert torch.equal(found["pre"][layer], found["seen"][layer]) == same
        assert torch.equal(found["post"][layer], found["seen"][layer])


def test_activations_of_an_activation_layer_itself_are_its_own() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Sigmoid())
    found = tapped(model, ["0"], torch.tensor([[2.0, -1.0]]))
    assert found["seen"]["0"].max() == 2 > 1 > found["post"]["0"].max()  # the sigmoid took the ReLU's output


def test_activations_of_one_relu_behind_several_layers_are_told_apart() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.relu = nn.Linear(3, 3), nn.Linear(3, 3), nn.ReLU(inplace=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.relu(self.b(self.relu(self.a(x))))

    model, x = Shared(), torch.randn(5, 3)
    found = tapped(model, ["a", "b"], x)
    torch.testing.assert_close(found["post"]["a"], model.a(x).relu())
    torch.testing.assert_close(found["pre"]["b"], model.b(model.a(x).relu()))
    torch.testing.assert_close(found["post"]["b"], model.b(model.a(x).relu()).relu())


def test_is_activation_knows_torch_s_and_not_attention() -> None:
    assert all(map(is_activation, (nn.ReLU(), nn.GELU(), nn.Hardswish(), nn.PReLU())))
    assert not any(map(is_activation, (nn.MultiheadAttention(4, 2), nn.Dropout(), nn.Identity(), nn.BatchNorm2d(3))))


def test_parity_activations_in_place_relu_of_the_golden_network_is_seen(golden: Path) -> None:
    """In the reference: conv2's ReLU works in place, conv3's does not."""
    stats = {layer: np.load(golden / "exemplars/toycnn" / layer / "stats.npz") for layer in ("conv2", "conv3")}
    model = golden_models(golden).ToyCNN()
    model.load_state_dict(torch.load(golden / "toycnn_seed7.pth", weights_only=True))
    spec = ModelSpec("toycnn", lambda weights: model, ("conv2", "conv3"), Preprocess())
    probe = FolderProbe([golden / "images"])
    views = np.stack([spec.preprocess.view(probe.read(ref).image) for ref in image_refs(probe.manifest())[:8]])
    prepared = spec.prepare(torch.from_numpy(views))
    assert isinstance(prepared, torch.Tensor)
    found = tapped(model, ["conv2", "conv3"], prepared)
    for layer in ("conv2", "conv3"):
        pooled = found["seen"][layer].amax((2, 3)).numpy()
        np.testing.assert_allclose(pooled, stats[layer]["pooled"][:8], rtol=0, atol=1e-5)
    assert found["seen"]["conv2"].min() == 0 > found["pre"]["conv2"].min()
    assert found["seen"]["conv3"].min() < 0 == found["post"]["conv3"].min()
