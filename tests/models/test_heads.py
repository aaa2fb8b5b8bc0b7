"""The last layer of classifiers: found, read with units switched off, and fine-tuned."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn

from milan_ray.errors import MilanError
from milan_ray.models.ablation import Ablation
from milan_ray.models.heads import HeadTraining, find_head, fit_head, head_inputs, strongest_classes
from milan_ray.models.registry import ModelSpec
from milan_ray.models.view import Preprocess, View


class Tiny(nn.Module):
    """A linear map in the middle and one at the end, of the same shape."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.middle = nn.Linear(6, 6)
        self.end = nn.Sequential(OrderedDict(drop=nn.Dropout(0.5), out=nn.Linear(6, 6)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.end(torch.relu(self.middle(self.conv(images).relu().mean((2, 3)))))


@pytest.fixture
def tiny() -> tuple[ModelSpec, nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    spec = ModelSpec("t", lambda _: Tiny(), ("conv",), Preprocess(View(resize=None, crop=16), (0.5,) * 3, (0.5,) * 3))
    views = torch.randint(0, 256, (9, 16, 16, 3), dtype=torch.uint8)
    return spec, spec.load(), views


def test_the_head_is_the_linear_map_at_the_end(tiny):
    spec, model, views = tiny
    assert find_head(spec, model, views) == "end.out"
    ends = nn.Sequential(nn.Flatten(), nn.Linear(768, 4), nn.Softmax(-1)).eval()
    with pytest.raises(MilanError, match="does not end in a linear map"):
        find_head(spec, ends, views)


def test_what_reaches_the_head_gives_the_ablated_networks_logits(tiny):
    spec, model, views = tiny
    units = {"conv": [1, 4], "middle": [0]}
    inputs = head_inputs(spec, model, "end.out", units, views, rows=4)
    torch.testing.assert_close(model.end.out(inputs), Ablation(spec, model, [units]).logits(views)[0])
    assert not inputs[:, 0].any()


def test_fine_tuning_learns_keeps_the_best_and_repeats():
    torch.manual_seed(0)
    inputs = torch.randn(300, 5)
    labels = inputs[:, :3].argmax(1)
    weight, bias = torch.zeros(3, 5), torch.zeros(3)
    config = HeadTraining(lr=0.05, max_epochs=20, batch_size=32)
    tuned, shift = fit_head(inputs, labels, weight, bias, config)
    assert shift is not None
    assert ((inputs @ tuned.T + shift).argmax(1) == labels).float().mean() > 0.9
    assert not weight.any() and not bias.any()
    again, _ = fit_head(inputs, labels, weight, bias, config)
    assert torch.equal(tuned, again)
    worse, none = fit_head(inputs, labels, tuned, None, HeadTraining(lr=50.0, max_epochs=3))
    assert none is None and torch.equal(worse, tuned)  # no pass was better than where it began


def test_the_classes_that_a_unit_speaks_for():
    weight = torch.tensor([[0.1, 3.0], [0.5, -1.0], [-2.0, 2.0]])
    assert strongest_classes(weight, 1, 2) == [0, 2]
    assert strongest_classes(weight, 0, 9) == [1, 0, 2]
