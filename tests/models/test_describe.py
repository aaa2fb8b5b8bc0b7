from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from milan_ray.errors import MilanError
from milan_ray.models.describe import layer_table
from milan_ray.models.registry import OUTPUTS, ModelSpec
from milan_ray.models.view import Preprocess, View


class Odd(nn.Module):
    """Layers of every kind: dissectable, of odd shape, without tensors, not run, with the batch elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.tokens = nn.Flatten(2)  # (B, 6, 64): six units at 64 positions
        self.volume = nn.Unflatten(1, (2, 3))
        self.unused = nn.Linear(1, 1)
        self.moved = nn.Flatten(0, 1)
        self.head = nn.Linear(64, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        self.volume(x)
        self.moved(x)
        return self.head(self.tokens(x)[:, 0])


def spec() -> ModelSpec:
    return ModelSpec("odd", lambda weights: Odd(), ("conv",), Preprocess(View(resize=(8, 8), crop=None)))


def test_layer_table_tells_dissectable_layers_from_others() -> None:
    table = {info.path: info for info in layer_table(spec())}
    assert list(table) == ["conv", "tokens", "volume", "unused", "moved", "head", OUTPUTS]
    assert (table["conv"].shape, table["conv"].units, table["conv"].default) == ((6, 8, 8), 6, True)
    assert table["tokens"].units == 6 and table["tokens"].reading.startswith("units on axis 1, 8×8 tokens; known from ")
    assert (table["volume"].shape, table["volume"].units) == (None, None)
    assert "puts out (2, 3, 8, 8) per image: units are read from vectors, tokens and maps" in table["volume"].reading
    assert "axis 0 holds 6 rows per image" in table["moved"].reading
    assert (table["unused"].shape, table["unused"].units) == (None, None)
    assert (table["moved"].shape, table["moved"].units) == (None, None)
    assert (table[OUTPUTS].kind, table[OUTPUTS].shape, table[OUTPUTS].units) == ("Odd", (5,), 5)


def test_layer_table_leaves_no_hooks() -> None:
    model = Odd()
    layer_table(ModelSpec("odd", lambda weights: model, (), Preprocess(View(resize=(8, 8), crop=None))))
    assert not any(module._forward_hooks for module in model.modules())


def test_layer_table_of_a_generator_says_what_there_is_instead() -> None:
    generator = replace(spec(), name="odd/generator", images=lambda output: output)
    with pytest.raises(MilanError, match=r"odd/generator is a generator, .* by default are conv, and --layers takes"):
        layer_table(generator)
