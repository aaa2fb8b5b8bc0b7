"""Switching units off, against doing it one set at a time by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from milan_ray.errors import MilanError
from milan_ray.models.ablation import Ablation
from milan_ray.models.features.sets import find_features, register_features
from milan_ray.models.registry import ModelSpec
from milan_ray.models.view import Preprocess, View
from milan_ray.world.networks import ARCHITECTURES

PREPROCESS = Preprocess(View(resize=None, crop=64), (0.5,) * 3, (0.25,) * 3)


def spec_of(build: Callable[[], nn.Module], **options: object) -> tuple[ModelSpec, nn.Module]:
    torch.manual_seed(0)
    network = build().eval().requires_grad_(False)
    spec = ModelSpec("toy/net", lambda weights: network, (), PREPROCESS, **options)  # type: ignore[arg-type]
    return spec, network


def images(count: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 64, 64, 3), generator=generator, dtype=torch.uint8)


@torch.inference_mode()
def by_hand(spec: ModelSpec, network: nn.Module, views: torch.Tensor, one: dict[str, list[int]]) -> torch.Tensor:
    """The reference's way: the layer's output times a mask, for one set."""

    def times_mask(layer: str) -> Callable[..., torch.Tensor]:
        def hook(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
            mask = torch.ones_like(output)
            for unit in one[layer]:
                (mask if output.ndim != 3 else mask.transpose(1, 2))[:, unit] = 0
            return output * mask

        return hook

    handles = [network.get_submodule(layer).register_forward_hook(times_mask(layer)) for layer in one]
    output = network(spec.prepare(views))
    for handle in handles:
        handle.remove()
    return output


SETS = {
    "cnn": [{}, {"conv2": [3]}, {"conv4": [0, 5]}, {"conv4": [7]}, {"conv1": [1], "conv3": [2, 4]}, {"conv2": [9]}],
    "resnet": [{"layer1": [1]}, {"layer1": [2, 3], "layer3": [0]}, {}, {"stem": [4]}, {"layer3": [9]}],
    "vit": [{"stem": [3]}, {"blocks.1": [0, 1]}, {"blocks.1": [5], "blocks.2": [6]}, {"blocks.2": [7]}, {"head": [2]}],
}


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("rows", [1, 7, 512])
def test_every_set_gives_what_it_gives_alone(name, rows):
    spec, network = spec_of(ARCHITECTURES[name].build)
    views = images(3)
    found = Ablation(spec, network, SETS[name], rows).logits(views)
    assert found.shape == (len(SETS[name]), 3, 12)
    for one, logits in zip(SETS[name], found, strict=True):
        torch.testing.assert_close(logits, by_hand(spec, network, views, one), rtol=1e-4, atol=1e-5)


class Counting(nn.Module):
    """Counts the images that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += len(x)
        return x


def test_what_comes_before_the_first_layer_runs_once_for_all_sets():
    spec, network = spec_of(
        lambda: nn.Sequential(Counting(), nn.Conv2d(3, 8, 3, 8), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(512, 4))
    )
    ablation = Ablation(spec, network, [{"1": [unit]} for unit in range(8)])
    ablation.logits(images(5))  # finds out that sharing works
    counting = network.get_submodule("0")
    assert isinstance(counting, Counting)
    before = counting.seen
    ablation.logits(images(5, seed=2))
    assert counting.seen - before == 5


class Around(nn.Module):
    """A shortcut around the layer that is changed."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(3, 3, 3, padding=1)
        self.head = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head((x + self.inner(x)).mean((2, 3)))


def test_shortcut_around_a_layer_is_found_out():
    spec, network = spec_of(Around)
    sets = [{"inner": [unit]} for unit in range(3)]
    views = images(4)
    for logits, one in zip(Ablation(spec, network, sets).logits(views), sets, strict=True):
        torch.testing.assert_close(logits, by_hand(spec, network, views, one), rtol=1e-4, atol=1e-5)


class Mixing(nn.Module):
    """Rows that see their batch, so that a longer batch would give other answers, without any error."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(3, 3, 8, 8)
        self.head = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner(x)
        return self.head((x - x.mean(0, keepdim=True)).abs().mean((2, 3)))


def test_network_that_looks_at_its_batch_is_found_out():
    spec, network = spec_of(Mixing)
    sets = [{"inner": [unit]} for unit in range(3)]
    views = images(4)
    for logits, one in zip(Ablation(spec, network, sets).logits(views), sets, strict=True):
        torch.testing.assert_close(logits, by_hand(spec, network, views, one), rtol=1e-4, atol=1e-5)


def test_correct_counts_by_class():
    spec, network = spec_of(ARCHITECTURES["cnn"].build)
    views, labels = images(12), torch.arange(12) % 12
    sets = [{}, {"conv4": list(range(96))}]
    found = Ablation(spec, network, sets).correct(views, labels)
    for counts, one in zip(found, sets, strict=True):
        right = by_hand(spec, network, views, one).argmax(1) == labels
        assert counts.tolist() == [int(right[labels == c].sum()) for c in range(12)]


class ChannelsLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(x.permute(0, 2, 3, 1)).mean((1, 2)))


def test_units_of_layers_with_channels_last():
    spec, network = spec_of(ChannelsLast, channels_last="inner")
    every = Ablation(spec, network, [{"inner": [0, 1, 2, 3, 4]}]).logits(images(2))[0]
    torch.testing.assert_close(every, network.get_parameter("head.bias").expand(2, -1))


class InATuple(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LSTM(3, 4, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens, _ = self.inner(x.flatten(2).transpose(1, 2)[:, :9])
        return self.head(tokens.mean(1))


def test_units_of_a_layer_that_puts_out_a_tuple():
    spec, network = spec_of(InATuple)
    every = Ablation(spec, network, [{"inner": [0, 1, 2, 3]}, {}]).logits(images(2))
    torch.testing.assert_close(every[0], network.get_parameter("head.bias").expand(2, -1))
    torch.testing.assert_close(every[1], network(spec.prepare(images(2))))


UNIT_SETS = st.dictionaries(st.sampled_from(["conv1", "conv3", "conv4"]), st.lists(st.integers(0, 23)))


@settings(max_examples=25, deadline=None)
@given(st.lists(UNIT_SETS, min_size=1, max_size=6))
def test_any_sets_in_any_order(sets):
    spec, network = spec_of(ARCHITECTURES["cnn"].build)
    views = images(2)
    for logits, one in zip(Ablation(spec, network, sets, rows=5).logits(views), sets, strict=True):
        torch.testing.assert_close(logits, by_hand(spec, network, views, one), rtol=1e-4, atol=1e-5)


def test_unknown_layers_and_units_and_outputs_are_named():
    spec, network = spec_of(ARCHITECTURES["cnn"].build)
    with pytest.raises(MilanError, match="conv4"):
        Ablation(spec, network, [{"conv44": [0]}])
    with pytest.raises(MilanError, match="96 units, so none of number 96"):
        Ablation(spec, network, [{"conv4": [96]}]).logits(images(1))
    spec, network = spec_of(lambda: nn.Sequential(nn.Conv2d(3, 4, 3)))
    with pytest.raises(MilanError, match="one row of logits per image"):
        Ablation(spec, network, [{"0": [1]}]).logits(images(1))


def with_features(spec: ModelSpec, layer: str, found: torch.Tensor) -> ModelSpec:
    register_features("toy", "toy/net", layer, torch.relu, len(found), directions=found)
    return replace(spec, features={f"{layer}#toy": find_features("toy/net", f"{layer}#toy")})


@pytest.mark.parametrize(("architecture", "layer"), [("cnn", "conv2"), ("resnet", "layer1"), ("vit", "blocks.1")])
def test_features_are_projected_out_of_the_layers_output(architecture, layer):
    spec, network = spec_of(ARCHITECTURES[architecture].build)
    shapes: list[torch.Size] = []
    handle = network.get_submodule(layer).register_forward_hook(lambda _m, _a, output: shapes.append(output.shape))
    network(spec.prepare(images(1)))
    handle.remove()
    axis = 2 if len(shapes[0]) == 3 else 1
    width = shapes[0][axis]
    found = torch.randn(width + 9, width, generator=torch.Generator().manual_seed(2))
    found[4] = 2 * found[3]  # no new direction
    name = f"{layer}#toy"
    views = images(3)
    cases: list[tuple[list[int], list[int]]] = [([], [0]), ([], [1, 3, 4]), ([2], [5]), ([], [])]
    sets = [{layer: units, name: features} for units, features in cases]
    logits = Ablation(with_features(spec, layer, found), network, sets).logits(views)

    @torch.inference_mode()
    def naive(units: list[int], features: list[int]) -> torch.Tensor:
        def hook(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
            x = output.movedim(axis, -1)
            across = torch.cat([torch.eye(width)[units], found[features]])
            return (x - x @ torch.linalg.pinv(across) @ across if len(across) else x).movedim(-1, axis)

        handle = network.get_submodule(layer).register_forward_hook(hook)
        output = network(spec.prepare(views))
        handle.remove()
        return output

    for logit, (units, features) in zip(logits, cases, strict=True):
        torch.testing.assert_close(logit, naive(units, features), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits[0], logits[3], atol=1e-4)


def test_directions_that_are_the_axes_are_the_units():
    spec, network = spec_of(ARCHITECTURES["cnn"].build)
    with_set = with_features(spec, "conv2", torch.eye(48))
    views = images(3)
    units, features = (Ablation(with_set, network, [{name: [3, 5]}]).logits(views) for name in ("conv2", "conv2#toy"))
    torch.testing.assert_close(units, features)


def test_features_without_directions_or_of_a_higher_number_are_refused():
    spec, network = spec_of(ARCHITECTURES["cnn"].build)
    register_features("bare", "toy/net", "conv2", torch.relu, 5)
    bare = replace(spec, features={"conv2#bare": find_features("toy/net", "conv2#bare")})
    with pytest.raises(MilanError, match=r"have no directions.*register them with directions="):
        Ablation(bare, network, [{"conv2#bare": [0]}])
    five = with_features(spec, "conv2", torch.eye(48)[:5])
    with pytest.raises(MilanError, match="'conv2#toy' has 5 units, so none of number 5"):
        Ablation(five, network, [{"conv2#toy": [5]}]).logits(images(1))
