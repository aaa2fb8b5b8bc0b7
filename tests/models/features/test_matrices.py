"""Plain matrices of directions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from features import FEATURES, WIDTH, assert_follows, outputs, random
from safetensors.torch import save_file

from milan_ray.errors import MilanError
from milan_ray.models.features.checkpoints import read_dictionary
from milan_ray.models.features.options import ReadingOptions
from milan_ray.models.features.statistics import explained_variance

MATRIX, MEAN, BIAS = random(FEATURES, WIDTH), random(WIDTH), random(FEATURES)


def array(path: Path, values: np.ndarray) -> Path:
    np.save(path, values)
    return path


def tensors(path: Path, **named: torch.Tensor) -> Path:
    save_file(named, path)
    return path


def formula(x, mean=0, bias=0):
    z = (x - mean) @ MATRIX.T + bias
    return z, z @ MATRIX + mean


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2"])
def test_array_has_a_row_per_feature(dtype, tmp_path):
    made = read_dictionary(array(tmp_path / "w.npy", MATRIX.numpy().astype(dtype)), ReadingOptions(width=WIDTH))
    assert (made.count, made.width, made.reconstructs) == (FEATURES, WIDTH, False)
    torch.testing.assert_close(made.directions, MATRIX, rtol=1e-3, atol=1e-3)
    if dtype != "<f2":
        assert_follows(made, formula)


@pytest.mark.parametrize("names", [("mean", "bias"), ("mean_", "intercept_")])
def test_mean_and_bias_are_used(names, tmp_path):
    file = tensors(tmp_path / "probe.safetensors", coef=MATRIX, **{names[0]: MEAN, names[1]: BIAS})
    made = read_dictionary(file, ReadingOptions(width=WIDTH))
    assert_follows(made, lambda x: formula(x, MEAN, BIAS))
    assert not made.reconstructs


def test_principal_components_reconstruct(tmp_path):
    x = outputs()
    mean = x.mean(0)
    components = torch.linalg.svd(x - mean, full_matrices=False).Vh.contiguous()
    made = read_dictionary(
        tensors(tmp_path / "pca.safetensors", components=components[:4].contiguous(), mean=mean),
        ReadingOptions(width=WIDTH),
    )
    assert made.reconstructs and 0.5 < explained_variance(made, x) < 1
    whole = tensors(tmp_path / "all.safetensors", components=components, mean=mean)
    assert explained_variance(read_dictionary(whole, ReadingOptions(transposed=False)), x) == pytest.approx(1)


def test_which_side_is_the_layers_is_asked_where_the_width_cannot_tell(tmp_path):
    file = array(tmp_path / "w.npy", MATRIX.numpy())
    rows = read_dictionary(file)
    assert (rows.count, rows.width) == (FEATURES, WIDTH)
    with pytest.raises(MilanError, match="whose columns fit the layer's 12 units: give transposed"):
        read_dictionary(file, ReadingOptions(width=FEATURES))
    with pytest.raises(MilanError, match="of a layer with 5 units, and this layer has 7"):
        read_dictionary(file, ReadingOptions(width=7))
    turned = read_dictionary(file, ReadingOptions(width=FEATURES, transposed=True))
    assert (turned.count, turned.width) == (WIDTH, FEATURES) and torch.equal(turned.directions, MATRIX.T)
    square = array(tmp_path / "square.npy", MATRIX[:WIDTH].numpy())
    with pytest.raises(MilanError, match="5 × 5 matrix"):
        read_dictionary(square, ReadingOptions(width=WIDTH))
    assert torch.equal(read_dictionary(square, ReadingOptions(transposed=False)).directions, MATRIX[:WIDTH])
    assert torch.equal(read_dictionary(square, ReadingOptions(transposed=True)).directions, MATRIX[:WIDTH].T)


def test_rectified_projections(tmp_path):
    file = array(tmp_path / "nmf.npy", MATRIX.numpy())
    made = read_dictionary(file, ReadingOptions(width=WIDTH, activation="relu"))
    assert torch.equal(
        made.encode(outputs()), read_dictionary(file, ReadingOptions(width=WIDTH)).encode(outputs()).relu()
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([["a", "b"]]), "it holds texts"),
        (np.zeros((3, 4), bool), "it holds bool"),
        (np.zeros((3, 4), complex), "it holds complex128"),
        (np.zeros(4, [("x", "f4")]), "it holds records"),
        (np.zeros(4), "hold 0 matrices"),
        (np.zeros((0, 5)), "has the shape .0, 5., which is no matrix"),
        (np.full((3, 5), np.nan), "NaN or infinite"),
        (np.full((3, 5), 1e300), "NaN or infinite"),
    ],
)
def test_arrays_that_are_no_matrix_of_numbers_are_refused(values, message, tmp_path):
    with pytest.raises(MilanError, match=message):
        read_dictionary(array(tmp_path / "w.npy", values), ReadingOptions(width=5))


def test_safetensors_with_more_than_a_matrix_are_refused(tmp_path):
    with pytest.raises(MilanError, match="hold 2 matrices"):
        read_dictionary(tensors(tmp_path / "a.safetensors", a=MATRIX, b=MATRIX.clone()))
    with pytest.raises(MilanError, match="hold std beside a matrix"):
        read_dictionary(tensors(tmp_path / "b.safetensors", a=MATRIX, std=MEAN))
    with pytest.raises(MilanError, match=r"mean has the shape .12,. and not .5,."):
        read_dictionary(tensors(tmp_path / "c.safetensors", a=MATRIX, mean=BIAS), ReadingOptions(width=WIDTH))
    with pytest.raises(MilanError, match="give activation, one of identity, relu"):
        read_dictionary(tensors(tmp_path / "d.safetensors", a=MATRIX), ReadingOptions(activation="topk"))
