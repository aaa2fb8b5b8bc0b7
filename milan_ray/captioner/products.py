"""Matrix products of a search, by the library that is fastest on the processor.

torch computes float32 products on CPUs by MKL, which uses half of the vector width of AMD's processors: 105 GFlop/s
where oneDNN, which torch has for convolutions, computes 220. Both are float32 throughout and differ in the last bits.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _by_onednn(weight: Tensor) -> bool:
    """Whether oneDNN computes products with this weight: on CPUs with AVX-512; elsewhere it is no faster."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
    )


class Product:
    """The affine map of a weight and a bias, without gradients.

    Where oneDNN computes it, the weight is copied: a product is made for one search, and sees no later change.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Takes a weight (N, K) and a bias (N,)."""
        self._packed = _by_onednn(weight)
        self._weight = weight.to_mkldnn() if self._packed else weight
        self._bias = bias.to_mkldnn() if self._packed and bias is not None else bias

    @classmethod
    def of(cls, layer: nn.Module) -> Product:
        """The product of a linear layer, or of the linear layer in a sequence."""
        (linear,) = (module for module in layer.modules() if isinstance(module, nn.Linear))
        return cls(linear.weight.detach(), linear.bias.detach())

    def __call__(self, x: Tensor) -> Tensor:
        """X·Wᵀ + b, float32 (R, N), of rows x (R, K)."""
        if self._packed:
            return F.linear(x.to_mkldnn(), self._weight, self._bias).to_dense()
        return F.linear(x, self._weight, self._bias)
