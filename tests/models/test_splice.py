"""What stands in a layer's place: positions are replaced, all else stays, whatever the output's axes are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from milan_ray.errors import MilanError
from milan_ray.models.establish import established
from milan_ray.models.layouts import Layout
from milan_ray.models.registry import ModelSpec
from milan_ray.models.splice import Splice, spliced
from milan_ray.models.view import Preprocess, View


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        (Layout((5, 2, 3), 0, 1, (2, 3)), (4, 5, 2, 3)),
        (Layout((2, 3, 5), 0, 3, (2, 3)), (4, 2, 3, 5)),
        (Layout((3, 2, 5), 0, 3, (2, 3), columns_first=True), (4, 3, 2, 5)),
        (Layout((8, 5), 1, 2, (2, 3), prefix_tokens=1, suffix_tokens=1), (8, 4, 5)),
        (Layout((6, 5), 0, 2, (2, 3), order=(3, 1, 0, 2, 5, 4)), (4, 6, 5)),
        (Layout((5,), 0, 1, (1, 1)), (4, 5)),
    ],
)
def test_new_maps_are_read_back_and_tokens_beside_them_stay(layout, shape):
    output = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    before, maps = output.clone(), torch.randn(layout.maps(output).shape)
    changed = spliced(output, maps, layout)
    torch.testing.assert_close(layout.maps(changed), maps)
    assert torch.equal(output, before) and changed.shape == output.shape
    assert int((changed != output).sum()) == maps.numel()
    assert torch.equal(spliced(output, layout.maps(output), layout), output)


class Twice(nn.Module):
    """A layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Conv2d(3, 3, 1), nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(self.layer(x).relu()).mean(dim=(2, 3)))


def twice(weights: str | None) -> nn.Module:
    torch.manual_seed(0)
    return Twice()


SPEC = ModelSpec("twice", twice, ("layer",), Preprocess(View(resize=8, crop=8)))


@pytest.mark.parametrize("layer", ["layer", "layer@1"])
def test_the_call_that_the_layer_names_is_replaced_or_the_last(layer):
    spec = replace(SPEC, layers=(layer,))
    model = spec.load()
    assert isinstance(model, Twice)
    views = torch.randint(0, 256, (5, 8, 8, 3), dtype=torch.uint8)
    splice = Splice(spec, model, layer, established(spec, model, [layer])[layer])
    maps = torch.randn(5, 3, 8, 8)
    with torch.inference_mode():
        rest = maps if layer == "layer" else model.layer(maps.relu())
        torch.testing.assert_close(splice.logits(views, maps), model.head(rest.mean(dim=(2, 3))))
        torch.testing.assert_close(splice.logits(views, None), model(spec.prepare(views)))


def test_a_network_without_a_row_of_logits_per_image_is_refused():
    spec = replace(SPEC, factory=lambda _: nn.Sequential(nn.Conv2d(3, 3, 1)), layers=("0",))
    model = spec.load()
    splice = Splice(spec, model, "0", established(spec, model, ["0"])["0"])
    with pytest.raises(MilanError, match="does not put out one row of logits"):
        splice.logits(torch.zeros(2, 8, 8, 3, dtype=torch.uint8), None)
