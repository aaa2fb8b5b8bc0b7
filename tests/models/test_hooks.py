from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from milan_ray.errors import MilanError
from milan_ray.models.hooks import LayerTap, find_layers
from milan_ray.models.registry import ModelSpec
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


@pytest.mark.parametrize(
    ("name", "constructor", "layer"),
    [("toyvit_seed11", "ToyViT", "blocks.0.mlp.fc1"), ("toycnn_seed7", "ToyCNN", "conv2")],
)
def test_layers_of_golden_models_have_the_reference_s_maxima(
    golden: Path, name: str, constructor: str, layer: str
) -> None:
    """The whole path from files to units, against the reference's pooled activations of the same images."""
    module_spec = importlib.util.spec_from_file_location("golden_models", golden / "models.py")
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    model = getattr(module, constructor)()
    model.load_state_dict(torch.load(golden / f"{name}.pth", weights_only=True))
    spec = ModelSpec(name, lambda weights: model, (layer,), Preprocess())
    expected = np.load(golden / "exemplars" / name.split("_")[0] / layer / "stats.npz")["pooled"]

    probe = FolderProbe([golden / "images"])
    refs = image_refs(probe.manifest())
    assert len(refs) == len(expected)
    some = range(0, len(refs), 7)
    views = np.stack([spec.preprocess.view(probe.read(refs[i]).image) for i in some])
    with LayerTap(spec.load(), spec.layers) as tap, torch.inference_mode():
        maps = spec.unit_maps(layer, tap(spec.prepare(torch.from_numpy(views)))[layer])
    np.testing.assert_allclose(maps.amax((2, 3)).numpy(), expected[list(some)], rtol=0, atol=1e-5)
