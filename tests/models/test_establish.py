"""Which axis of an output is what, for networks of every arrangement."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import milan_ray
from milan_ray.errors import MilanError
from milan_ray.exemplars.forward import Forward
from milan_ray.models.establish import establish, examine
from milan_ray.models.hooks import LayerTap, named_layers
from milan_ray.models.layouts import Layout, Reading, grids
from milan_ray.models.registry import ModelSpec
from milan_ray.models.view import Preprocess, View

VIEW = View((64, 64), None)


def spec_of(network: nn.Module, view: View = VIEW, **options: Any) -> ModelSpec:
    return ModelSpec("net", lambda weights: network, (), Preprocess(view), **options)


def pictures(count: int = 40, height: int = 64, width: int = 64) -> np.ndarray:
    random = np.random.default_rng(3)
    coarse = random.integers(0, 256, (count, height // 8, width // 8, 3)).repeat(8, 1).repeat(8, 2)
    return coarse.astype(np.uint8)


def seeded(build: Any) -> Any:
    torch.manual_seed(0)
    return build().eval()


def exemplar_ids(network: nn.Module, layer: str, images: np.ndarray, **options: Any) -> list[list[int]]:
    found = milan_ray.dissect(network, images, layers=[layer], preprocess=Preprocess(VIEW), k=3, **options)
    frame = found.exemplars.sort("unit", "rank")
    return [
        unit["image"].str.extract(r"(\d+)$").cast(int).to_list()
        for _, unit in frame.group_by("unit", maintain_order=True)
    ]


def best(maps: torch.Tensor, k: int = 3) -> list[list[int]]:
    """Exemplars of maps (B, U, h, w), by the obvious way."""
    return maps.amax((2, 3)).T.topk(k).indices.tolist()


def direct(network: nn.Module, views: np.ndarray) -> torch.Tensor:
    """The output of a network for views, as a user computes it."""
    with torch.no_grad():
        return network(Preprocess(VIEW)(torch.from_numpy(views)))


class SequenceFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 8, 8)
        self.body = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), 2, enable_nested_tensor=False)

    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self.conv(x).flatten(2).permute(2, 0, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tokens(x).mean(0)


def test_sequence_first_tokens_give_the_exemplars_of_a_direct_forward():
    network, images = seeded(SequenceFirst), pictures()
    with torch.no_grad():
        tokens = network.tokens(Preprocess(VIEW)(torch.from_numpy(images)))
    expected = tokens.permute(1, 2, 0).unflatten(2, (8, 8))
    found = exemplar_ids(network, "body.layers.1", images)
    assert found == best(expected)
    layout = establish(spec_of(network), network, ["body.layers.1"])["body.layers.1"]
    assert (layout.batch_axis, layout.units_axis, layout.grid, layout.prefix_tokens) == (1, 2, (8, 8), 0)


def test_swin_has_its_96_units_without_an_option():
    network = seeded(torchvision.models.swin_t)
    layouts = examine(
        spec_of(network, View((64, 64), None)), network, ["features.0", "features.1", "features.3", "permute"]
    )
    assert [layout.units for layout in layouts.values() if isinstance(layout, Layout)] == [96, 96, 192, 768]
    assert layouts["features.1"].grid == (16, 16)  # type: ignore[union-attr]


def lit(view: tuple[int, int], top: int, left: int, size: int) -> np.ndarray:
    views = np.full((2, *view, 3), 128, np.uint8)
    views[1, top : top + size, left : left + size] = 255
    return views


def place_of_response(maps: torch.Tensor) -> tuple[int, int]:
    strength = (maps[1] - maps[0]).square().sum(0)
    row, column = divmod(int(strength.argmax()), strength.shape[1])
    return row, column


def test_hiera_answers_where_the_picture_is_lit():
    timm = pytest.importorskip("timm")
    network = seeded(lambda: timm.create_model("hiera_tiny_224", img_size=(64, 64)))
    spec = spec_of(network)
    ends = [f"blocks.{block}" for block in network.stage_ends[:3]]
    layers = ["blocks.0.mlp.fc1", *ends]
    maps = Forward(spec, network, layers, 2).maps(lit((64, 64), 40, 8, 4))
    assert place_of_response(maps["blocks.0"]) == place_of_response(maps["blocks.0.mlp.fc1"]) == (10, 2)
    with torch.no_grad():
        inputs = spec.preprocess(torch.from_numpy(lit((64, 64), 40, 8, 4)))
        expected = network.forward_intermediates(inputs, indices=[0, 1, 2], intermediates_only=True, norm=False)
    for layer, truth in zip(ends, expected, strict=True):
        torch.testing.assert_close(maps[layer], truth, rtol=1e-4, atol=1e-5)


def test_rectangular_vit_has_the_grid_of_its_view_and_drops_what_the_model_says():
    timm = pytest.importorskip("timm")
    network = seeded(lambda: timm.create_model("vit_tiny_patch16_224", img_size=(256, 128), depth=2))
    view = View((256, 128), None)
    for declared in (None, 1):
        spec = spec_of(network, view, prefix_tokens=declared)
        layouts = establish(spec, network, ["blocks.0.mlp.fc1", "blocks.1"])
        assert {(layout.grid, layout.prefix_tokens) for layout in layouts.values()} == {((16, 8), 1)}
    maps = Forward(spec, network, ["blocks.0.mlp.fc1"], 2).maps(lit((256, 128), 208, 32, 16))
    assert place_of_response(maps["blocks.0.mlp.fc1"]) == (13, 2)


class HasOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.outputs = nn.Conv2d(4, 6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outputs(self.conv(x)).mean((2, 3))


def test_a_module_called_outputs_is_shown_under_its_name_and_said(capsys):
    network, images = seeded(HasOutputs), pictures()
    with torch.no_grad():
        child = network.outputs(network.conv(Preprocess(VIEW)(torch.from_numpy(images))))
    assert exemplar_ids(network, "outputs", images) == best(child)
    assert "is the module of that name; the model's own output is '@outputs'" in capsys.readouterr().err
    assert exemplar_ids(network, "@outputs", images) == best(child.mean((2, 3))[:, :, None, None])
    assert "@outputs" in named_layers(network)


class OneReLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.relu = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 5, 3), nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(self.second(self.relu(self.first(x))))


def test_calls_of_a_shared_module_have_names_and_the_last_is_said_to_be_it(capsys):
    network, images = seeded(OneReLU), pictures()
    with torch.no_grad():
        first = network.first(Preprocess(VIEW)(torch.from_numpy(images))).relu()
        last = network.second(first).relu()
    assert exemplar_ids(network, "relu@1", images) == best(first)
    assert "relu@1" not in capsys.readouterr().err
    assert exemplar_ids(network, "relu", images) == exemplar_ids(network, "relu@2", images) == best(last)
    assert "runs 2 times in a forward pass, and this is its last; relu@1 is its first" in capsys.readouterr().err
    with pytest.raises(MilanError, match="layer 'relu@3' runs 2 times"):
        exemplar_ids(network, "relu@3", images)


def test_compiled_networks_give_the_eager_answer():
    network, images = seeded(OneReLU), pictures(12)
    expected = exemplar_ids(network, "relu@1", images)
    compiled: Any = torch.compile(network, backend="eager")
    direct(compiled, images)  # used once before: compiled code calls no hooks
    assert exemplar_ids(compiled, "relu@1", images) == expected
    inside = nn.Sequential(network, nn.Identity())
    inside[0].compile(backend="eager")
    direct(inside, images)
    assert exemplar_ids(inside, "0.relu@1", images) == expected
    assert exemplar_ids(nn.DataParallel(network), "relu@1", images) == expected


def test_torchscript_is_refused_with_a_sentence():
    network = torch.jit.trace(seeded(OneReLU), torch.zeros(1, 3, 64, 64))
    with pytest.raises(MilanError, match=r"layer 'relu' is inside a TorchScript module.*as Python code"):
        exemplar_ids(network, "relu", pictures(12))


class BatchStatistics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x))


def test_statistics_of_the_batch_are_refused_and_named():
    network, images = seeded(BatchStatistics), pictures(12)
    with pytest.raises(MilanError, match=r"other values for an image beside other images \(norm uses statistics of"):
        exemplar_ids(network, "norm", images)
    with torch.no_grad():
        assert exemplar_ids(network, "conv", images) == best(network.conv(Preprocess(VIEW)(torch.from_numpy(images))))


def test_images_that_run_alone_are_read():
    network = seeded(BatchStatistics)
    layouts = establish(spec_of(network, max_batch=1), network, ["norm"])
    assert (layouts["norm"].batch_axis, layouts["norm"].units) == (0, 4)


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(self.conv(x), training=True)


def test_random_outputs_are_refused():
    with pytest.raises(MilanError, match="puts out something else when the same images are shown again: dropout"):
        exemplar_ids(seeded(Dropping), "outputs", pictures(12))


@pytest.mark.parametrize("kind", ["half", "bfloat16", "double"])
def test_networks_of_other_number_types_run(kind):
    network, images = seeded(OneReLU), pictures(12)
    expected = exemplar_ids(network, "relu", images)
    found = exemplar_ids(getattr(network, kind)(), "relu", images)
    agreeing = np.mean([set(a) == set(b) for a, b in zip(found, expected, strict=True)])
    assert agreeing == 1 if kind == "double" else agreeing > 0.5


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.flat, self.fc1, self.act, self.fc2 = nn.Flatten(), nn.Linear(3 * 64 * 64, 24), nn.ReLU(), nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(self.flat(x))))


def test_dynamically_quantised_networks_run_images_alone():
    """Their scales depend on the whole batch, so that batches would decide results."""
    network, images = seeded(Perceptron), pictures(12)
    quantised = torch.ao.quantization.quantize_dynamic(network, {nn.Linear})
    expected = torch.cat([direct(quantised, images[i : i + 1]) for i in range(12)])
    for size in (3, 16):
        assert exemplar_ids(quantised, "fc2", images, batch_size=size) == best(expected[:, :, None, None])


class Windows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.inner = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = self.conv(x)
        rows = maps.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 4, 5, 1).reshape(-1, 16, 8)
        return self.inner(rows).mean(1).unflatten(0, (len(x), 16)).mean(1)


def test_windows_stacked_on_the_batch_are_refused_with_the_axis():
    with pytest.raises(
        MilanError, match=r"layer 'inner' of Windows puts out \(48, 16, 8\) for 3 images: axis 0 holds 16"
    ):
        exemplar_ids(seeded(Windows), "inner", pictures(12))


class Arranged(nn.Module):
    """A map arranged in any way, behind one module that says nothing of itself."""

    class Arrange(nn.Module):
        def __init__(self, axes: tuple[int, ...], tokens: bool, extra: int, order: torch.Tensor | None) -> None:
            super().__init__()
            self.axes, self.tokens, self.extra, self.order = axes, tokens, extra, order

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.tokens:
                x = x.flatten(2)
                x = x if self.order is None else x[:, :, self.order]
                x = torch.cat([x.mean(2, keepdim=True).expand(-1, -1, self.extra), x], 2)
            return x.permute(self.axes).contiguous()

    def __init__(self, units: int, axes: tuple[int, ...], tokens: bool, extra: int, order: torch.Tensor | None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, units, 8, 8)
        self.arrange = self.Arrange(axes, tokens, extra, order)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.arrange(self.conv(x))


@given(
    units=st.sampled_from([3, 5, 8, 12]),
    tokens=st.booleans(),
    turn=st.permutations([0, 1, 2, 3]),
    extra=st.sampled_from([0, 0, 1, 3]),
    shuffled=st.booleans(),
    declared=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_layers_of_any_arrangement_are_read_right_or_refused(units, tokens, turn, extra, shuffled, declared):
    """Never silently wrong: axes in any order, tokens before the patches, patches in any order."""
    torch.manual_seed(units)
    axes = tuple(axis for axis in turn if axis < 3) if tokens else tuple(turn)
    order = torch.randperm(64) if shuffled else None
    network = Arranged(units, axes, tokens, extra, order).eval()
    spec = spec_of(network, prefix_tokens=extra if declared else None)
    found = examine(spec, network, ["arrange"])["arrange"]
    views = pictures(5)
    with torch.no_grad():
        truth = network.conv(Preprocess(VIEW)(torch.from_numpy(views)))
        output = direct(network, views)
    if isinstance(found, str):
        assert "choose another layer" in found
    else:
        torch.testing.assert_close(found.maps(output), truth)


def test_plain_arrangements_are_all_read():
    for axes in ((0, 1, 2), (0, 2, 1), (2, 0, 1), (1, 0, 2)):
        for extra in (0, 1, 4):
            torch.manual_seed(0)
            network = Arranged(12, axes, True, extra, None).eval()
            found = establish(spec_of(network), network, ["arrange"])["arrange"]
            assert (found.batch_axis, found.units_axis) == (axes.index(0), axes.index(1))
            assert (found.grid, found.prefix_tokens) == ((8, 8), extra)


def test_what_is_said_of_a_layer_wins_or_is_refused():
    network = seeded(lambda: Arranged(12, (0, 2, 1), True, 1, None))
    said: dict[str, Any] = {"units_axis": -1, "grid": (8, 8), "prefix_tokens": 1, "batch_axis": 0}
    layout = establish(spec_of(network, reading=Reading(**said)), network, ["arrange"])["arrange"]
    assert (layout.units_axis, layout.grid, layout.prefix_tokens) == (2, (8, 8), 1)
    refused: dict[str, Any] = {"units_axis": 7, "grid": (9, 9), "prefix_tokens": 70, "batch_axis": 1}
    for option, wrong in refused.items():
        refusal = examine(spec_of(network, reading=Reading(**{option: wrong})), network, ["arrange"])["arrange"]
        assert isinstance(refusal, str) and option in refusal, (option, refusal)
    assert layout.remark == ""
    # A grid of another shape is the user's word, against what pictures say; which is said.
    other = establish(spec_of(network, reading=Reading(grid=(4, 16))), network, ["arrange"])["arrange"]
    assert (other.grid, other.prefix_tokens, other.known) == ((4, 16), 1, "what was said of it")
    assert other.remark == "is read as was said, though lit patches of a picture show in 8×8 positions, units on axis 2"


@pytest.mark.parametrize("option", ["units_axis", "batch_axis", "grid", "prefix_tokens", "channels_last"])
def test_dissect_hears_every_option(option):
    network, images = seeded(lambda: Arranged(12, (0, 2, 1), True, 1, None)), pictures(12)
    wrong: dict[str, Any] = {
        "units_axis": 5,
        "batch_axis": 2,
        "grid": (9, 9),
        "prefix_tokens": 70,
        "channels_last": False,
    }
    if option == "channels_last":
        with pytest.raises(MilanError, match="say different things"):
            exemplar_ids(network, "arrange", images, channels_last=False, units_axis=-1)
        return
    with pytest.raises(MilanError, match=option):
        exemplar_ids(network, "arrange", images, **{option: wrong[option]})


def test_layouts_travel_as_text():
    layout = Layout((65, 12), 0, 2, (8, 8), False, 1, 0, tuple(range(64)), "lit patches", "a remark")
    values = json.loads(layout.to_json())
    assert (values["grid"], values["order"], values["known"]) == ([8, 8], list(range(64)), "lit patches")
    assert "after 1 prefix tokens" in str(layout)


def test_layout_refuses_an_output_of_another_shape():
    with pytest.raises(MilanError, match=r"layer 'x' puts out a tensor of shape \(2, 50, 12\), where it had"):
        Layout((65, 12), 0, 2, (8, 8), prefix_tokens=1).maps(torch.zeros(2, 50, 12), "layer 'x'")


@given(side=st.integers(2, 24), ratio=st.sampled_from([(1, 1), (2, 1), (1, 3), (3, 4)]), stride=st.integers(1, 16))
@settings(max_examples=50, deadline=None)
def test_grids_of_a_view_hold_the_one_that_a_stride_makes(side, ratio, stride):
    height, width = side * ratio[0] * stride, side * ratio[1] * stride
    assert grids(side * ratio[0] * side * ratio[1], (height, width))[0] == (side * ratio[0], side * ratio[1])
    up = (math.ceil(height / 7), math.ceil(width / 7))
    assert up in grids(up[0] * up[1], (height, width))


def test_establishing_takes_twenty_pictures_and_leaves_no_hooks():
    network, seen = seeded(SequenceFirst), []
    network.conv.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    establish(spec_of(network), network, ["body.layers.0"])
    assert sum(seen) == 3 + 2 + 2 + 7 + 6
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules()]
    assert sum(hooks) == 1


def test_tap_counts_calls_of_the_last_pass():
    network = seeded(OneReLU)
    with LayerTap(network, ["relu@1", "relu"]) as tap:
        for _ in range(2):
            found = tap(torch.zeros(1, 3, 8, 8))
        assert tap.calls == {"relu@1": 2, "relu": 2}
    assert found["relu@1"].shape == (1, 5, 6, 6) and found["relu"].shape == (1, 5, 4, 4)


class Mixing(nn.Module):
    """Attention without a bypass, as LeViT's between its stages: each position is a mean of all."""

    def __init__(self, before: int = 0, behind: int = 0) -> None:
        super().__init__()
        self.conv, self.query, self.value = nn.Conv2d(3, 12, 8, 8), nn.Linear(12, 12), nn.Linear(12, 12)
        self.extra, self.before = nn.Parameter(torch.randn(before + behind, 12)), before
        self.mlp = nn.Sequential(nn.Linear(12, 20), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens, extra = self.conv(x).flatten(2).mT, self.extra.expand(len(x), -1, -1)
        tokens = torch.cat([extra[:, : self.before], tokens, extra[:, self.before :]], 1)
        query, value = self.query(tokens), self.value(tokens)
        return self.mlp((query @ value.mT / 1000).softmax(2) @ value)


def test_a_layer_that_mixes_all_positions_is_read_through_an_earlier_one():
    network = seeded(Mixing)
    layouts = establish(spec_of(network), network, ["conv", "mlp.0"])
    assert layouts["conv"].known == "lit patches" and layouts["mlp.0"].known in ("lit patches", "patches lit in query")
    assert (layouts["mlp.0"].units_axis, layouts["mlp.0"].grid, layouts["mlp.0"].columns_first) == (2, (8, 8), False)


def test_tokens_on_both_sides_of_the_positions_are_found():
    network = seeded(lambda: Mixing(1, 5))
    for declared in (None, 6):
        spec = spec_of(network, prefix_tokens=declared)
        for layer in ("query", "mlp.0"):
            layout = establish(spec, network, [layer])[layer]
            assert (layout.prefix_tokens, layout.suffix_tokens, layout.grid) == (1, 5, (8, 8))


def test_hybrid_vit_keeps_its_class_token_where_a_lit_picture_shows_faintly():
    timm = pytest.importorskip("timm")
    network = seeded(lambda: timm.create_model("vit_tiny_r_s16_p8_224", img_size=96, depth=2))
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.rand_like(parameter) * 0.25)
    spec = spec_of(network, View((96, 96), None), prefix_tokens=1)
    layouts = establish(spec, network, ["blocks.0.mlp.fc1", "blocks.1.mlp.fc1"])
    assert {(layout.prefix_tokens, layout.suffix_tokens) for layout in layouts.values()} == {(1, 0)}
