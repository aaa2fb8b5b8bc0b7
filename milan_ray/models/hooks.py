"""Reading a model's layers while it runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from milan_ray.errors import MilanError, unknown_name
from milan_ray.models.registry import OUTPUTS

ModelInput = torch.Tensor | Sequence[torch.Tensor] | Mapping[str, torch.Tensor]
"""One tensor, several positional ones, or keyword arguments."""


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """All modules by path, the model itself last as :data:`~milan_ray.models.registry.OUTPUTS`."""
    modules = dict(model.named_modules(remove_duplicate=False))
    modules[OUTPUTS] = modules.pop("")
    return modules


def find_layers(model: nn.Module, layers: Iterable[str]) -> dict[str, nn.Module]:
    """Finds modules by path.

    Args:
        model: The model.
        layers: Module paths; :data:`~milan_ray.models.registry.OUTPUTS` is the model itself.

    Returns:
        Path → module, in the order asked for.

    Raises:
        MilanError: There is no such module; the text names the nearest.
    """
    modules = named_layers(model)
    layers = list(layers)
    for layer in layers:
        if layer not in modules:
            raise unknown_name("layer", layer, modules, "`python -m jobs.models MODEL` lists a model's layers.")
    return {layer: modules[layer] for layer in layers}


def first_tensor(output: object) -> torch.Tensor | None:
    """The first tensor of a module's output: itself, or the first in a (nested) tuple, list or dict; None without."""
    if isinstance(output, torch.Tensor):
        return output
    members: Iterable[object] = ()
    if isinstance(output, Mapping):
        members = output.values()
    elif isinstance(output, (tuple, list)):
        members = output
    return next((tensor for tensor in map(first_tensor, members) if tensor is not None), None)


class LayerTap:
    """Collects the outputs of any number of layers in one forward pass.

    The tensor kept is the module's own output, not a copy, as the reference keeps it (REFERENCE §1.1): where an
    in-place operation follows (``features.N`` of torchvision's AlexNet, VGG, SqueezeNet), its result is what is seen,
    i.e. the activations after the ReLU. A module that runs several times in one forward pass shows its last output;
    one that puts out a tuple or dict shows the first tensor in it.

    Gradients and device are the caller's affair.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 5), nn.ReLU())
        >>> with LayerTap(model, ["0", "outputs"]) as tap:
        ...     {layer: tuple(output.shape) for layer, output in tap(torch.zeros(2, 3)).items()}
        {'0': (2, 5), 'outputs': (2, 5)}
    """

    def __init__(self, model: nn.Module, layers: Iterable[str]) -> None:
        """Finds the layers; hooks are set on entering the context.

        Raises:
            MilanError: A layer does not exist.
        """
        self._model = model
        self._modules = find_layers(model, layers)
        self._outputs: dict[str, object] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> LayerTap:
        for layer, module in self._modules.items():

            def keep(module: nn.Module, args: object, output: object, layer: str = layer) -> None:
                self._outputs[layer] = output

            self._handles.append(module.register_forward_hook(keep))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._outputs.clear()

    def __call__(self, inputs: ModelInput) -> dict[str, torch.Tensor]:
        """Runs the model once.

        Args:
            inputs: The model's input.

        Returns:
            Layer → output, in the order asked for.

        Raises:
            MilanError: A layer did not run, or put out no tensor.
        """
        self._outputs.clear()
        if isinstance(inputs, torch.Tensor):
            self._model(inputs)
        elif isinstance(inputs, Mapping):
            self._model(**inputs)
        else:
            self._model(*inputs)
        collected = {}
        for layer in self._modules:
            if layer not in self._outputs:
                raise MilanError(f"layer {layer!r} does not run in the model's forward pass: choose another layer.")
            tensor = first_tensor(self._outputs[layer])
            if tensor is None:
                came = type(self._outputs[layer]).__name__
                raise MilanError(f"layer {layer!r} puts out a {came} without a tensor in it: choose another layer.")
            collected[layer] = tensor
        self._outputs.clear()
        return collected
