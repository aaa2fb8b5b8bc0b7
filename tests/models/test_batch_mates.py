"""Values that are silently another image's, another pass's or nobody's: kinds S11 to S14 of what was tried."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import milan_ray
from milan_ray.errors import MilanError
from milan_ray.exemplars.forward import Forward
from milan_ray.models.batch_mates import about, agree, exactly, exchanged, summary
from milan_ray.models.establish import examine
from milan_ray.models.layouts import Layout, Reading
from milan_ray.models.registry import ModelSpec, register_model
from milan_ray.models.state import Watched, drawing
from milan_ray.models.view import Preprocess, View

PREPROCESS = Preprocess(View((64, 64), None))
CPU = torch.device("cpu")
Tensors = Callable[[torch.Tensor], torch.Tensor]


def pictures(count: int) -> np.ndarray:
    """Smooth pictures of different contrast."""
    draw = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 5, 5, generator=draw) * torch.rand(count, 1, 1, 1, generator=draw)
    smooth = F.interpolate(coarse, size=(64, 64), mode="bicubic").clamp(0, 1)
    return (smooth * 255).byte().permute(0, 2, 3, 1).contiguous().numpy()


class Behind(nn.Module):
    """A convolution and a function behind it, in a module of its own; another function before it."""

    class Function(nn.Module):
        def __init__(self, function: Tensors) -> None:
            super().__init__()
            self.function = function

        def forward(self, maps: torch.Tensor) -> torch.Tensor:
            return self.function(maps)

    def __init__(self, function: Tensors, before: Tensors = lambda x: x, units: int = 8) -> None:
        super().__init__()
        self.conv, self.before = nn.Conv2d(3, units, 8, 8), before
        self.f, self.b = self.Function(function), nn.Identity()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.b(self.f(self.conv(self.before(images))))


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build().eval()


def spec_of(network: nn.Module) -> ModelSpec:
    return ModelSpec("net", lambda weights: network, (), PREPROCESS)


def dissected(network: nn.Module, layer: str, count: int = 20, **options: object) -> milan_ray.Dissection:
    return milan_ray.dissect(network, pictures(count), layers=[layer], preprocess=PREPROCESS, k=3, **options)  # type: ignore[arg-type]


# S11: rows are images


class Pieces(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.a, self.b, self.size = nn.Conv2d(3, 8, 8, 8), nn.Conv2d(8, 8, 3, padding=1), size

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.b(piece) for piece in self.a(images).split(self.size)])


class EarlyExit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 8, 8), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps, contrast = self.a(images), images.std((1, 2, 3))
        stays = (contrast < 0.5) | (contrast > 1.2)
        out = maps.mean((2, 3)).clone()
        if stays.any():
            out[stays] = self.b(maps[stays]).mean((2, 3))
        return out


class Deeper(nn.Module):
    """Runs its part as often as the slowest picture of the batch needs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Conv2d(3, 8, 8, 8), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.a(images)
        for _ in range(2 if images.amax() < 2 else 5):
            maps = self.c(maps)
        return maps


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_s11_a_part_that_gets_the_batch_in_pieces_is_refused(size):
    with pytest.raises(MilanError, match=r"layer 'b' of Pieces .*(runs \d times|rows).*layer"):
        dissected(seeded(lambda: Pieces(size)), "b", 8)
    assert dissected(seeded(lambda: Pieces(size)), "outputs", 8).units()  # what is put together again is read


def test_s11_rows_of_other_images_are_refused():
    with pytest.raises(MilanError, match="layer 'b' of EarlyExit"):
        dissected(seeded(EarlyExit), "b", 6)
    with pytest.raises(MilanError, match=r"rows for 3 images.*layer around it"):
        Layout((8,), 0, 1, (1, 1)).maps(torch.zeros(2, 8), "layer 'b'", images=3)


def test_s11_a_last_call_that_depends_on_the_batch_is_refused():
    with pytest.raises(MilanError, match=r"layer 'c' of Deeper runs 5 times for 3 images and 2 times for 2"):
        dissected(seeded(Deeper), "c")


# S12: batch mates


def _shifted(maps: torch.Tensor) -> torch.Tensor:
    return maps if len(maps) % 8 else torch.cat([maps.roll(1, 0)[:, :2], maps[:, 2:]], 1)


def _centred(maps: torch.Tensor) -> torch.Tensor:
    return maps - maps.mean((0, 2, 3), keepdim=True)


def _beside_a_loud_unit(maps: torch.Tensor) -> torch.Tensor:
    return torch.cat([_centred(maps), torch.full_like(maps[:, :1], 5e3)], 1)


MATES: dict[str, Callable[[], nn.Module]] = {
    "range of the batch": lambda: Behind(lambda y: y, before=lambda x: (x - x.min()) / (x.max() - x.min())),
    "branch on the batch": lambda: Behind(lambda y: y, before=lambda x: x if x.amax() > 2.5 else -x),
    "from 12 images on": lambda: Behind(lambda y: _centred(y) if len(y) >= 12 else y),
    "eights of images": lambda: Behind(_shifted),
    "beside a loud unit": lambda: Behind(_beside_a_loud_unit),
    "far from zero": lambda: Behind(lambda y: _centred(y) + 1000),
    "one unit of 256": lambda: Behind(lambda y: torch.cat([y[:, :1] - y[:, :1].amax(), y[:, 1:]], 1), units=256),
    "a thousandth of the mean": lambda: Behind(lambda y: y + 1e-2 * y.mean((0, 2, 3), keepdim=True)),
}


@pytest.mark.parametrize("kind", MATES)
def test_s12_values_that_depend_on_batch_mates_are_refused(kind):
    with pytest.raises(MilanError, match="other values for an image beside other images"):
        dissected(seeded(MATES[kind]), "f")


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_s12_statistics_of_the_batch_are_noticed_in_every_number_type(kind):
    layers = nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16, track_running_stats=False)
    with pytest.raises(MilanError, match=r"\(1 uses statistics of the batch\)"):
        dissected(seeded(lambda: nn.Sequential(*layers)).to(kind), "1", 16)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32])
def test_s12_images_of_their_own_are_read_in_every_number_type(kind):
    layers = nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=1)
    assert dissected(seeded(lambda: nn.Sequential(*layers)).to(kind), "3").units()


def test_s12_the_first_batch_is_run_among_others_once_per_network():
    network = seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.ReLU()))
    sizes: list[int] = []
    network.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    forward = Forward(spec_of(network), network, ["0"], 9)
    forward.maps(pictures(9))
    first = [size for size in sizes if size == 9]
    assert len(first) == 2
    again = Forward(spec_of(network), network, ["0"], 9)
    for count in (9, 3):
        found = again.maps(pictures(count))["0"]
        with torch.no_grad():
            filled = np.concatenate([pictures(count), np.zeros((9 - count, 64, 64, 3), np.uint8)])
            assert torch.equal(found, network.get_submodule("0")(PREPROCESS(torch.from_numpy(filled)))[:count])
    assert sizes.count(9) - len(first) == 2


@pytest.mark.parametrize("count", range(1, 10))
def test_s12_some_images_stay_some_move_and_the_first_place_is_anothers(count):
    views = np.arange(count, dtype=np.uint8)[:, None, None, None] + np.full((1, 2, 2, 3), 10, np.uint8)
    exchange = exchanged(views, 9)
    assert len(exchange.inputs) == 9 and exchange.kept and len(exchange.moved) == len(exchange.to) == (count // 4)
    for place, row in [*zip(exchange.kept, exchange.kept, strict=True), *zip(exchange.to, exchange.moved, strict=True)]:
        assert (exchange.inputs[place] == views[row]).all()
    assert not set(exchange.to) & {*exchange.kept, *exchange.moved}
    assert count == 1 or (exchange.inputs[0] != views[0]).any()
    latents = exchanged((torch.arange(1.0, count + 1)[:, None], torch.arange(count)), 9).inputs
    assert [part.shape for part in latents] == [(9, 1), (9,)]


def test_s12_agreement_is_asked_of_every_unit_and_leaves_room_for_rounding():
    values = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)) + torch.tensor([0, 0, 0, 0, 1e4])
    off = values.clone()
    off[:, 2] += 0.01
    assert agree(values, values * (1 + 1e-7), values, exactly(torch.float32))
    assert not agree(values, off, values, about(torch.float32, CPU))
    assert not agree(values, values[:3], values, about(torch.float32, CPU))
    half = values[:, :4].bfloat16()
    assert agree(half, half * (1 + 2**-8), half, exactly(torch.bfloat16))
    assert summary(torch.ones(2, 3, 4, 4)).shape == (2, 9) and summary(torch.ones(2, 3, 1, 1)).shape == (2, 3)


# S13: random numbers and changed networks


class Sometimes(nn.Module):
    def __init__(self, draw: Callable[[], bool]) -> None:
        super().__init__()
        self.a, self.b, self.draw = nn.Conv2d(3, 8, 8, 8), nn.Conv2d(8, 8, 3, padding=1), draw

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.a(images)
        return maps + self.b(maps) if self.draw() else maps


DRAWS: dict[str, Callable[[], bool]] = {
    "rand": lambda: bool(torch.rand(()) > 1e-4),
    "uniform_": lambda: bool(torch.empty(1).uniform_(-1, 1) > -0.999),
    "bernoulli": lambda: bool(torch.bernoulli(torch.tensor(0.999))),
    "bernoulli_": lambda: bool(torch.empty(1).bernoulli_(0.001)),
    "numpy": lambda: bool(np.random.rand() > 0.1),
    "random": lambda: random.random() > 0.1,
}


@pytest.mark.parametrize("how", DRAWS)
def test_s13_a_branch_that_is_rarely_skipped_is_refused(how):
    with pytest.raises(MilanError, match=r"shown again: dropout, random depth|draws from .* random numbers"):
        dissected(seeded(lambda: Sometimes(DRAWS[how])), "outputs", 4)


def test_s13_random_numbers_without_effect_are_let_pass():
    drawn = seeded(lambda: Sometimes(lambda: bool(torch.rand(()) >= 0)))
    state = torch.get_rng_state()
    assert dissected(drawn, "outputs", 4).units()
    with drawing(True):
        torch.rand(3)
        assert torch.equal(torch.empty(3).bernoulli_(1.0), torch.ones(3))
        assert torch.equal(F.dropout(torch.ones(3), 0.0), torch.ones(3))
        assert not torch.bernoulli(torch.zeros(3)).any()
    assert not torch.equal(torch.get_rng_state(), state)  # the network's own draws count, those of the trial do not


class Moving(nn.Module):
    def __init__(self, move: Callable[[nn.Module, torch.Tensor], None]) -> None:
        super().__init__()
        self.a, self.move = nn.Conv2d(3, 8, 8, 8), move
        self.scale = nn.Parameter(torch.ones(8, 1, 1))
        self.register_buffer("mu", torch.zeros(8, 1, 1))
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.a(images)
        self.move(self, maps)
        return maps * self.scale - self.mu


def _follows(network: nn.Module, maps: torch.Tensor) -> None:
    network.mu.lerp_(maps.mean((0, 2, 3))[:, None, None], 1e-3)  # type: ignore[operator]


def _begins(network: nn.Module, maps: torch.Tensor) -> None:
    if not network.passes:
        network.scale.data.copy_(1 / maps.std((0, 2, 3))[:, None, None])  # type: ignore[operator]
    network.passes += 1  # type: ignore[operator, assignment]


@pytest.mark.parametrize(("move", "name"), [(_follows, "mu"), (_begins, "scale")])
def test_s13_networks_that_change_while_they_run_are_refused_and_put_back(move, name):
    network = seeded(lambda: Moving(move))
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    with pytest.raises(MilanError, match=f"Moving changes '{name}' in its forward pass"):
        dissected(network, "outputs", 4)
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())


def test_s13_counters_and_caches_are_let_pass():
    def counts(network: nn.Module, maps: torch.Tensor) -> None:
        network.passes += 1  # type: ignore[operator, assignment]
        network.register_buffer(f"cache{len(maps)}", torch.zeros(len(maps)))

    network = seeded(lambda: Moving(counts))
    assert dissected(network, "outputs", 4).units()
    watched = Watched(network, CPU)
    assert not watched.changed() and not watched.drew and watched.drew_elsewhere is None


# S14: values that are none


@pytest.mark.parametrize(
    ("function", "holds"),
    [
        (torch.fft.fft2, "complex numbers"),
        (lambda y: y.argmax(1), "whole numbers"),
        (lambda y: y > 0, "truth values"),
        (lambda y: y.to_sparse(), "a sparse tensor"),
        (lambda y: torch.nested.nested_tensor(list(y)), "a nested tensor"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_s14_what_holds_no_activations_is_refused(function, holds):
    with pytest.raises(MilanError, match=f"{holds}.*hidden="):
        dissected(seeded(lambda: Behind(function)), "f", 4)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_s14_the_same_for_all_images_is_refused(kind):
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.q = nn.Conv2d(3, 8, 8, 8), nn.Parameter(torch.randn(1, 8, 8, 8))
            self.p = Behind.Function(lambda y: self.q.expand(len(y), -1, -1, -1))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            maps = self.a(images)
            return maps + self.p(maps)

    with pytest.raises(MilanError, match="the same for all images"):
        dissected(seeded(Positions).to(kind), "p", 4)


class Reuses(nn.Module):
    def __init__(self, write: Callable[[torch.Tensor], object]) -> None:
        super().__init__()
        self.a, self.write = nn.Conv2d(3, 8, 8, 8), write

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.a(images)
        pooled = maps.mean((2, 3))
        self.write(maps)
        return pooled


@pytest.mark.parametrize(
    ("write", "says"),
    [(lambda y: y.zero_(), "overwritten in place"), (lambda y: y.transpose_(1, 3), "turned in place")],
)
def test_s14_outputs_that_are_overwritten_later_are_refused_and_read_before_that(write, says):
    network = seeded(lambda: Reuses(write))
    with pytest.raises(MilanError, match=f"{says}.*activations='pre'"):
        dissected(network, "a")
    with torch.no_grad():
        right = network.get_submodule("a")(PREPROCESS(torch.from_numpy(pictures(20)))).amax((2, 3)).topk(3, 0).values.T
    found = dissected(network, "a", activations="pre").exemplars.sort("unit", "rank")["activation"].to_numpy()
    assert np.allclose(found.reshape(8, 3), right.numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda y: y.add_(1), True),
        (lambda y: F.relu(y, inplace=True), False),
        (lambda y: F.leaky_relu(y, 0.2, inplace=True), False),
        (lambda y: y.mean(), False),
    ],
)
def test_s14_outputs_that_are_changed_later_say_so_unless_an_activation_does_it(write, said):
    network = seeded(lambda: Reuses(write))
    reading = examine(spec_of(network), network, ["a"])["a"]
    assert isinstance(reading, Layout) and ("changed in place" in reading.remark) == said


def test_s14_values_that_are_no_numbers_are_counted_and_said(capsys):
    loud = seeded(lambda: Behind(lambda y: torch.where(torch.arange(8)[:, None, None] < 3, y / 0, y)))
    assert len(dissected(loud, "f").units()) == 5
    assert "in 3 of 8 units: they are left out" in capsys.readouterr().err


# Errors that were raw, and sentences that were not true


def test_networks_without_weights_are_refused(capsys):
    with torch.device("meta"):
        empty = nn.Sequential(nn.Conv2d(3, 8, 8, 8))
    with pytest.raises(MilanError, match=r"meta device \(first: '0.weight'\)"):
        dissected(empty, "0", 4)
    register_model("test/lazy", lambda weights: nn.Sequential(nn.LazyConv2d(8, 8, 8)), ["0"], PREPROCESS)
    with pytest.raises(MilanError, match=r"lazy modules whose weights are not there yet \(first: '0.weight'\)"):
        milan_ray.dissect("test/lazy", pictures(4), k=3)


@pytest.mark.filterwarnings("ignore")
def test_torchscript_shows_its_own_output():
    plain = seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.Flatten(), nn.Linear(512, 4)))
    found = dissected(torch.jit.script(plain), "outputs")
    assert found.exemplars.equals(dissected(plain, "outputs").exemplars)


def test_gradients_in_the_forward_pass_are_named():
    class Gradient(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            with torch.enable_grad():
                images = images.clone().requires_grad_()
                return torch.autograd.grad((images**3).sum(), images)[0]

    with pytest.raises(MilanError, match="computes gradients in its forward pass"):
        dissected(Gradient().eval(), "outputs", 4)


def test_one_image_at_a_time_is_named():
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 8, 8, 8)

        def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
            return [self.a(image[None]) for image in images]

    class Mapped(Loop):
        def forward(self, images: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return torch.vmap(self.a)(images)

    for network, layer, says in [
        (Loop(), "a", "runs 3 times for 3 images and 2 times for 2"),
        (Loop(), "outputs", "puts out 3 tensors for 3 images and 2 for 2.*hidden="),
        (Mapped(), "a", r"torch\.vmap"),
    ]:
        with pytest.raises(MilanError, match=says):
            dissected(network.eval(), layer, 4)


def test_a_module_whose_weights_another_uses_names_that_one():
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.at = nn.Conv2d(3, 24, 8, 8), nn.MultiheadAttention(24, 2, batch_first=True)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            tokens = self.a(images).flatten(2).transpose(1, 2)
            return self.at(tokens, tokens, tokens)[0]

    with pytest.raises(MilanError, match="'at' around it computes it itself"):
        dissected(seeded(Attends), "at.out_proj", 4)


@pytest.mark.parametrize("said", [{"grid": (0, 0)}, {"grid": "8x8"}, {"prefix_tokens": -1}, {"units_axis": "1"}])
def test_readings_that_cannot_be_are_refused(said):
    with pytest.raises(MilanError, match=next(iter(said))):
        Reading(**said)


def test_a_batch_axis_that_only_has_the_same_size_is_refused():
    network = seeded(lambda: nn.Sequential(nn.Conv2d(3, 3, 8, 8)))
    with pytest.raises(MilanError, match="batch_axis=1 does not count them"):
        dissected(network, "0", 4, batch_axis=1)
