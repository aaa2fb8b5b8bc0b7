"""Dictionaries: maps from a layer's output at a position to features, and back.

All formats come down to one formula. With x a layer's output at a position, n(x) its normalisation, W the encoder and D
the decoder::

    pre = (n(x) − input_bias)·Wᵀ + encoder_bias,    z = activation(pre),    x̂ = n⁻¹(z·D + decoder_bias)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import nn
from torch.nn import functional

DENSE = ("identity", "relu", "tanh-relu", "threshold", "gated")
"""Activations whose features do not depend on each other."""

SPARSE = ("topk", "topk-signed", "groupmax")
"""Activations that keep k features at a position."""

NORMALISATIONS = ("none", "constant_norm_rescale", "layer_norm")
"""Names of :attr:`Dictionary.normalisation`, as SAELens and ViT-Prisma call them."""

_EPSILON = 1e-5
"""Added to the standard deviation of ``layer_norm``."""

_LEAST = torch.finfo(torch.float32).tiny
"""Least norm that ``constant_norm_rescale`` divides by, so that a position of zeros stays zero."""


@dataclass(frozen=True)
class Weights:
    """The tensors of a dictionary, float32; F features of a layer with C units.

    Attributes:
        encoder: (F, C).
        decoder: (F, C): what each feature adds to the layer's output; may be the encoder itself.
        encoder_bias: (F,), added to the pre-activations (of ``gated``, to the magnitudes).
        decoder_bias: (C,), added to the reconstruction.
        input_bias: (C,), subtracted from the input.
        threshold: (F,), what ``threshold`` compares with.
        gate_bias: (F,), what ``gated`` adds before it compares with 0.
        log_gain: (F,), logarithm of what ``gated`` multiplies magnitudes by.
    """

    encoder: torch.Tensor
    decoder: torch.Tensor
    encoder_bias: torch.Tensor | None = None
    decoder_bias: torch.Tensor | None = None
    input_bias: torch.Tensor | None = None
    threshold: torch.Tensor | None = None
    gate_bias: torch.Tensor | None = None
    log_gain: torch.Tensor | None = None


class Dictionary(nn.Module):
    """Maps a layer's output at every position to F features, and back.

    Tensors are buffers. Nothing here makes the host wait for a GPU, and NaN in the input stays NaN in the codes.

    ==============  =================================================================================
    activation      codes
    ==============  =================================================================================
    ``identity``    pre
    ``relu``        max(pre, 0)
    ``tanh-relu``   tanh(max(pre, 0))
    ``threshold``   max(pre, 0) where pre > threshold, else 0 (JumpReLU, and BatchTopK after training)
    ``gated``       max(exp(log_gain)·pre₀ + encoder_bias, 0) where pre₀ + gate_bias > 0, pre₀ without a bias
    ``topk``        max(pre, 0) of the k largest pre at a position
    ``topk-signed`` pre of the k largest at a position, negative ones too
    ``groupmax``    max(pre, 0) of the largest of each of k groups of neighbouring features
    ==============  =================================================================================

    Attributes:
        count: F.
        width: C, the layer's units.
        activation: Name of the activation.
        sparse: k, the most non-zero codes at a position, or None where codes are dense.
        normalisation: Normalisation of the input at a position: ``none``, ``constant_norm_rescale`` (to the length √C),
            ``layer_norm`` (to mean 0 and standard deviation 1).
        reconstructs: Whether x̂ is meant to be near x: not with probe vectors, for example.
    """

    encoder: torch.Tensor
    decoder: torch.Tensor | None
    encoder_bias: torch.Tensor | None
    decoder_bias: torch.Tensor | None
    input_bias: torch.Tensor | None
    threshold: torch.Tensor | None
    gate_bias: torch.Tensor | None
    log_gain: torch.Tensor | None

    def __init__(
        self,
        weights: Weights,
        activation: str = "relu",
        k: int | None = None,
        normalisation: str = "none",
        reconstructs: bool = True,
    ) -> None:
        """Checks and registers the tensors.

        Args:
            weights: The tensors.
            activation: Name of the activation.
            k: For an activation in :data:`SPARSE`, the number of features that it keeps.
            normalisation: Name of the normalisation.
            reconstructs: See the class.

        Raises:
            ValueError: A shape, a name or k is wrong, or the activation lacks its tensors.
        """
        super().__init__()
        self.count, self.width = weights.encoder.shape
        self.activation, self.normalisation, self.reconstructs = activation, normalisation, reconstructs
        self.sparse = k
        _check(weights, activation, k, normalisation)
        for field in fields(weights):
            tensor = getattr(weights, field.name)
            # One matrix for both is kept once, wherever the module moves to.
            tied = field.name == "decoder" and tensor is weights.encoder
            kept = None if tensor is None or tied else tensor.detach().to(torch.float32).contiguous()
            self.register_buffer(field.name, kept)

    @property
    def directions(self) -> torch.Tensor:
        """What each feature adds to the layer's output, per unit of its code: float32 (F, C).

        With a normalisation other than ``none``, in normalised units: a position multiplies all of them by one number.
        """
        return self.encoder if self.decoder is None else self.decoder

    @property
    def rectified(self) -> bool:
        """Whether codes are never below zero, and zero means that a feature is absent."""
        return self.activation not in ("identity", "topk-signed")

    def identity(self) -> dict[str, object]:
        """All that decides results besides the tensors, for fingerprints."""
        return {
            "dictionary": 1,
            "activation": self.activation,
            "k": self.sparse,
            "normalisation": self.normalisation,
            "reconstructs": self.reconstructs,
            "tied": self.decoder is None,
        }

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """The codes of a layer's outputs.

        Args:
            x: (N, C).

        Returns:
            float32 (N, F).
        """
        if self.sparse is None:
            return self.encode_block(x, 0, self.count)
        values, indices = self.encode_sparse(x)
        return values.new_zeros(len(values), self.count).scatter_(1, indices, values)

    def encode_block(self, x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """The codes of features ``start`` to ``stop``, which bounds memory.

        Args:
            x: (N, C).
            start: First feature.
            stop: One after the last feature.

        Returns:
            float32 (N, stop − start).

        Raises:
            ValueError: Which features are on depends on the others.
        """
        if self.sparse is not None:
            raise ValueError(f"{self.activation} compares all features of a position")
        block = slice(start, stop)
        if self.activation == "gated":
            assert self.gate_bias is not None and self.log_gain is not None
            plain = functional.linear(self._input(x), self.encoder[block])
            magnitude = plain * self.log_gain[block].exp()
            if self.encoder_bias is not None:
                magnitude = magnitude + self.encoder_bias[block]
            return magnitude.relu() * (plain + self.gate_bias[block] > 0)
        pre = self._pre(x, block)
        if self.activation == "identity":
            return pre
        if self.activation == "threshold":
            assert self.threshold is not None
            return pre.relu() * (pre > self.threshold[block])
        return pre.relu().tanh() if self.activation == "tanh-relu" else pre.relu()

    def encode_sparse(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The codes that are kept at each position; besides them, only the pre-activations are made.

        Args:
            x: (N, C).

        Returns:
            float32 (N, k), some of which may be 0, and their features, int64 (N, k), distinct in a row.

        Raises:
            ValueError: Codes are dense.
        """
        if self.sparse is None:
            raise ValueError(f"{self.activation} keeps no fixed number of features")
        pre = self._pre(x, slice(0, self.count))
        if self.activation == "groupmax":
            grouped = pre.unflatten(1, (self.sparse, -1))
            values, within = grouped.max(dim=2)
            first = torch.arange(0, self.count, grouped.shape[2], device=pre.device)
            return values.relu(), within + first
        values, indices = pre.topk(self.sparse, dim=1)
        return values if self.activation == "topk-signed" else values.relu(), indices

    def decode(self, z: torch.Tensor, x: torch.Tensor | None = None) -> torch.Tensor:
        """The outputs that codes stand for.

        Args:
            z: (N, F).
            x: (N, C), the outputs that were encoded, whose normalisation is undone; not needed where there is none.

        Returns:
            float32 (N, C).

        Raises:
            ValueError: The normalisation cannot be undone without ``x``.
        """
        return self._output(z.to(torch.float32) @ self.directions, x)

    def decode_sparse(self, values: torch.Tensor, indices: torch.Tensor, x: torch.Tensor | None = None) -> torch.Tensor:
        """As :meth:`decode`, from the codes that :meth:`encode_sparse` returns.

        Args:
            values: (N, k).
            indices: int64 (N, k).
            x: (N, C) or None, as in :meth:`decode`.

        Returns:
            float32 (N, C).

        Raises:
            ValueError: The normalisation cannot be undone without ``x``.
        """
        summed = functional.embedding_bag(indices, self.directions, mode="sum", per_sample_weights=values)
        return self._output(summed, x)

    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        """x̂ of a layer's outputs: float32 (N, C) of (N, C)."""
        if self.sparse is None:
            return self.decode(self.encode(x), x)
        return self.decode_sparse(*self.encode_sparse(x), x)

    def _pre(self, x: torch.Tensor, block: slice) -> torch.Tensor:
        bias = None if self.encoder_bias is None else self.encoder_bias[block]
        return functional.linear(self._input(x), self.encoder[block], bias)

    def _input(self, x: torch.Tensor) -> torch.Tensor:
        x = self._normalised(x)[0]
        return x if self.input_bias is None else x - self.input_bias

    def _output(self, summed: torch.Tensor, x: torch.Tensor | None) -> torch.Tensor:
        if self.decoder_bias is not None:
            summed = summed + self.decoder_bias
        if self.normalisation == "none":
            return summed
        if x is None:
            raise ValueError(f"{self.normalisation} is undone by the outputs that were encoded: give x")
        _, factor, mean = self._normalised(x)
        return summed * factor if mean is None else summed * factor + mean

    def _normalised(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | float, torch.Tensor | None]:
        """Normalised outputs (N, C), and the factor and mean (N, 1) that undo it."""
        x = x.to(torch.float32)
        if self.normalisation == "constant_norm_rescale":
            norm = x.norm(dim=1, keepdim=True).clamp_min(_LEAST)
            return x * (math.sqrt(self.width) / norm), norm / math.sqrt(self.width), None
        if self.normalisation == "layer_norm":
            mean, deviation = x.mean(dim=1, keepdim=True), x.std(dim=1, keepdim=True)
            # ε is added before the division only: so do the projects that train such dictionaries.
            return (x - mean) / (deviation + _EPSILON), deviation, mean
        return x, 1.0, None


def _check(weights: Weights, activation: str, k: int | None, normalisation: str) -> None:
    count, width = weights.encoder.shape
    shapes = {"encoder": (count, width), "decoder": (count, width), "decoder_bias": (width,), "input_bias": (width,)}
    for field in fields(weights):
        tensor = getattr(weights, field.name)
        if tensor is not None and tuple(tensor.shape) != shapes.get(field.name, (count,)):
            raise ValueError(f"{field.name} has the shape {tuple(tensor.shape)}")
    if activation not in (*DENSE, *SPARSE) or normalisation not in NORMALISATIONS:
        raise ValueError(f"activation {activation!r}, normalisation {normalisation!r}")
    if (k is not None) != (activation in SPARSE) or (k is not None and not 1 <= k <= count):
        raise ValueError(f"{activation} of {count} features with k = {k}")
    if activation == "groupmax" and k is not None and count % k:
        raise ValueError(f"{count} features are not {k} groups of one size")
    needed = {"threshold": (weights.threshold,), "gated": (weights.gate_bias, weights.log_gain)}.get(activation, ())
    if any(tensor is None for tensor in needed):
        raise ValueError(f"{activation} lacks its tensors")
