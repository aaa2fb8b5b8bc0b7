"""Sparse autoencoders: weights, loss, and one step of a training.

Outputs are centred on their mean and scaled to a mean squared length of C first, so that learning rates and sparsity
mean the same for every layer. With x such an output, unit rows d_f in the decoder D, and W, b the encoder::

    pre = (x − c)·Wᵀ + b,    z = TopK(max(pre, 0)), or max(pre, 0) where pre > θ,    x̂ = z·D + c

The loss of a batch of N is Σ‖x − x̂‖² / (N·C), plus what brings dead features back (AuxK of Gao et al. 2024, there with
max(pre, 0)), plus, for JumpReLU, how far the number of features that are on is from the number aimed at (Rajamanoharan
et al. 2024).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch.nn import functional

from milan_ray.device import to_device
from milan_ray.models.features.dictionary import Dictionary, Weights
from milan_ray.models.features.moments import Moments

TOPK, JUMPRELU = ACTIVATIONS = ("topk", "jumprelu")

LEAST_THRESHOLD = 1e-2
"""What JumpReLU's thresholds start from at least."""

LEAST_ROWS, MOST_ROWS, STEPS = 64, 4096, 256
"""Positions per step at least and at most where nothing is said, and steps of an epoch unless they would be smaller."""

SYNTHETIC = 2048
"""Normally distributed outputs by which encoders are scaled before the first step."""

Sum = Callable[[torch.Tensor], None]
"""Sums a tensor over data-parallel workers, in place."""


@dataclass(frozen=True)
class SaeConfig:
    """How sparse autoencoders are trained.

    Attributes:
        lr: Learning rate of Adam; None for 2·10⁻⁴·√(2¹⁴/F) (Gao et al. 2024).
        rows: Positions per step; None for 4,096, or fewer where an epoch has fewer than 256 such steps.
        dead_after: A feature that was off at so many positions in a row counts as dead.
        dead_weight: Weight of the loss that brings dead features back.
        sparsity: Weight of the loss on the number of features that are on, for JumpReLU.
        bandwidth: Width of the window around a threshold in which it learns.
    """

    lr: float | None = None
    rows: int | None = None
    dead_after: int = 10_000_000
    dead_weight: float = 1 / 32
    sparsity: float = 1.0
    bandwidth: float = 0.2

    def for_positions(self, positions: int) -> SaeConfig:
        """The settings for an epoch of so many positions: a feature counts as dead after an epoch at the latest."""
        rows = self.rows or min(MOST_ROWS, max(LEAST_ROWS, positions // STEPS))
        return replace(self, rows=rows, dead_after=min(self.dead_after, positions))

    def identity(self) -> dict[str, object]:
        """The fields, all of which decide the weights."""
        return asdict(self)


def alone(_: torch.Tensor) -> None:
    """The sum over one worker."""


class SparseAutoencoder:
    """A sparse autoencoder in training, on one device.

    Every worker of a data-parallel training has one; they stay equal, because gradients are summed over the workers.

    Args:
        moments: Moments of the outputs, of which mean and scale are taken.
        width: Number of features F.
        activation: ``topk`` or ``jumprelu``.
        k: Features that are on at a position, or aimed at.
        config: How it is trained.
        seed: Of the weights; with the number of features it decides them.
        device: Where it is trained.
    """

    def __init__(
        self,
        moments: Moments,
        width: int,
        activation: str,
        k: int,
        config: SaeConfig,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        units = len(moments.mean)
        self._config, self._activation, self._k, self._units = config, activation, k, units
        self._aux = min(width, max(1, units // 2))
        device = torch.device(device)
        self.mean = to_device(moments.mean.float().cpu(), device)
        # An output that never varies is all mean: any scale will do.
        self.scale = math.sqrt(units / moments.variance) if moments.variance > 0 else 1.0
        generator = torch.Generator().manual_seed(seed * 1_000_003 + width)
        rows = functional.normalize(torch.randn(width, units, generator=generator), dim=1)
        tensors = {"encoder": rows, "decoder": rows, "encoder_bias": torch.zeros(width), "bias": torch.zeros(units)}
        if activation == JUMPRELU:
            tensors["log_threshold"] = self._thresholds(moments, rows).log()
        self.weights = {name: to_device(tensor.clone(), device).requires_grad_() for name, tensor in tensors.items()}
        self.idle = torch.zeros(width, dtype=torch.int64, device=device)
        rate = config.lr or 2e-4 / math.sqrt(width / 2**14)
        self._rate = rate
        self._match(moments, generator)
        self._adam = torch.optim.Adam(self.weights.values(), lr=rate, eps=6.25e-10)

    def _match(self, moments: Moments, generator: torch.Generator) -> None:
        """Scales encoder and thresholds, so that reconstructions of normally distributed outputs have their length.

        Codes would be too large otherwise: rows of the decoder are not orthogonal, and share what they explain.
        """
        values, vectors = torch.linalg.eigh(moments.scatter.cpu() / max(1, moments.positions))
        drawn = torch.randn(SYNTHETIC, len(values), generator=generator, dtype=torch.float64)
        x = (self.scale * (drawn * values.clamp_min(0).sqrt()) @ vectors.T).float()
        device = self.mean.device
        with torch.no_grad():
            x = to_device(x, device)
            again = self._codes(functional.linear(x, self.weights["encoder"]))[0] @ self.weights["decoder"]
            factor = (x * again).sum() / again.square().sum().clamp_min(torch.finfo(torch.float32).tiny)
            factor = torch.where(factor > 0, factor, 1)
            self.weights["encoder"] *= factor
            if self._activation == JUMPRELU:
                self.weights["log_threshold"] += factor.log()

    def _thresholds(self, moments: Moments, rows: torch.Tensor) -> torch.Tensor:
        """Where so many features are on at first as are aimed at, were outputs normally distributed: float32 (F,)."""
        share = torch.tensor(min(1 - 1e-6, self._k / len(rows)), dtype=torch.float64)
        covariance = moments.scatter.cpu() * (self.scale**2 / max(1, moments.positions))
        deviations = ((rows.double() @ covariance) * rows).sum(dim=1).clamp_min(0).sqrt()
        thresholds: torch.Tensor = deviations * torch.special.ndtri(1 - share)
        return thresholds.clamp_min(LEAST_THRESHOLD).float()

    def step(self, x: torch.Tensor, pace: float = 1.0, total: Sum = alone) -> torch.Tensor:
        """Changes the weights after a batch.

        Args:
            x: (N, C), the layer's outputs; the workers' batches together are the batch.
            pace: Factor of the learning rate.
            total: Sums over the workers.

        Returns:
            float32 (), the share of variance that is not explained, before the step; nothing waits for it.
        """
        loss, facts = self.loss((x - self.mean) * self.scale, total)
        self._adam.zero_grad()
        loss.backward()
        for tensor in self.weights.values():
            if tensor.grad is None:  # nothing of this worker's batch depends on it
                tensor.grad = torch.zeros_like(tensor)
            total(tensor.grad)
        decoder = self.weights["decoder"]
        with torch.no_grad():
            grad = decoder.grad
            assert grad is not None
            grad -= (grad * decoder).sum(dim=1, keepdim=True) * decoder
            for group in self._adam.param_groups:
                group["lr"] = self._rate * pace
            self._adam.step()
            decoder /= decoder.norm(dim=1, keepdim=True)
            fired = facts["fired"]
            self.idle = torch.where(fired > 0, 0, self.idle + facts["rows"].long())
        return facts["missed"]

    def loss(self, x: torch.Tensor, total: Sum = alone) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of a batch, as far as it depends on this worker's part.

        Args:
            x: (N, C), centred and scaled.
            total: Sums over the workers.

        Returns:
            The loss, and ``rows`` of the batch, how often features ``fired``, and the share that was ``missed``.
        """
        weights, config = self.weights, self._config
        pre = functional.linear(x - weights["bias"], weights["encoder"], weights["encoder_bias"])
        codes, on = self._codes(pre)
        error = x - weights["bias"] - codes @ weights["decoder"]
        missed = error.square().sum()
        fired = (codes.detach() > 0).sum(dim=0)
        sums = torch.stack([x.new_tensor(len(x)), missed.detach(), on.detach()])
        total(sums)
        total(fired)
        rows = sums[0]
        loss = missed / (rows * self._units)
        if self._activation == JUMPRELU:
            # The gradient of (L0/k − 1)², whose L0 is over all workers.
            loss = loss + config.sparsity * 2 * (sums[2] / (rows * self._k) - 1) * on / (rows * self._k)
        if config.dead_weight:
            loss = loss + config.dead_weight * self._revival(pre, error.detach(), sums[1])
        return loss, {"rows": rows, "fired": fired, "missed": sums[1] / (rows * self._units)}

    def _codes(self, pre: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes (N, F), and how many are on at all positions together."""
        if self._activation == TOPK:
            values, indices = pre.topk(self._k, dim=1)
            codes = torch.zeros_like(pre).scatter(1, indices, values.relu())
            return codes, pre.new_tensor(float(self._k * len(pre)))
        threshold = self.weights["log_threshold"].exp()
        # A step's gradient is zero almost everywhere: in its place, thresholds get that of a window around them.
        near = ((pre - threshold).detach().abs() < self._config.bandwidth / 2).to(pre.dtype) / self._config.bandwidth
        gate = (pre > threshold).to(pre.dtype) - near * (threshold - threshold.detach())
        return pre.relu() * gate, gate.sum()

    def _revival(self, pre: torch.Tensor, error: torch.Tensor, missed: torch.Tensor) -> torch.Tensor:
        """How far dead features, as many as half the units, are from what the others miss: 1 for no use at all.

        Their values count below zero too, so that features that are off everywhere have a gradient.
        """
        dead = self.idle >= self._config.dead_after
        if dead.device.type == "cpu" and not dead.any():  # the same gradients, which are 0; a GPU would have to wait
            return pre.new_zeros(())
        values, indices = pre.masked_fill(~dead, -torch.inf).topk(self._aux, dim=1)
        values = values.masked_fill(values.isneginf(), 0)  # there are fewer dead features
        codes = torch.zeros_like(pre).scatter(1, indices, values)
        left = error - codes @ self.weights["decoder"]
        return left.square().sum() / missed.clamp_min(torch.finfo(torch.float32).tiny)

    def dictionary(self) -> Dictionary:
        """The dictionary so far, for outputs as the layer puts them out: unit rows in the decoder, no normalisation."""
        weights = {name: tensor.detach().cpu() for name, tensor in self.weights.items()}
        bias = self.mean.cpu() + weights["bias"] / self.scale
        jumps = self._activation == JUMPRELU
        tensors = Weights(
            weights["encoder"],
            weights["decoder"],
            encoder_bias=weights["encoder_bias"] / self.scale,
            decoder_bias=bias,
            input_bias=bias,
            threshold=weights["log_threshold"].exp() / self.scale if jumps else None,
        )
        return Dictionary(tensors, "threshold") if jumps else Dictionary(tensors, "topk", self._k)

    def state(self) -> dict[str, Any]:
        """All that a training needs to go on, on the CPU."""
        weights = {name: tensor.detach().cpu().clone() for name, tensor in self.weights.items()}
        return {"weights": weights, "adam": deepcopy(self._adam.state_dict()), "idle": self.idle.cpu().clone()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes back to a :meth:`state`."""
        with torch.no_grad():
            for name, tensor in self.weights.items():
                tensor.copy_(state["weights"][name])
        self._adam.load_state_dict(deepcopy(state["adam"]))
        self.idle = state["idle"].to(self.idle.device).clone()
