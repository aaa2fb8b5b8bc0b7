"""Moments and principal components, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from milan_ray.models.features.moments import Moments
from milan_ray.models.features.pca import component_dictionary, principal_components
from milan_ray.models.features.statistics import explained_variance


def outputs(rows: int = 300, units: int = 7, far: float = 0.0) -> torch.Tensor:
    rng = np.random.default_rng(0)
    mixed = rng.normal(size=(rows, units)) @ rng.normal(size=(units, units))
    return torch.from_numpy((mixed + far).astype(np.float32))


def moments_of(*batches: torch.Tensor) -> Moments:
    moments = Moments(batches[0].shape[1])
    for batch in batches:
        moments.add(batch)
    return moments


@pytest.mark.parametrize("far", [0.0, 1e4])
def test_components_are_those_of_numpys_svd(far):
    x = outputs(far=far)
    centred = x.double().numpy() - x.double().numpy().mean(axis=0)
    _, sizes, vectors = np.linalg.svd(centred, full_matrices=False)
    rows, variances = principal_components(moments_of(*x.split(37)), 5)
    np.testing.assert_allclose(np.abs(rows.numpy() @ vectors[:5].T), np.eye(5), atol=1e-6)
    np.testing.assert_allclose(variances.numpy(), sizes[:5] ** 2 / len(x), rtol=1e-6)
    largest = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))
    assert (largest > 0).all()


def test_moments_of_any_split_and_order_are_those_of_all_outputs():
    x = outputs(far=3.0)
    whole = moments_of(x)
    parts = [moments_of(part) for part in x.split(41)]
    merged = Moments(7)
    for part in reversed(parts):
        merged.merge(Moments.of_state(part.state()))
    merged.merge(Moments(7))
    assert merged.positions == whole.positions == 300 and merged.least == whole.least == x.min()
    for name in ("mean", "scatter"):
        np.testing.assert_allclose(getattr(merged, name), getattr(whole, name), rtol=1e-12, atol=1e-9)
    np.testing.assert_allclose(whole.scatter / 300, np.cov(x.double().numpy().T, bias=True), rtol=1e-9)


def test_all_components_reconstruct_and_fewer_explain_their_share_of_the_variance():
    x = outputs()
    moments = moments_of(x)
    assert explained_variance(component_dictionary(moments, 7), x) == pytest.approx(1, abs=1e-6)
    variances = principal_components(moments, 7)[1]
    share = float(variances[:3].sum() / variances.sum())
    assert explained_variance(component_dictionary(moments, 3), x) == pytest.approx(share, abs=1e-6)


def test_values_that_are_not_finite_stay_visible():
    x = outputs()
    x[3, 2] = torch.nan
    assert moments_of(*x.split(100)).least.isnan()
