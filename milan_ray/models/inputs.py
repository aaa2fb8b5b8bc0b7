"""Prepares a network's inputs: their number type, and whether images must run one at a time."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from milan_ray.errors import MilanError
from milan_ray.models.registry import ModelInput, ModelSpec


def runs_alone(model: nn.Module) -> bool:
    """Whether images must run one by one: dynamic quantisation scales activations by the whole batch."""
    return any("quantized.dynamic" in type(module).__module__ for module in model.modules())


def model_dtype(model: nn.Module) -> torch.dtype:
    """The floating-point type that a model computes in: that of its first such parameter or buffer, else float32."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)


def computes_in(model: nn.Module) -> torch.dtype:
    """The least precise floating-point type among a model's weights, which limits the precision of its values."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    types = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    quantized = any(".quantized." in f"{type(module).__module__}." for module in model.modules())
    return torch.bfloat16 if quantized else max(types, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


def check_network(name: str, model: nn.Module) -> None:
    """Checks that a network's weights hold values.

    Raises:
        MilanError: Some are on the meta device, or belong to lazy modules that have not run yet.
    """
    for path, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise MilanError(
                f"{name} has lazy modules whose weights are not there yet (first: {path!r}): run it once on a batch of "
                "its inputs where it is made, and load its weights after that."
            )
        if tensor.is_meta:
            raise MilanError(
                f"{name} has weights without numbers, on the meta device (first: {path!r}): load them "
                "(to_empty(device=…), then load_state_dict), or build it without torch.device('meta')."
            )


def fitted(inputs: ModelInput, dtype: torch.dtype) -> ModelInput:
    """Converts floating-point inputs to the type that the model computes in."""
    if dtype == torch.float32:
        return inputs

    def fit(tensor: Any) -> Any:
        return tensor.to(dtype) if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() else tensor

    if isinstance(inputs, torch.Tensor):
        return fit(inputs)
    if isinstance(inputs, Mapping):
        return {name: fit(tensor) for name, tensor in inputs.items()}
    return [fit(tensor) for tensor in inputs]


def prepare(spec: ModelSpec, model: nn.Module, *tensors: torch.Tensor) -> ModelInput:
    """Makes a model's inputs from uint8 views (B, H, W, 3) or a generator's latents, in the model's number type."""
    return fitted(spec.prepare(*tensors), model_dtype(model))
