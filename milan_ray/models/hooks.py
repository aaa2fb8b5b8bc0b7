"""Reading a model's layers while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from milan_ray.errors import MilanError, unknown_name
from milan_ray.models.registry import OUTPUTS, Activations, ModelInput


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


def call(model: nn.Module, inputs: ModelInput) -> Any:
    """Runs a model on one tensor, several positional ones, or keyword arguments."""
    if isinstance(inputs, torch.Tensor):
        return model(inputs)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs)


def is_activation(module: nn.Module) -> bool:
    """Whether a module is an activation function: torch's own, or one of a library that keeps them in such a module."""
    home = type(module).__module__.rsplit(".", 1)[-1]
    return home.startswith("activation") and next(module.children(), None) is None


class LayerTap:
    """Collects the outputs of any number of layers in one forward pass.

    A module that runs several times in one forward pass shows its last output; one that puts out a tuple or dict shows
    the first tensor in it. Where an activation function follows a layer, its values can be meant in three ways:

    - ``seen``: the tensor that the module put out, as it is after the forward pass. This is what the reference
      keeps: where the function works in place (``features.N`` of torchvision's AlexNet, VGG, SqueezeNet) its
      result is seen, else the values before it.
    - ``pre``: what the module put out, copied before anything can change it.
    - ``post``: what came out of the activation module (``torch.nn.ReLU``, ``GELU``, …) that took the layer's output as
      it was. A layer whose output goes elsewhere (to a norm, or to a function that is no module) shows what is seen.

    Gradients and device are the caller's affair.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 5), nn.ReLU())
        >>> with LayerTap(model, ["0", "outputs"]) as tap:
        ...     {layer: tuple(output.shape) for layer, output in tap(torch.zeros(2, 3)).items()}
        {'0': (2, 5), 'outputs': (2, 5)}
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[str],
        hidden: Callable[[Any], torch.Tensor | None] | None = None,
        activations: Activations = "seen",
    ) -> None:
        """Finds the layers; hooks are set on entering the context.

        Args:
            model: The model.
            layers: Module paths.
            hidden: Takes the tensor out of what a layer puts out; None takes the first in it.
            activations: ``seen``, ``pre`` or ``post`` the activation function, see above.

        Raises:
            MilanError: A layer does not exist.
        """
        self._model, self._hidden, self._activations = model, hidden or first_tensor, activations
        self._modules = find_layers(model, layers)
        self._outputs: dict[str, object] = {}
        self._settled: dict[str, torch.Tensor] = {}  # values that are known before the pass is over
        self._awaited: dict[str, torch.Tensor | None] = {}  # outputs that no activation module has taken yet
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> LayerTap:
        for layer, module in self._modules.items():

            def keep(module: nn.Module, args: object, output: object, layer: str = layer) -> None:
                self._outputs[layer] = output
                tensor = self._hidden(output)
                if self._activations == "pre" and tensor is not None:
                    self._settled[layer] = tensor.clone()
                self._awaited[layer] = tensor

            self._handles.append(module.register_forward_hook(keep))
        if self._activations == "post":
            for module in filter(is_activation, self._model.modules()):
                self._handles.append(module.register_forward_hook(self._follow))
        return self

    def _follow(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        """Settles the layers whose output an activation module has just taken."""
        for layer, tensor in list(self._awaited.items()):
            if args and args[0] is tensor and self._modules[layer] is not module:
                result = first_tensor(output)
                assert result is not None
                self._settled[layer] = result
                del self._awaited[layer]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._forget()

    def __call__(self, inputs: ModelInput) -> dict[str, torch.Tensor]:
        """Runs the model once.

        Args:
            inputs: The model's input.

        Returns:
            Layer → output, in the order asked for.

        Raises:
            MilanError: A layer did not run, or put out no tensor.
        """
        self._forget()
        call(self._model, inputs)
        collected = {}
        for layer in self._modules:
            if layer not in self._outputs:
                raise MilanError(f"layer {layer!r} does not run in the model's forward pass: choose another layer.")
            tensor = self._settled[layer] if layer in self._settled else self._hidden(self._outputs[layer])
            if tensor is None:
                came = type(self._outputs[layer]).__name__
                raise MilanError(
                    f"layer {layer!r} puts out a {came} without a tensor in it: choose another layer, or register the "
                    "model with hidden=, a function that takes the tensor out."
                )
            collected[layer] = tensor
        self._forget()
        return collected

    def _forget(self) -> None:
        for kept in (self._outputs, self._settled, self._awaited):
            kept.clear()
