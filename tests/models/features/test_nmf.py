"""Non-negative factorisation, against the updates written out in numpy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from milan_ray.models.features.nmf import PartSums, codes, first_parts, part_dictionary

ROWS, UNITS, PARTS = 400, 7, 3


def outputs(noise: float = 0.05) -> torch.Tensor:
    rng = np.random.default_rng(0)
    parts = rng.random((PARTS, UNITS)) * (rng.random((PARTS, UNITS)) < 0.6)
    x = rng.gamma(0.5, size=(ROWS, PARTS)) @ parts + noise * rng.random((ROWS, UNITS))
    return torch.from_numpy(x.astype(np.float32))


def reference(x: np.ndarray, parts: np.ndarray, passes: int) -> tuple[np.ndarray, list[float]]:
    """Lee and Seung's updates of all codes, then of all parts, with everything in memory; the error of each pass."""
    errors = []
    for _ in range(passes):
        z = np.repeat(x.sum(1, keepdims=True) / parts.sum(), len(parts), axis=1)
        for _ in range(100):
            z = z * (x @ parts.T) / np.maximum(z @ parts @ parts.T, 1e-12)
        errors.append(float(((x - z @ parts) ** 2).sum()))
        for _ in range(100):
            parts = parts * (z.T @ x) / np.maximum(z.T @ z @ parts, 1e-12)
        parts = parts / np.linalg.norm(parts, axis=1, keepdims=True)
    return parts, errors


def factorised(x: torch.Tensor, parts: torch.Tensor, passes: int, batch: int) -> tuple[torch.Tensor, list[float]]:
    errors = []
    for _ in range(passes):
        total = PartSums(*parts.shape)
        for some in x.split(batch):
            sums = PartSums(*parts.shape)
            sums.add(some, parts)
            total.merge(sums.state())
        errors.append(float(total.error))
        parts = total.updated(parts)
    return parts, errors


@pytest.mark.parametrize("batch", [ROWS, 37])
def test_passes_are_the_updates_written_out_and_the_error_falls(batch):
    x = outputs()
    first = first_parts(x, PARTS)
    parts, errors = factorised(x, first, 8, batch)
    wanted, fell = reference(x.double().numpy(), first.double().numpy(), 8)
    np.testing.assert_allclose(parts.numpy(), wanted, atol=2e-3)
    np.testing.assert_allclose(errors, fell, rtol=1e-2)
    assert all(after < before for before, after in itertools.pairwise(errors))
    assert errors[-1] < 0.5 * errors[0] and (parts >= 0).all()


def test_error_of_no_position_grows_with_more_updates_of_its_codes():
    x, parts = outputs(), first_parts(outputs(), PARTS)
    errors = [(x - codes(x, parts, updates) @ parts).square().sum(dim=1) for updates in (0, 1, 5, 50)]
    assert all((after <= before + 1e-5).all() for before, after in itertools.pairwise(errors))
    assert codes(torch.zeros(2, UNITS), parts).eq(0).all()


def test_the_written_encoder_has_the_codes_of_sums_of_parts_and_none_below_zero():
    generator = torch.Generator().manual_seed(0)
    parts = torch.nn.functional.normalize(torch.rand(PARTS, UNITS, generator=generator), dim=1)
    z = torch.rand(50, PARTS, generator=generator)
    dictionary = part_dictionary(parts)
    torch.testing.assert_close(dictionary.encode(z @ parts), z, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dictionary.reconstruct(z @ parts), z @ parts, rtol=1e-4, atol=1e-5)
    assert (dictionary.encode(torch.randn(50, UNITS, generator=generator)) >= 0).all()


def test_first_parts_are_far_from_each_other_and_without_zeros():
    x = torch.cat([torch.eye(4).repeat(5, 1), torch.zeros(3, 4)])
    parts = first_parts(x, 4)
    assert sorted(parts.argmax(dim=1).tolist()) == [0, 1, 2, 3] and (parts > 0).all()
    torch.testing.assert_close(parts.norm(dim=1), torch.ones(4))
    assert (first_parts(torch.zeros(3, 4), 2) > 0).all()


def test_a_part_that_nothing_uses_stays():
    parts = first_parts(outputs(), 2)
    sums = PartSums(2, UNITS)
    assert torch.equal(sums.updated(parts), parts)
