"""The registry of models: what can be dissected, by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from milan_ray.errors import unknown_name
from milan_ray.models.units import unit_maps
from milan_ray.models.view import Preprocess

OUTPUTS = "outputs"
"""The layer name that stands for the model's own output."""

RANDOM = "random"
"""In place of a weights file: untrained weights from seed 0, the control. A factory may support it or refuse."""


@dataclass(frozen=True)
class ModelSpec:
    """A model as the system knows it.

    Attributes:
        name: Registered name, e.g. ``resnet18/imagenet``.
        factory: Builds the model with its weights, on the CPU; called once per process that needs it. Takes the path
            of a weights file, :data:`RANDOM`, or None for the model's own default.
        layers: Module paths dissected by default, in order; ``outputs`` is the model's own output.
        preprocess: View and normalisation of its inputs.
        inputs: Turns uint8 views (B, H, W, 3) into the model's input for models that take something else than
            normalised RGB; None means ``preprocess``.
        prefix_tokens: Tokens before the patches (CLS, registers) in (B, T, C) layers; None finds the smallest count
            that leaves a square grid.
        channels_last: Regular expression of the layers whose 4-d outputs are (B, H, W, U); None when there are none.
        weights: Path of a weights file, or :data:`RANDOM`; None for the factory's own.
        find_weights: For models whose own weights are a file that may be absent: ``find_weights(download)`` gives its
            path, fetching it only when told to.
        classes: Names of the outputs, when known; not meant where their number differs.
    """

    name: str
    factory: Callable[[str | None], nn.Module]
    layers: tuple[str, ...]
    preprocess: Preprocess = field(default_factory=Preprocess)
    inputs: Callable[[torch.Tensor], torch.Tensor] | None = None
    prefix_tokens: int | None = None
    channels_last: str | None = None
    weights: str | None = None
    find_weights: Callable[[bool], str] | None = None
    classes: tuple[str, ...] | None = None

    def load(self) -> nn.Module:
        """Builds the model, in eval mode and without gradients."""
        model = self.factory(self.weights)
        return model.eval().requires_grad_(False)

    def prepare(self, views: torch.Tensor) -> torch.Tensor:
        """Model inputs from uint8 views (B, H, W, 3)."""
        return (self.inputs or self.preprocess)(views)

    def unit_maps(self, layer: str, output: torch.Tensor) -> torch.Tensor:
        """A layer's output as one map per unit, (B, U, H, W); see :func:`milan_ray.models.units.unit_maps`."""
        channels_last = self.channels_last is not None and re.fullmatch(self.channels_last, layer) is not None
        return unit_maps(output, self.prefix_tokens, channels_last=channels_last, layer=f"layer {layer!r}")


_MODELS: dict[str, ModelSpec] = {}


def register_model(
    name: str,
    factory: Callable[[str | None], nn.Module],
    layers: tuple[str, ...] | list[str],
    preprocess: Preprocess | None = None,
    **options: object,
) -> ModelSpec:
    """Registers a model under a name; a later registration of the same name replaces it.

    Args:
        name: Name used on the command line and in every table.
        factory: ``factory(weights_path_or_None) -> nn.Module``.
        layers: Module paths dissected by default.
        preprocess: View and normalisation; ImageNet's when left out.
        **options: Further fields of :class:`ModelSpec`.
    """
    spec = ModelSpec(name, factory, tuple(layers), preprocess or Preprocess(), **options)  # type: ignore[arg-type]
    _MODELS[name] = spec
    return spec


def get_model(name: str) -> ModelSpec:
    """Finds a registered model.

    Raises:
        MilanError: No model of that name; the text names the nearest.
    """
    if name not in _MODELS:
        raise unknown_name("model", name, _MODELS, "`python -m jobs.models` lists them all.")
    return _MODELS[name]


def model_names() -> list[str]:
    """All registered names, sorted."""
    return sorted(_MODELS)
