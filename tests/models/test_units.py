from __future__ import annotations

import pytest
import torch

from milan_ray.errors import MilanError
from milan_ray.models.registry import ModelSpec
from milan_ray.models.units import unit_maps
from milan_ray.models.view import Preprocess


def test_unit_maps_conv_output_is_returned_as_it_is() -> None:
    output = torch.randn(2, 5, 3, 4)
    assert unit_maps(output) is output


def test_unit_maps_vector_becomes_a_map_of_one_position() -> None:
    output = torch.randn(2, 5)
    assert torch.equal(unit_maps(output)[:, :, 0, 0], output)


@pytest.mark.parametrize(("prefix", "given"), [(0, None), (1, None), (5, None), (5, 5), (0, 0)])
def test_unit_maps_tokens_drop_the_prefix_and_lay_out_patches_row_by_row(prefix: int, given: int | None) -> None:
    patches = torch.randn(2, 7, 6, 6)
    tokens = torch.cat([torch.full((2, prefix, 7), 99.0), patches.flatten(2).transpose(1, 2)], dim=1)
    assert torch.equal(unit_maps(tokens, given), patches)


@pytest.mark.parametrize(("tokens", "given"), [(48, 1), (60, None), (1, 1), (0, None)])
def test_unit_maps_tokens_without_a_square_grid_are_refused(tokens: int, given: int | None) -> None:
    with pytest.raises(MilanError, match=f"layer 'x' puts out {tokens} tokens"):
        unit_maps(torch.zeros(2, tokens, 3), given, layer="layer 'x'")


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4, 5, 6)])
def test_unit_maps_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(MilanError, match="choose another layer"):
        unit_maps(torch.zeros(shape))


def test_spec_unit_maps_channels_last_applies_to_matching_layers_only() -> None:
    spec = ModelSpec("swin", lambda w: torch.nn.Identity(), (), Preprocess(), channels_last=r"features\..*")
    output = torch.randn(2, 3, 4, 5)
    assert torch.equal(spec.unit_maps("features.1", output), output.permute(0, 3, 1, 2))
    assert spec.unit_maps("permute", output) is output
