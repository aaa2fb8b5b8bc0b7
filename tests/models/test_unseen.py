"""Margins that a network cuts off or adds by itself, and tokens that are no positions."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from milan_ray.models.establish import establish, examine
from milan_ray.models.lit_cells import LitPictures
from milan_ray.models.registry import ModelSpec
from milan_ray.models.unseen import MARGIN, SIDES, padding, sides_unseen, still
from milan_ray.models.view import Preprocess, View


def spec_of(network: nn.Module, view: tuple[int, int] = (64, 64), **options) -> ModelSpec:
    return ModelSpec("net", lambda weights: network, (), Preprocess(View(view, None)), **options)


def seeded(network: Callable[..., nn.Module], *args: object) -> nn.Module:
    torch.manual_seed(0)
    return network(*args).eval()


class Framed(nn.Module):
    """Cuts off its pictures' sides by itself (negative numbers), or adds to them: left, right, top, bottom."""

    def __init__(self, *frame: int) -> None:
        super().__init__()
        self.frame = frame
        self.first, self.second = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(F.pad(x, self.frame)))


class Tokens(nn.Module):
    """A transformer's block on 8 × 8 patches, with learned tokens in some places."""

    def __init__(self, *, before: int = 0, behind: int = 0, at_each_row: int = 0, norm: bool = True) -> None:
        super().__init__()
        self.patches, self.norm = nn.Linear(192, 24), nn.LayerNorm(24) if norm else nn.Identity()
        self.attention = nn.MultiheadAttention(24, 2, batch_first=True)
        self.learned = nn.Parameter(torch.randn(1, 72, 24))
        self.before, self.behind, self.at_each_row = before, behind, at_each_row
        self.out = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(F.unfold(x, 8, stride=8).transpose(1, 2))
        learned = self.learned.expand(len(x), -1, -1)
        if self.at_each_row:
            ends = learned[:, :8, None]
            tokens = torch.cat([tokens.unflatten(1, (8, 8)), ends], 2).flatten(1, 2)
        tokens = torch.cat([learned[:, : self.before], tokens, learned[:, 72 - self.behind :]], 1)
        normed = self.norm(tokens)
        return self.out(tokens + self.attention(normed, normed, normed, need_weights=False)[0])


@pytest.mark.parametrize(
    ("frame", "said"),
    [
        ((-4, -4, -4, -4), "top and left margin of the pictures, which it cuts off"),
        ((-8, -8, -8, -8), "top, bottom, left and right margin of the pictures, which it cuts off"),
        ((0, -16, 0, 0), "depends on the right margin of the pictures"),
        ((0, 16, 0, 16), r"positions on the bottom and right of 'first' see no picture: it pads"),
        ((0, 0, 32, 32), r"positions on the top and bottom of 'first' see no picture: it pads"),
    ],
)
@pytest.mark.parametrize("layer", ["first", "second"])
def test_networks_that_cut_or_pad_their_pictures_are_refused_with_the_side(frame, said, layer):
    network = seeded(Framed, *frame)
    (reading,) = examine(spec_of(network), network, [layer]).values()
    assert isinstance(reading, str) and "by itself" in reading and "grid=" in reading
    assert re.search(said, reading), reading


def test_what_is_said_of_the_grid_wins_over_margins():
    from milan_ray.models.layouts import Reading

    network = seeded(Framed, -8, -8, -8, -8)
    spec = spec_of(network, reading=Reading(grid=(12, 12)))
    assert establish(spec, network, ["second"])["second"].grid == (12, 12)


@pytest.mark.parametrize("frame", [(0, 0, 0, 0), (1, 1, 1, 1), (-2, -2, -2, -2), (2, 2, 2, 2)])
def test_margins_below_a_sixteenth_are_no_reason_to_refuse(frame):
    network = seeded(Framed, *frame)
    assert establish(spec_of(network), network, ["second"])["second"].grid[0] in (14, 15, 16, 17)


@pytest.mark.parametrize(
    ("view", "kernel", "stride", "grid"), [(16, 3, 2, 7), (79, 16, 16, 4), (63, 16, 16, 3), (65, 11, 4, 14)]
)
def test_what_strides_leave_over_at_the_bottom_and_the_right_is_no_reason_to_refuse(view, kernel, stride, grid):
    """Up to a stride less one, which may be more than a sixteenth of a small view."""
    network = seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, kernel, stride), nn.ReLU(), nn.Conv2d(8, 8, 1)))
    assert establish(spec_of(network, (view, view)), network, ["2"])["2"].grid == (grid, grid)


@pytest.mark.parametrize(("before", "behind"), [(8, 0), (0, 8), (17, 0), (1, 4)])
def test_tokens_that_are_the_same_for_every_picture_are_no_positions(before, behind):
    """Eight registers beside 8 × 8 patches would make a grid of 9 × 8."""
    network = seeded(lambda: Tokens(before=before, behind=behind))
    layout = establish(spec_of(network), network, ["out"])["out"]
    assert (layout.grid, layout.prefix_tokens, layout.suffix_tokens) == ((8, 8), before, behind)


def test_tokens_at_the_end_of_each_row_are_refused():
    network = seeded(lambda: Tokens(at_each_row=1))
    (reading,) = examine(spec_of(network), network, ["out"]).values()
    assert isinstance(reading, str) and "of which 8 are the same for every picture" in reading


def test_margins_light_a_sixteenth_of_each_side():
    pictures = LitPictures((100, 64)).margins()
    lit = (pictures != 128).all(3)
    assert lit[0].all()
    for side, (rows, columns) in zip(SIDES, ((7, 64), (7, 64), (100, 4), (100, 4)), strict=True):
        shown = lit[1 + SIDES.index(side)]
        assert shown.sum() == rows * columns
        edge = {"top": shown[0], "bottom": shown[-1], "left": shown[:, 0], "right": shown[:, -1]}[side]
        assert edge.all()


@given(
    st.integers(4, 40), st.integers(4, 40), st.lists(st.integers(0, 8), min_size=4, max_size=4), st.integers(0, 2**16)
)
def test_padding_is_found_on_the_sides_that_have_it(height, width, widths, seed):
    top, bottom, left, right = widths
    answer = torch.rand(height, width, generator=torch.Generator().manual_seed(seed)).double() + 0.1
    framed = F.pad(answer, (left, right, top, bottom))
    sizes = (framed.shape[0], framed.shape[0], framed.shape[1], framed.shape[1])
    expected = tuple(side for side, n, size in zip(SIDES, widths, sizes, strict=True) if n * MARGIN > size)
    assert padding(framed) == expected
    assert padding(torch.zeros(height, width).double()) == ()


def test_still_positions_are_few_and_exact():
    answer = torch.tensor([0.0, 3.0, 2.0, 1e-9, 1.0]).double()
    found = still(answer)
    assert found is not None and found.tolist() == [True, False, False, True, False]
    assert still(torch.ones(5).double()) is None  # all answer
    assert still(torch.tensor([0.0, 0.0, 1.0]).double()) is None  # most do not
    assert still(torch.zeros(0).double()) is None


def test_sides_that_any_call_answers_to_are_seen():
    first, second = torch.zeros(4, 3).double(), torch.zeros(4, 2, 2).double()
    assert sides_unseen([first, second]) == SIDES
    first[0, 1], second[3, 0, 1] = 1, 1
    assert sides_unseen([first, second]) == ("bottom", "left")
    assert sides_unseen([]) == ()
