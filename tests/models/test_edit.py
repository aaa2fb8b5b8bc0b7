"""Units zeroed in the weights, against units switched off by hooks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from milan_ray.errors import MilanError
from milan_ray.models.ablation import Ablation, UnitSet
from milan_ray.models.edit import edited
from milan_ray.world.networks import ARCHITECTURES
from tests.models.test_ablation import images, spec_of, with_features


def trained_statistics(network: nn.Module) -> nn.Module:
    """Batch normalisation that does something, as after training."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return network


def edits_like_hooks(build: Callable[[], nn.Module], units: UnitSet) -> set[str]:
    """Asserts that a fresh network with the edited weights puts out what hooks make of the original.

    Returns:
        The names of the weights that were edited.
    """
    spec, network = spec_of(lambda: trained_statistics(build()))
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    state = edited(spec, network, units, images(2, seed=3))
    fresh = build().eval()
    fresh.load_state_dict(state)
    views = images(6)
    with torch.inference_mode():
        found = fresh(spec.prepare(views))
        unchanged = network(spec.prepare(views))
    torch.testing.assert_close(found, Ablation(spec, network, [units]).logits(views)[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, unchanged, atol=1e-4)  # the units matter
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())
    return {key for key, tensor in state.items() if not torch.equal(tensor, before[key])}


@pytest.mark.parametrize(
    ("name", "units"),
    [
        ("cnn", {"conv1": [0, 3], "conv4": [1, 2, 95]}),  # rows of batch normalisation
        ("resnet", {"stem": [4]}),
        ("resnet", {"layer1": [0, 7]}),  # a residual sum: columns of both readers
        ("resnet", {"layer3": list(range(40))}),  # read by the head through a mean
        ("resnet", {"stem": [1], "layer1": [2], "layer2": [3], "layer3": [4]}),
        ("vit", {"stem": [2]}),
    ],
)
def test_edited_weights_do_what_hooks_do(name, units):
    assert edits_like_hooks(ARCHITECTURES[name].build, units)


def test_resnet18s_residual_layers():
    torchvision = pytest.importorskip("torchvision")
    changed = edits_like_hooks(
        lambda: torchvision.models.resnet18(num_classes=5), {"layer1": [3], "layer4": [500], "conv1": [7]}
    )
    assert changed == {"conv1.weight", "layer2.0.conv1.weight", "layer2.0.downsample.0.weight", "fc.weight"}


class Shortcut(nn.Module):
    """A layer that is read by a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Softplus())  # not zero where its input is
        self.head = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head((self.inner(x) + x).mean((2, 3)))


def test_layer_that_cannot_be_edited_is_refused():
    spec, network = spec_of(Shortcut)
    with pytest.raises(MilanError, match="something else than"):
        edited(spec, network, {"inner": [0]}, images(2))
    spec, network = spec_of(ARCHITECTURES["vit"].build)
    with pytest.raises(MilanError, match=r"'blocks\.1' cannot be switched off in the weights"):
        edited(spec, network, {"blocks.1": [0]}, images(2))


class Linears(nn.Module):
    """Functional activations, and a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(3, 4, 2, 2)
        self.after = nn.Linear(4, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.after(self.up(x).mean((2, 3)))))


@pytest.mark.parametrize(("layer", "units"), [("up", [1, 3]), ("after", [0, 2, 4])])
def test_transposed_convolutions_and_linear_maps(layer, units):
    assert edits_like_hooks(Linears, {layer: units}) == {f"{layer}.weight", f"{layer}.bias"}


class Linearly(nn.Module):
    """Two layers with nothing but linear operations behind them."""

    def __init__(self, end: nn.Module) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 5, stride=4), end)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.flatten(self.pool(self.first(x)), 1))


@pytest.mark.parametrize(
    ("end", "changed"),
    [
        (nn.ReLU(), {"head.weight"}),
        (nn.Conv2d(8, 8, 1), {"first.1.weight", "first.1.bias"}),
        (nn.ConvTranspose2d(8, 8, 2), {"first.1.weight", "first.1.bias"}),
        (nn.BatchNorm2d(8), {"head.weight"}),
    ],
)
def test_features_are_projected_out_of_the_weights_that_make_or_read_them(end, changed):
    spec, network = spec_of(lambda: trained_statistics(Linearly(end)))
    found = torch.randn(12, 8, generator=torch.Generator().manual_seed(2))
    spec = with_features(spec, "first", found)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    state = edited(spec, network, {"first#toy": [3, 7, 11]}, images(2, seed=3))
    assert {key for key, tensor in state.items() if not torch.equal(tensor, before[key])} == changed
    views = images(5)
    logits = torch.func.functional_call(network, state, (spec.prepare(views),))
    wanted = Ablation(spec, network, [{"first#toy": [3, 7, 11]}]).logits(views)[0]
    torch.testing.assert_close(logits.detach(), wanted, rtol=1e-4, atol=1e-5)


def test_features_with_a_rectifier_between_them_and_their_readers_are_refused():
    spec, network = spec_of(ARCHITECTURES["cnn"].build)
    spec = with_features(spec, "conv2", torch.eye(48)[:5])
    with pytest.raises(
        MilanError, match="'conv2' cannot be switched off in the weights: max_pool2d_1 reads it, which is not linear"
    ):
        edited(spec, network, {"conv2#toy": [0]}, images(2))
