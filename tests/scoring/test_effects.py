"""Effects of units on classes, against changing a unit by hand and running the whole network again."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from milan_ray.errors import MilanError
from milan_ray.models.ablation import Ablation
from milan_ray.models.establish import established
from milan_ray.models.interventions import ABLATED, AMPLIFIED, CHANGES, RANDOM, Interventions
from milan_ray.models.registry import ModelSpec
from milan_ray.models.tail import Tail
from milan_ray.models.view import Preprocess, View
from milan_ray.scoring.effects import DETAILED, EffectSums, are_probabilities, effects, log_scores, peers
from milan_ray.scoring.layer_effects import LayerEffects, check_reaches

SIDE = 32
FACTOR = 2.0


class Residual(nn.Module):
    """Blocks with shortcuts, activation functions in place, and a sum in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(Block(6), Block(6))
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(F.relu(self.stem(x))).mean(dim=(2, 3)))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.norm, self.relu = nn.BatchNorm2d(width), nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.norm(self.conv2(self.relu(self.conv1(x))))
        out += x
        return self.relu(out)


def mobile() -> nn.Module:
    """Depthwise convolutions and ReLU6; the classifier reads the mean."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.ReLU6(inplace=True),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.ReLU6(inplace=True),
        nn.Conv2d(8, 6, 1),
        nn.Sequential(nn.Conv2d(6, 12, 1), nn.ReLU6(inplace=True)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(12, 5),
    )


class Transformer(nn.Module):
    """Tokens with a class token in front, attention, and the classifier on the class token."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 8, stride=8)
        self.token, self.places = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 17, 8))
        self.norm1, self.norm2, self.last = nn.LayerNorm(8), nn.LayerNorm(8), nn.LayerNorm(8)
        self.attention, self.up, self.down = (
            nn.MultiheadAttention(8, 2, batch_first=True),
            nn.Linear(8, 16),
            nn.Linear(16, 8),
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.places
        normed = self.norm1(x)
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(self.last(x)[:, 0])


class Tokens(Transformer):
    """The same with tokens before images, as older models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).permute(2, 0, 1)
        x = x + self.places[0, 1:, None]
        x = x + self.attention(self.norm1(x), self.norm1(x), self.norm1(x), need_weights=False)[0]
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(self.last(x).mean(dim=0))


class Probable(nn.Module):
    """Puts out probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 3, stride=2), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(x).mean(dim=(2, 3))).softmax(dim=1)


class Functional(nn.Module):
    """Looks at the number of images, so that it cannot be given rows that it did not count."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 3, stride=2), nn.Linear(6, 5)
        self.seen: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = self.conv(x)
        return self.head(torch.stack([one.relu().mean(dim=(1, 2)) for one in maps]))


def built(build: Callable[[], nn.Module]) -> tuple[ModelSpec, nn.Module]:
    torch.manual_seed(0)
    network = build().eval().requires_grad_(False)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
    return ModelSpec("toy/net", lambda weights: network, (), Preprocess(View(resize=SIDE, crop=SIDE))), network


def images(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (count, SIDE, SIDE, 3), generator=generator, dtype=torch.uint8)


def interventions(layer: str, units: list[int], width: int, directions: torch.Tensor | None = None) -> Interventions:
    return Interventions(layer, units, width, FACTOR, directions)


def summed(
    spec: ModelSpec, network: nn.Module, layer: str, views: torch.Tensor, directions: torch.Tensor | None = None
) -> EffectSums:
    layout = established(spec, network, [layer], positions=False)[layer]
    units = list(range(layout.width if directions is None else len(directions)))
    found = LayerEffects(Tail(spec, network, layer, layout), interventions(layer, units, layout.width, directions))
    sums = None
    for number, view in enumerate(views):
        sums = found.add(view, number, sums)
    assert sums is not None
    return sums


@torch.no_grad()
def by_hand(
    spec: ModelSpec, network: nn.Module, layer: str, views: torch.Tensor, directions: torch.Tensor | None = None
) -> torch.Tensor:
    """Logits (changes, units, images, classes): each change of each unit in a pass of its own, by a hook."""
    axis = established(spec, network, [layer], positions=False)[layer].units_axis
    found = []
    for change in CHANGES:
        width = established(spec, network, [layer], positions=False)[layer].width
        for unit in range(width if directions is None else len(directions)):
            vector = torch.eye(width)[unit] if directions is None else directions[unit] / directions[unit].norm()
            random = interventions(layer, [unit], width, directions).vectors[2, 0]

            def hook(module, args, output, change=change, vector=vector, random=random):
                out = output.movedim(axis, -1)
                part = (out @ vector)[..., None]
                new = {
                    ABLATED: out - part * vector, AMPLIFIED: out + (FACTOR - 1) * part * vector,
                    RANDOM: out - part * random,
                }[change]  # fmt: skip
                return new.movedim(-1, axis).contiguous()

            with network.get_submodule(layer).register_forward_hook(hook):
                found.append(network(spec.prepare(views)))
    return torch.stack(found).unflatten(0, (len(CHANGES), -1))


CASES = [
    (Residual, "stem", "replayed"),
    (Residual, "blocks.0", "replayed"),
    (Residual, "blocks.1.conv1", "replayed"),
    (Residual, "blocks.1.norm", "replayed"),
    (Residual, "blocks.1", "linear"),
    (mobile, "2", "replayed"),
    (mobile, "4", "replayed"),
    (mobile, "5", "linear"),
    (mobile, "7", "linear"),
    (mobile, "9", "linear"),
    (Transformer, "patches", "replayed"),
    (Transformer, "attention", "replayed"),
    (Transformer, "up", "replayed"),
    (Transformer, "last", "linear"),
    (Tokens, "attention", "replayed"),
    (Tokens, "last", "linear"),
    (Functional, "conv", "replayed"),
    (Probable, "conv", "replayed"),
]


@pytest.mark.parametrize(("build", "layer", "way"), CASES, ids=[f"{c[0].__name__} {c[1]}" for c in CASES])
def test_effects_are_those_of_changing_a_unit_and_running_the_network_again(build, layer, way):
    spec, network = built(build)
    if layer == "attention":  # its output is a tuple
        spec, network, layer = inside(spec, network)
    views = images(3)
    sums = summed(spec, network, layer, views)
    whole, linear = sums.replayed.tolist()
    assert (whole, linear) == (0, len(views) if way == "linear" else 0)
    check(sums, by_hand(spec, network, layer, views), network(spec.prepare(views)))


def inside(spec: ModelSpec, network: nn.Module) -> tuple[ModelSpec, nn.Module, str]:
    """The attention's own last layer takes no call, so its first output is read: through an identity behind it."""
    attention = network.get_submodule("attention")

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.out = attention, nn.Identity()

        def forward(self, *args: torch.Tensor, **named: bool) -> tuple[torch.Tensor, None]:
            return self.out(attention(*args, **named)[0]), None

    network.attention = First()
    return spec, network, "attention.out"


def check(sums: EffectSums, logits: torch.Tensor, base: torch.Tensor) -> None:
    """Compares sums with logits (changes, units, images, classes) of a reference."""
    if bool((base >= 0).all()):
        logits, base = logits.log(), base.log()
    after, before = logits.double().softmax(-1), base.double().softmax(-1)
    moved = (after - before).abs().sum(-1).mean(-1) / 2
    found = effects(sums, most=5)
    assert len(found) == logits.shape[0] * logits.shape[1]
    assert float(moved[0].max()) > 1e-4
    for effect in found:
        place = CHANGES.index(effect.change)
        assert effect.moved == pytest.approx(float(moved[place, effect.unit]), rel=1e-3, abs=1e-6)
        flips = (logits[place, effect.unit].argmax(-1) != base.argmax(-1)).double().mean()
        assert effect.flipped == pytest.approx(float(flips))
        if effect.change not in DETAILED:
            assert not effect.gained and not effect.lost
            continue
        mean = (after - before)[place, effect.unit].mean(0)
        score = (logits.double() - base.double())[place, effect.unit].mean(0)
        for one in (*effect.gained, *effect.lost):
            assert one.probability == pytest.approx(float(mean[one.number]), rel=1e-3, abs=1e-6)
            assert one.logit == pytest.approx(float(score[one.number]), rel=1e-3, abs=1e-4)
            share = (logits[place, effect.unit].argmax(-1) == one.number).double() - (
                base.argmax(-1) == one.number
            ).double()
            assert one.predicted == pytest.approx(float(share.mean()))
        rises = [one.probability for one in effect.gained]
        assert rises == sorted(rises, reverse=True) and all(rise > 0 for rise in rises)
        falls = [one.probability for one in effect.lost]
        assert falls == sorted(falls) and all(fall < 0 for fall in falls)
        certain = mean[mean.abs() > 1e-6]
        assert {one.number for one in (*effect.gained, *effect.lost)} >= set(
            torch.nonzero(mean.abs() > 1e-6)[:, 0].tolist()
        ), certain


@pytest.mark.parametrize(("build", "layer"), [(Residual, "blocks.0"), (mobile, "5"), (Transformer, "up")])
def test_effects_of_directions_are_those_of_projecting_them_out(build, layer):
    spec, network = built(build)
    width = established(spec, network, [layer], positions=False)[layer].width
    directions = torch.randn(7, width, generator=torch.Generator().manual_seed(3))
    views = images(2)
    sums = summed(spec, network, layer, views, directions)
    check(sums, by_hand(spec, network, layer, views, directions), network(spec.prepare(views)))


def test_ablated_is_what_ablation_switches_off():
    spec, network = built(Residual)
    views = images(2)
    logits = Ablation(spec, network, [{"blocks.0": [unit]} for unit in range(6)]).logits(views)
    torch.testing.assert_close(logits, by_hand(spec, network, "blocks.0", views)[0])


class Dead(nn.Module):
    """Two units of the layer are never on; a third only where the image is bright."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.head = nn.Conv2d(3, 6, 3, stride=2), nn.ReLU(), nn.Linear(6, 5)
        nn.init.zeros_(self.conv.weight[:2])
        nn.init.constant_(self.conv.bias[:2], -1)  # type: ignore[index]
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.relu(self.conv(x)) * 9).mean(dim=(2, 3)))


def test_units_without_a_value_are_left_out_and_change_nothing(monkeypatch):
    spec, network = built(Dead)
    rows = []
    behind = Tail.logits

    def counted(self: Tail, some: torch.Tensor) -> torch.Tensor:
        rows.append(len(some))
        return behind(self, some)

    monkeypatch.setattr(Tail, "logits", counted)
    sums = summed(spec, network, "relu", images(2))
    assert sums.active.tolist()[:2] == [0, 0] and sums.active[2:].sum() > 0
    active = int(sums.active.sum())
    compared = 4 * 2
    assert sum(rows) - 1 == 3 * active + compared  # one row asks whether what follows is linear
    layout = established(spec, network, ["relu"], positions=False)["relu"]
    silent = LayerEffects(Tail(spec, network, "relu", layout), interventions("relu", [0, 1], 6)).add(images(1)[0], 0)
    assert silent.active.tolist() == [0, 0] and int(silent.images) == 1 and not silent.moved.any()
    for effect in effects(sums, 5)[:6]:
        assert (effect.moved, effect.flipped, len(effect.gained), effect.strength) == (0, 0, 0, 0)


class Shifting(nn.Module):
    """What modules put out depends on how many images there are: passes behind a layer give something else."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv, self.head = nn.Conv2d(3, 4, 3, stride=2), nn.Conv2d(4, 6, 3), nn.Linear(6, 5)
        self.before = nn.Identity()
        self.before.register_forward_hook(lambda module, args, output: output * 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        early = self.before(self.first(x))
        return self.head(self.conv(early).relu().mean(dim=(2, 3)) + early.mean(dim=(1, 2, 3))[:, None])


def test_where_passes_behind_the_layer_differ_the_whole_network_runs_again():
    spec, network = built(Shifting)  # a hook of the user's own acts twice on what is given back
    views = images(2)
    sums = summed(spec, network, "conv", views)
    assert sums.replayed.tolist() == [2, 0]
    check(sums, by_hand(spec, network, "conv", views), network(spec.prepare(views)))


class Kinked(nn.Module):
    """Linear near zero and for random values of usual size, not for what a strong unit puts out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 3, stride=2), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(x).mean(dim=(2, 3)))


def test_a_readout_that_is_not_what_the_network_does_is_not_used(monkeypatch):
    spec, network = built(Kinked)
    layout = established(spec, network, ["conv"], positions=False)["conv"]
    found = LayerEffects(Tail(spec, network, "conv", layout), interventions("conv", list(range(6)), 6))
    views = images(2)
    sums = found.add(views[0], 0)
    assert sums.replayed.tolist() == [0, 1]
    assert found._readout is not None
    found._readout.weights.mul_(1.1)
    sums = found.add(views[1], 1, sums)
    assert sums.replayed.tolist() == [0, 1]  # the second image was done behind the layer
    check(sums, by_hand(spec, network, "conv", views), network(spec.prepare(views)))


def test_modules_are_left_as_they_were():
    spec, network = built(Residual)
    before = {name: dict(module.__dict__) for name, module in network.named_modules()}
    summed(spec, network, "blocks.0", images(1))
    for name, module in network.named_modules():
        assert "forward" not in module.__dict__ and module.__dict__.keys() == before[name].keys()
        assert not module._forward_hooks and not module._forward_pre_hooks


LOGITS = torch.randn(6, 4, 3, 5, generator=torch.Generator().manual_seed(5)) * 3
BASES = torch.randn(6, 5, generator=torch.Generator().manual_seed(6)) * 3


def one_image(number: int) -> EffectSums:
    sums = EffectSums.empty(4, 5)
    sums.add_image(torch.rand(4, 7, generator=torch.Generator().manual_seed(number)), number == 2, False)
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(4))
    sums.add(pairs, BASES[number], LOGITS[number].transpose(0, 1).flatten(0, 1))
    return sums


@settings(max_examples=30, deadline=None)
@given(order=st.permutations(range(6)), cuts=st.lists(st.integers(0, 6), max_size=4))
def test_sums_are_the_same_bits_in_any_order_and_split(order, cuts):
    edges = sorted({0, 6, *cuts})
    merged = EffectSums.empty(4, 5)
    for start, stop in itertools.pairwise(edges):
        part = EffectSums.empty(4, 5)
        for number in order[start:stop]:
            part.merge(one_image(number))
        merged.merge(EffectSums.of_state(part.state()))
    single = EffectSums.empty(4, 5)
    for number in range(6):
        single.merge(one_image(number))
    for name, array in single.state().items():
        np.testing.assert_array_equal(merged.state()[name], array)


def test_classes_are_those_that_changed_most_and_ties_go_by_number():
    sums = EffectSums.empty(1, 5)
    sums.add_image(torch.ones(1, 1), False, False)
    base, after = torch.zeros(5), torch.tensor([[0.0, 1.0, 1.0, -2.0, 0.0]])
    sums.add(torch.tensor([[0, 0]]), base, after)
    effect = effects(sums, most=2)[0]
    assert [one.number for one in effect.gained] == [1, 2] and [one.number for one in effect.lost] == [3, 0]
    assert effect.flipped == 1 and effect.gained[0].predicted == 1 and effect.lost[1].predicted == -1
    assert effect.gained[0].logit == 1 and effect.lost[0].logit == -2


def test_scores_that_cannot_be_added_up_are_refused():
    sums = EffectSums.empty(1, 3)
    for bad in (torch.nan, torch.inf, 1e9):
        with pytest.raises(MilanError, match="no effects that can be added up"):
            sums.add(torch.tensor([[0, 0]]), torch.zeros(3), torch.tensor([[0.0, bad, 0.0]]))


def test_probabilities_become_logits_and_scores_stay():
    scores = torch.tensor([[0.2, 0.8], [0.5, 0.5]])
    assert are_probabilities(scores)
    torch.testing.assert_close(log_scores(scores, True).softmax(dim=1), scores)
    assert not are_probabilities(torch.tensor([[0.2, 0.8], [0.2, 0.9]]))
    assert not are_probabilities(torch.tensor([[0.2, 0.8], [-0.2, 1.2]]))
    assert torch.equal(log_scores(scores, False), scores)
    rounded = (torch.randn(9, 1000, generator=torch.Generator().manual_seed(0)) * 4).softmax(dim=1).bfloat16().float()
    assert are_probabilities(rounded, coarse=True) and not are_probabilities(rounded)


def test_peers_are_the_units_of_nearest_strength():
    assert peers([1.0, 5.0, 0.0, 1.5, 4.0], [1, 1, 0, 1, 1]) == [3, 4, None, 0, 1]
    assert peers([1.0, 2.0, 3.0], [1, 1, 1]) == [1, 0, 1]
    assert peers([1.0], [1]) == [None]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 100), factor=st.floats(1.1, 9))
def test_changes_of_values_are_as_defined(seed, factor):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(6, 2, 3, generator=generator)
    directions = torch.randn(4, 6, generator=generator)
    changed = Interventions("layer", [0, 2, 3], 6, factor, directions)
    amounts = changed.amounts(values)
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    rows = changed.rows(values, amounts, pairs)
    units = directions / directions.norm(dim=1, keepdim=True)
    for (change, place), row in zip(pairs.tolist(), rows, strict=True):
        d = units[[0, 2, 3][place]]
        before, after = torch.einsum("c...,c->...", values, d), torch.einsum("c...,c->...", row, d)
        added = row - values
        if CHANGES[change] == ABLATED:
            torch.testing.assert_close(after, torch.zeros_like(after), atol=1e-5, rtol=0)
        elif CHANGES[change] == AMPLIFIED:
            torch.testing.assert_close(after, factor * before, atol=1e-5, rtol=1e-4)
        else:
            torch.testing.assert_close(added.norm(dim=0), before.abs(), atol=1e-5, rtol=1e-4)
            assert not torch.allclose(after, torch.zeros_like(after), atol=1e-3)


def test_random_directions_are_fixed_by_layer_and_unit():
    one, other = interventions("a", [3, 5], 8), interventions("a", [5], 8)
    assert torch.equal(one.vectors[2, 1], other.vectors[2, 0])
    assert not torch.equal(one.vectors[2, 0], one.vectors[2, 1])
    assert not torch.equal(other.vectors[2, 0], interventions("b", [5], 8).vectors[2, 0])


class Aside(nn.Module):
    """One layer's output goes nowhere; the network's output is maps where ``head`` is left out."""

    def __init__(self, maps: bool = False, classes: int = 5) -> None:
        super().__init__()
        self.conv, self.aside, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1), nn.Linear(6, classes)
        self.maps = maps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        self.aside(x)
        return x if self.maps else self.head(x.mean(dim=(2, 3)))


def tail_of(network: nn.Module, layer: str) -> Tail:
    spec, network = built(lambda: network)
    return Tail(spec, network, layer, established(spec, network, [layer], positions=False)[layer])


def test_layers_that_reach_no_class_and_outputs_that_are_no_classes_are_refused():
    assert check_reaches(tail_of(Aside(), "conv"), list(images(2)), "it") == 5
    with pytest.raises(MilanError, match="it does not reach the class scores"):
        check_reaches(tail_of(Aside(), "aside"), list(images(2)), "it")
    for network in (Aside(maps=True), Aside(classes=1)):
        with pytest.raises(MilanError, match="effects on classes are of classifiers"):
            check_reaches(tail_of(network, "conv"), list(images(2)), "it")
