"""Plain matrices of directions: principal or independent components, probe and concept vectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from milan_ray.errors import MilanError, explained
from milan_ray.models.features.contents import Tensors, ask, read_tensors, unknown
from milan_ray.models.features.dictionary import Dictionary, Weights
from milan_ray.models.features.options import ReadingOptions
from milan_ray.tensorfiles import check_sizes, describe_dtype

USES = ("activation", "transposed")
"""Options that are read."""

_MEANS, _BIASES = ("mean", "mean_"), ("bias", "intercept", "intercept_")

_CLOSE = 1e-3
"""How far products of rows may be from 0 and 1 for the rows to count as orthonormal."""


def read(path: Path, options: ReadingOptions) -> Dictionary:
    """Reads a matrix with a row per feature: codes are (x − mean)·Wᵀ + bias.

    A file of safetensors holds one matrix under any name, and perhaps ``mean`` (C,) and ``bias`` (F,). The dictionary
    reconstructs where the rows are orthonormal and there is no bias, as with principal components.

    Raises:
        MilanError: It is damaged, or which side of the matrix is the layer's has to be said.
    """
    name = str(path)
    activation = options.activation or "identity"
    if activation not in ("identity", "relu"):
        raise unknown(name, "activation", activation, ("identity", "relu"), "activation")
    tensors = _array(path) if path.suffix == ".npy" else read_tensors(path)
    matrices = [tensor for tensor in tensors.names if len(tensors.shape(tensor)) == 2]
    if len(matrices) != 1:
        raise MilanError(
            f"features {name} hold {len(matrices)} matrices ({', '.join(matrices[:5]) or 'none'}): save the one with a "
            "row per feature, or say the format."
        )
    mean, bias = (next((other for other in names if other in tensors), None) for names in (_MEANS, _BIASES))
    others = [other for other in tensors.names if other not in (*matrices, mean, bias)]
    if others:
        raise MilanError(
            f"features {name} hold {', '.join(others[:5])} beside a matrix, which is not read: save only the matrix, "
            "mean and bias, or say the format."
        )
    rows = _rows(name, tensors.matrix(matrices[0]), options)
    count, width = rows.shape
    centre = None if mean is None else tensors.tensor(mean, width)
    added = None if bias is None else tensors.tensor(bias, count)
    reconstructs = bias is None and activation == "identity" and _orthonormal(rows)
    return Dictionary(Weights(rows, rows, added, centre, centre), activation, reconstructs=reconstructs)


def _array(path: Path) -> Tensors:
    with explained(
        f"features {path} cannot be read", "save a matrix of numbers by numpy.save.", OSError, EOFError, ValueError
    ):
        check_sizes(path)
        array = np.load(path, allow_pickle=False)
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
            kind = describe_dtype(array.dtype) if isinstance(array, np.ndarray) else "several arrays"
            raise ValueError(f"it holds {kind or array.dtype}")
        # torch knows neither other byte orders nor all whole numbers.
        return Tensors(str(path), {"matrix": torch.from_numpy(array.astype(np.float64))})


def _rows(path: str, matrix: torch.Tensor, options: ReadingOptions) -> torch.Tensor:
    """The matrix with a row per feature.

    One with a column per feature does not pass for one: its columns are not the layer's width, unless it is square.
    """
    count, width = matrix.shape
    if options.transposed is None and count == width:
        what = f"which side of their {count} × {width} matrix is the layer's"
        raise ask(path, what, "transposed", "false where each row is a feature, true where each column is")
    if options.transposed is None and count == options.width != width:
        raise MilanError(
            f"features {path} hold a {count} × {width} matrix, whose columns fit the layer's {options.width} units: "
            "give transposed, or save it with a row per feature."
        )
    return matrix.T.contiguous() if options.transposed else matrix


def _orthonormal(rows: torch.Tensor) -> bool:
    count, width = rows.shape
    return count <= width and bool(((rows @ rows.T - torch.eye(count)).abs() < _CLOSE).all())
