"""Principal components of a layer's outputs."""

from __future__ import annotations

import torch

from milan_ray.models.features.dictionary import Dictionary, Weights
from milan_ray.models.features.moments import Moments


def principal_components(moments: Moments, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The directions in which outputs vary most.

    A component's sign is free; here its entry of the largest magnitude is positive, as in scikit-learn.

    Args:
        moments: Moments of the outputs.
        count: Number of components, at most the layer's units.

    Returns:
        float64 (count, C), orthonormal rows in the order of their variance, and their variances (count,).
    """
    variances, vectors = torch.linalg.eigh(moments.scatter / moments.positions)  # ascending
    rows = vectors.T.flip(0)[:count]
    largest = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))
    return rows * largest.sign(), variances.flip(0)[:count].clamp_min(0)


def component_dictionary(moments: Moments, count: int) -> Dictionary:
    """Principal components as a dictionary: codes are (x − mean)·Wᵀ, negative ones too.

    Args:
        moments: Moments of the outputs.
        count: Number of components.
    """
    rows = principal_components(moments, count)[0].float()
    mean = moments.mean.float()
    return Dictionary(Weights(rows, rows, decoder_bias=mean, input_bias=mean), "identity")
