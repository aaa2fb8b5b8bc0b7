"""Pooled activations: numbers that depend on one image alone, in pieces that depend on the width alone."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from milan_ray.exemplars.pooled import in_groups, matrix, maxima, means, to_table


def test_maxima_and_means_leave_out_what_is_not_finite():
    maps = torch.arange(24, dtype=torch.float32).reshape(2, 3, 2, 2)
    maps[0, 0] = torch.nan
    maps[0, 1, 0, 0] = torch.inf
    maps[1, 2, 1, 1] = -torch.inf
    assert maxima(maps).tolist() == [[-torch.inf, 7, 11], [15, 19, 22]]
    assert means(maps)[0].tolist()[1:] == [6, 9.5] and torch.isnan(means(maps)[0, 0])
    assert means(maps)[1].tolist() == [13.5, 17.5, 21]


def test_means_of_huge_activations_do_not_overflow():
    assert means(torch.full((1, 1, 4, 4), 3e38)).item() == pytest.approx(3e38)


@settings(max_examples=60, deadline=None)
@given(
    units=st.integers(1, 70),
    side=st.tuples(st.integers(1, 15), st.integers(1, 15)),
    count=st.integers(1, 15),
    last=st.booleans(),
)
def test_means_of_an_image_do_not_depend_on_its_batch_mates(units, side, count, last):
    generator = torch.Generator().manual_seed(units)
    maps = torch.randn(16, units, *side, generator=generator)
    if last:
        maps = maps.contiguous(memory_format=torch.channels_last)
    assert torch.equal(means(maps)[:count], means(maps[:count]))


def test_table_holds_lists_of_units_and_nan_where_nothing_was_finite():
    table = to_table(np.array([4, 7, 9]), [torch.tensor([[1.0, -torch.inf]]), torch.ones(2, 2)], [torch.zeros(3, 2)])
    assert table["image_id"].to_pylist() == [4, 7, 9]
    np.testing.assert_array_equal(matrix(table["max"]), [[1, np.nan], [1, 1], [1, 1]])
    np.testing.assert_array_equal(matrix(table["mean"].slice(1)), np.zeros((2, 2)))


@given(cuts=st.lists(st.integers(0, 50), max_size=8))
def test_groups_are_the_same_whatever_pieces_come(cuts):
    values = torch.arange(150.0).reshape(50, 3)
    bounds = [0, *sorted(cuts), 50]
    pieces = (
        to_table(np.arange(start, stop), [values[start:stop]], [values[start:stop]]) for start, stop in pairwise(bounds)
    )
    groups = list(in_groups(pieces, values=36))
    assert [len(group) for group in groups] == [12, 12, 12, 12, 2]
    np.testing.assert_array_equal(matrix(pa.concat_tables(groups)["max"]), values)
