"""Reads the outputs of a model's layers during a forward pass."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from milan_ray.errors import MilanError, unknown_name
from milan_ray.models.in_place import Watch
from milan_ray.models.registry import OUTPUTS, Activations, ModelInput

OWN_OUTPUT = "@outputs"
"""Name of the model's own output in a model with a module called :data:`~milan_ray.models.registry.OUTPUTS`."""

_CALL = re.compile(r"(.+)@(\d+)")
_WRAPPERS = ("_orig_mod", "module")  # torch.compile's, and those of (distributed) data parallelism


def unwrap(model: nn.Module) -> nn.Module:
    """The network inside ``torch.compile`` and data parallelism, where modules have their usual names."""
    while True:
        if isinstance(model, torch._dynamo.eval_frame.OptimizedModule if _compiles() else ()):
            model = model.get_submodule(_WRAPPERS[0])
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.get_submodule(_WRAPPERS[1])
        else:
            return model


def _compiles() -> bool:
    """Whether anything may have been compiled; avoids importing torch's compiler, which takes seconds."""
    return "torch._dynamo" in sys.modules


@contextmanager
def eagerly() -> Iterator[None]:
    """Runs compiled modules eagerly inside the context, because hooks do not work on compiled ones."""
    if not _compiles():
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """All modules by path, the model itself last as :data:`~milan_ray.models.registry.OUTPUTS`.

    A model with a module of that name has its own output as :data:`OWN_OUTPUT`.
    """
    modules = dict(unwrap(model).named_modules(remove_duplicate=False))
    own = modules.pop("")
    modules[OWN_OUTPUT if OUTPUTS in modules else OUTPUTS] = own
    return modules


@dataclass(frozen=True)
class Place:
    """Where a layer's values come from.

    Attributes:
        module: The module.
        call: Which of its calls in a forward pass, counted from 1; None for the last.
    """

    module: nn.Module
    call: int | None = None


def find_places(model: nn.Module, layers: Iterable[str]) -> dict[str, Place]:
    """Finds layers by name.

    Args:
        model: The model.
        layers: Module paths, with or without ``@n`` for the n-th call of a module that runs several times;
            :data:`~milan_ray.models.registry.OUTPUTS` is the model itself.

    Returns:
        Name → place, in the order asked for.

    Raises:
        MilanError: There is no such module (the message names the nearest), or hooks cannot observe its calls.
    """
    modules = named_layers(model)
    places: dict[str, Place] = {}
    for layer in layers:
        match = None if layer in modules else _CALL.fullmatch(layer)
        path, call = (match[1], int(match[2])) if match else (layer, None)
        if layer == OWN_OUTPUT and OUTPUTS in modules and OWN_OUTPUT not in modules:
            path = OUTPUTS
        if path not in modules or call == 0:
            raise unknown_name("layer", layer, modules, "`python -m jobs.models MODEL` lists a model's layers.")
        module = modules[path]
        if isinstance(module, torch.jit.ScriptModule) and module is not modules.get(OUTPUTS):
            raise MilanError(
                f"layer {layer!r} is inside a TorchScript module, whose layers cannot be read while it runs: give the "
                "network as Python code, with its weights from script.state_dict()."
            )
        places[layer] = Place(module, call)
    return places


def find_layers(model: nn.Module, layers: Iterable[str]) -> dict[str, nn.Module]:
    """The modules of :func:`find_places`: name → module, in the order asked for.

    Raises:
        MilanError: There is no such module; the message names the nearest.
    """
    return {layer: place.module for layer, place in find_places(model, layers).items()}


def tensors(output: object) -> list[torch.Tensor]:
    """All tensors in a module's output: itself, or those in a (nested) tuple, list or dict."""
    if isinstance(output, torch.Tensor):
        return [output]
    members: Iterable[object] = ()
    if isinstance(output, Mapping):
        members = output.values()
    elif isinstance(output, (tuple, list)):
        members = output
    return [tensor for member in members for tensor in tensors(member)]


def mapped(output: object, function: Callable[[torch.Tensor], torch.Tensor]) -> object:
    """A module's output with every tensor in it replaced by a function of it."""
    if isinstance(output, torch.Tensor):
        return function(output)
    if isinstance(output, Mapping):
        return type(output)({key: mapped(value, function) for key, value in output.items()})  # type: ignore[call-arg]
    if isinstance(output, (tuple, list)):
        members: list[Any] = [mapped(value, function) for value in output]
        return type(output)(*members) if hasattr(output, "_fields") else type(output)(members)
    return output


def first_tensor(output: object) -> torch.Tensor | None:
    """The first tensor of a module's output: itself, or the first in a (nested) tuple, list or dict; None without."""
    return next(iter(tensors(output)), None)


def call(model: nn.Module, inputs: ModelInput) -> Any:
    """Runs a model on one tensor, several positional ones, or keyword arguments; compiled modules run eagerly."""
    with eagerly():
        if isinstance(inputs, torch.Tensor):
            return model(inputs)
        if isinstance(inputs, Mapping):
            return model(**inputs)
        return model(*inputs)


def no_activations(tensor: torch.Tensor) -> str | None:
    """Describes what a tensor holds, where that cannot be activations; None where it can."""
    if torch._C._functorch.is_batchedtensor(tensor):
        return "one image's values at a time (torch.vmap)"
    if tensor.is_nested or tensor.layout != torch.strided:
        return "a nested tensor" if tensor.is_nested else "a sparse tensor"
    if tensor.is_complex():
        return "complex numbers"
    if not (tensor.is_floating_point() or tensor.is_quantized):
        return "truth values" if tensor.dtype == torch.bool else "whole numbers (indices, labels or counts)"
    return None


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Removes hooks when the context ends."""
    with ExitStack() as stack:
        for handle in handles:
            stack.enter_context(handle)
        yield


def is_activation(module: nn.Module) -> bool:
    """Whether a module is an activation function: torch's own, or one from a library's module named ``activation…``."""
    home = type(module).__module__.rsplit(".", 1)[-1]
    return home.startswith("activation") and next(module.children(), None) is None


class LayerTap:
    """Collects the outputs of any number of layers in one forward pass.

    For a module that runs several times in one forward pass, the last output counts, or the n-th as ``path@n``. In an
    output that is a tuple or dict, the first tensor counts. Where an activation function follows a layer, there are
    three choices of values:

    - ``seen``: the module's output tensor, as it is after the forward pass. This is what the reference keeps: where the
      function works in place (``features.N`` of torchvision's AlexNet, VGG, SqueezeNet), its result, else the values
      before it.
    - ``pre``: the module's output, copied before anything can change it.
    - ``post``: the output of the activation module (``torch.nn.ReLU``, ``GELU``, …) that directly takes the layer's
      output. For a layer whose output goes elsewhere (to a norm, or to a function that is not a module), the same as
      ``seen``.

    The caller controls gradients and device.

    Attributes:
        calls: Layer → how often its module ran in the last forward pass.
        counts: Layer → number of tensors in its output, of which the first counts.
        missing: Layer → why it has no values in the last forward pass.
        changed: With ``watch``: layer → how its output was changed later in the pass; see :class:`Watch`.

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
        lenient: bool = False,
        watch: bool = False,
    ) -> None:
        """Finds the layers; hooks are set on entering the context.

        Args:
            model: The model.
            layers: Module paths.
            hidden: Extracts the tensor from a layer's output; None takes the first tensor in it.
            activations: ``seen``, ``pre`` or ``post``, see above.
            lenient: Whether a layer that does not run or puts out no tensor is left out and recorded in ``missing``,
                instead of an error.
            watch: Whether to detect later changes of outputs; this takes a copy of each output.

        Raises:
            MilanError: A layer does not exist.
        """
        self._lenient = lenient
        self.missing: dict[str, str] = {}
        self.counts: dict[str, int] = {}
        self.changed: dict[str, str] = {}
        self._watch = Watch() if watch else None
        self._model, self._hidden, self._activations = unwrap(model), hidden or first_tensor, activations
        self._places = find_places(model, layers)
        self.calls: Counter[str] = Counter()
        self._outputs: dict[str, object] = {}
        self._settled: dict[str, torch.Tensor] = {}  # values that are final before the pass ends
        self._awaited: dict[str, torch.Tensor | None] = {}  # outputs that no activation module has taken yet
        self._handles: list[RemovableHandle] = []
        self._own: list[Callable[[nn.Module, object, object], None]] = []  # what hooks on a TorchScript module would do

    def __enter__(self) -> LayerTap:
        for layer, place in self._places.items():

            def keep(module: nn.Module, args: object, output: object, layer: str = layer, place: Place = place) -> None:
                self.calls[layer] += 1
                if place.call not in (None, self.calls[layer]):
                    return
                self._outputs[layer] = output
                self._settled.pop(layer, None)  # from an earlier call
                tensor = self._hidden(output)
                if self._activations == "pre" and tensor is not None:
                    self._settled[layer] = tensor = tensor.clone()
                self._awaited[layer] = tensor
                if self._watch is not None and tensor is not None and no_activations(tensor) is None:
                    self._watch.see(layer, tensor)

            if isinstance(place.module, torch.jit.ScriptModule):  # the model itself, which takes no hooks
                self._own.append(keep)
            else:
                self._handles.append(place.module.register_forward_hook(keep))
        for module in filter(is_activation, self._model.modules()):
            if self._activations == "post":
                self._handles.append(module.register_forward_hook(self._follow))
            if self._watch is not None:
                self._handles.append(module.register_forward_hook(self._watch.activated))
        return self

    def _follow(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        """Stores an activation module's result for the layers whose output it takes."""
        for layer, tensor in list(self._awaited.items()):
            if args and args[0] is tensor and self._places[layer].module is not module:
                result = first_tensor(output)
                assert result is not None
                self._settled[layer] = result
                del self._awaited[layer]
                if self._watch is not None and no_activations(result) is None:
                    self._watch.see(layer, result)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._own.clear()
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
        self.calls.clear()
        result = call(self._model, inputs)
        for keep in self._own:
            keep(self._model, (), result)
        collected = {}
        self.missing, self.counts = {}, {}
        self.changed = {} if self._watch is None else self._watch.changed()
        for layer in self._places:
            tensor = self._collect(layer)
            if isinstance(tensor, str):
                self.missing[layer] = tensor
            else:
                tensor = tensor.detach() if tensor.requires_grad else tensor  # an output that is a parameter
                collected[layer] = tensor.dequantize() if tensor.is_quantized else tensor
                self.counts[layer] = len(tensors(self._outputs[layer])) if self._hidden is first_tensor else 1
        self._forget()
        if self.missing and not self._lenient:
            raise MilanError(next(iter(self.missing.values())))
        return collected

    def _collect(self, layer: str) -> torch.Tensor | str:
        """A layer's output in the finished pass, or a message that explains why there is none."""
        if layer not in self._outputs:
            often = self.calls[layer]
            why = f"runs {often} times" if often else "does not run"
            return f"layer {layer!r} {why} in the model's forward pass{self._itself(layer)}: choose another layer."
        tensor = self._settled[layer] if layer in self._settled else self._hidden(self._outputs[layer])
        if tensor is None:
            came = type(self._outputs[layer]).__name__
            return (
                f"layer {layer!r} puts out a {came} without a tensor in it: choose another layer, or register the "
                "model with hidden=, a function that takes the tensor out."
            )
        if (holds := no_activations(tensor)) is not None:
            return (
                f"layer {layer!r} puts out {holds}, from which no activations can be read: choose another layer, or "
                "register the model with hidden=, a function that makes activations of what a layer puts out."
            )
        return tensor

    def _itself(self, layer: str) -> str:
        """For a layer with weights that does not run: the module that may use these weights; else an empty text."""
        modules, parent = named_layers(self._model), layer.partition("@")[0].rpartition(".")[0]
        weights = next(self._places[layer].module.parameters(), None)
        if self.calls[layer] or parent not in modules or weights is None:
            return ""
        sure = isinstance(modules[parent], nn.MultiheadAttention)
        return f" ({parent!r} around it {'computes it itself' if sure else 'may compute it itself: try that one'})"

    def _forget(self) -> None:
        for kept in (self._outputs, self._settled, self._awaited):
            kept.clear()
        if self._watch is not None:
            self._watch.forget()
