"""The registry of models: what can be dissected, by name."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from milan_ray.errors import MilanError, unknown_name
from milan_ray.models.layouts import UNSAID, Reading
from milan_ray.models.partial import accepting_parts, modules_in_need
from milan_ray.models.view import GENERATED, Preprocess
from milan_ray.models.weights import WeightsFile, load_weights
from milan_ray.names import checked_name
from milan_ray.progress import say

if TYPE_CHECKING:
    from milan_ray.models.features.sets import FeatureSet

ModelInput = torch.Tensor | Sequence[torch.Tensor] | Mapping[str, torch.Tensor]
"""One tensor, several positional ones, or keyword arguments."""

OUTPUTS = "outputs"
"""The layer name that stands for the model's own output."""

Activations = Literal["seen", "pre", "post"]

BUILDING = threading.RLock()
"""Lock held while a network is built, or a model of transformers read. Threads may do so at once, but factories
seed torch's global random generator, and transformers changes torch's default type and its own classes meanwhile: after
two at once, its models may tie no weights any more."""

TOKEN_BATCH = 32
"""Images per forward pass of vision transformers, as in the reference: their MLPs put out 617 MB for 128 images."""

_PARTS_SAID: set[tuple[str, str]] = set()

RANDOM = "random"
"""Replaces a weights file's path: untrained weights from seed 0, as a control. A factory may support or reject it."""


@dataclass(frozen=True)
class ModelSpec:
    """Description of a model.

    Attributes:
        name: Registered name, e.g. ``resnet18/imagenet``.
        factory: Builds the model with its weights, on the CPU; called once per process that needs it. Takes the path
            of a weights file, :data:`RANDOM`, or None for the model's own default.
        layers: Module paths dissected by default, in order; ``outputs`` is the model's own output.
        preprocess: View and normalisation of its inputs; for a generator, size and normalisation of its images.
        inputs: Converts uint8 views (B, H, W, 3), or with ``bands`` bands, into the model's input, for models that take
            something other than normalised RGB; None means ``preprocess``. For a generator: converts the probe's
            tensors, one argument each, into the model's input; None passes them on (the reference's
            ``transform_inputs``).
        images: Makes the model a generator: converts its output into images float (B, 3, H, W), normalised as in
            ``preprocess`` (the reference's ``transform_outputs``). People and encoders get these images as bytes.
        hidden: Extracts the tensor of units from a layer's output (``transform_hiddens``); None takes the first tensor
            in it.
        prefix_tokens: Tokens before the patches (CLS, registers) in the layers that have them; None where unknown, to
            be determined by :mod:`milan_ray.models.establish`.
        channels_last: Regular expression of the layers whose 4-d outputs are (B, H, W, U); None leaves it to be
            determined.
        reading: Declared axes of the layers, which override those that would be determined.
        activations: Which values of a layer count where an activation function follows it: ``seen``, ``pre`` or
            ``post``; see :class:`milan_ray.models.hooks.LayerTap`.
        max_batch: The most images per forward pass, for models with large layers; None for no limit.
        weights: Path of a weights file, or :data:`RANDOM`; None for the model's own.
        published: Its published weights by name, the default first; empty when the factory needs no file.
        classes: Names of the outputs, when known; ignored where their number differs from that of the outputs.
        bands: How many bands ``inputs`` takes; an image with another number is skipped. 3 takes RGB and drops alpha, 1
            takes grey. None takes RGB and refuses images with bands that would be lost.
        features: The feature sets among :attr:`layers`, by their names there.
    """

    name: str
    factory: Callable[[str | None], nn.Module]
    layers: tuple[str, ...]
    preprocess: Preprocess = field(default_factory=Preprocess)
    inputs: Callable[..., ModelInput] | None = None
    images: Callable[[Any], torch.Tensor] | None = None
    hidden: Callable[[Any], torch.Tensor] | None = None
    prefix_tokens: int | None = None
    channels_last: str | None = None
    reading: Reading = UNSAID
    activations: Activations = "seen"
    max_batch: int | None = None
    weights: str | None = None
    published: Mapping[str, WeightsFile] = field(default_factory=dict)
    classes: tuple[str, ...] | None = None
    bands: int | None = None
    features: Mapping[str, FeatureSet] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.bands is None:
            return
        if self.bands < 1:
            raise MilanError(f"{self.name} is registered with bands={self.bands}: give a number of at least 1.")
        if self.inputs is None or self.images is not None:
            raise MilanError(
                f"{self.name} is registered with bands={self.bands}: that is for models with inputs=, a function that "
                "turns views of so many bands into the model's input."
            )

    @property
    def view_shape(self) -> tuple[int, int, int]:
        """(height, width, bands) of the views that :meth:`prepare` takes."""
        return (*self.preprocess.view.shape, self.bands or 3)

    def load(self, parts: bool = False) -> nn.Module:
        """Builds the model, in eval mode and without gradients.

        Args:
            parts: Whether its file may lack weights that none of :attr:`layers` needs; these are NaN then.

        Raises:
            MilanError: Its weights are missing or do not fit, or its factory failed.
        """
        weights = self.weights
        if weights is None and self.published:
            weights = next(iter(self.published.values())).find()
        with BUILDING, blaming(f"model {self.name} cannot be built"):
            with accepting_parts(parts and self.images is None) as lacking:
                network = self.factory(weights).eval()
            for file, names in lacking.items():
                self._check_part(network, file, names)
            for parameter in network.parameters():  # TorchScript cannot do so by itself
                if not nn.parameter.is_lazy(parameter):  # rejected later, when it is examined
                    parameter.requires_grad_(False)
            return network

    def _check_part(self, network: nn.Module, file: str, missing: list[str]) -> None:
        """Reports which weights a file lacks, and refuses layers that need them."""
        inputs = self.prepare(torch.zeros(1, *self.view_shape, dtype=torch.uint8))
        inputs = (inputs,) if isinstance(inputs, torch.Tensor) else inputs
        run = partial(network, **inputs) if isinstance(inputs, Mapping) else partial(network, *inputs)
        needy = [path or OUTPUTS for path in modules_in_need(network, run)]
        lacks = f"weights file {file} lacks {len(missing)} weights of {self.name} (first: {', '.join(missing[:3])})"
        refused = [layer for layer in self.layers if re.sub(r"@\d+$", "", self.base(layer)) in needy]
        if refused:
            raise MilanError(
                f"{lacks}, which layer {', '.join(refused)} needs: choose other layers with --layers, or give a file "
                "of the whole network."
            )
        if (self.name, file) not in _PARTS_SAID:
            _PARTS_SAID.add((self.name, file))
            say(f"{lacks}: layers that need them cannot be dissected ({', '.join(needy)})")

    def batch(self, wanted: int) -> int:
        """Images per forward pass: the wanted number, limited by :attr:`max_batch`."""
        return min(wanted, self.max_batch or wanted)

    def prepare(self, *tensors: torch.Tensor) -> ModelInput:
        """Makes model inputs from uint8 views (B, *:attr:`view_shape`), or from a generator's latents, each (B, …)."""
        if self.inputs is not None:
            return self.inputs(*tensors)
        return tensors if self.images is not None else self.preprocess(*tensors)

    def base(self, layer: str) -> str:
        """The module path of a layer: of a feature set, the layer that it reads."""
        return self.features[layer].layer if layer in self.features else layer

    def is_channels_last(self, layer: str) -> bool:
        """Whether the model declares that a layer's 4-d outputs are (B, H, W, U)."""
        return self.channels_last is not None and re.fullmatch(self.channels_last, layer) is not None


def build_seeded(make: Callable[[], nn.Module], weights: str | None) -> nn.Module:
    """Builds a network from seed 0 and loads a weights file, if there is one; leaves torch's random state as it was.

    Args:
        make: Builds the network, untrained.
        weights: Path of a weights file; :data:`RANDOM` or None for untrained weights.

    Raises:
        MilanError: The file is missing or does not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make()
    if weights is not None and weights != RANDOM:
        load_weights(model, weights, parts=True)
    return model


@contextmanager
def blaming(what: str) -> Iterator[None]:
    """Converts any exception of a network, or of code that comes with it, into a MilanError.

    Args:
        what: What went wrong: the start of the message.

    Raises:
        MilanError: In place of any other error.
    """
    try:
        yield
    except MilanError:
        raise
    except Exception as error:  # a user's code may raise anything
        text = " ".join(str(error).split())
        raise MilanError(f"{what}: {type(error).__name__}{f': {text}' if text else ''}") from error


def source_of(function: Callable[..., Any] | None) -> str:
    """Identifies a user's function in configuration hashes by its source, so that an edit leads to new results."""
    if isinstance(function, partial):
        return f"{source_of(function.func)} {function.args} {function.keywords}"
    try:
        return inspect.getsource(function) if function is not None else ""
    except (OSError, TypeError):  # built-in, or a callable object
        return f"{type(function).__module__}.{getattr(function, '__qualname__', type(function).__qualname__)}"


_MODELS: dict[str, ModelSpec] = {}
_LATER: list[str] = []
_IMPORTING = threading.RLock()
_FAMILIES: dict[str, tuple[Callable[[str], ModelSpec], str]] = {}


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
        preprocess: View and normalisation; the default is ImageNet's, or :data:`GENERATED` for generators.
        **options: Further fields of :class:`ModelSpec`; ``batch_axis``, ``units_axis`` and ``grid`` are those of its
            ``reading`` (docs/layouts.md).
    """
    checked_name("a model", name, slashes=True)
    reading = {field: options.pop(field) for field in ("batch_axis", "units_axis", "grid") if field in options}
    if reading:
        options["reading"] = Reading(**reading)  # type: ignore[arg-type]
    if preprocess is None:
        preprocess = GENERATED if options.get("images") else Preprocess()
    spec = ModelSpec(name, factory, tuple(layers), preprocess, **options)  # type: ignore[arg-type]
    _MODELS[name] = spec
    return spec


def register_family(prefix: str, resolve: Callable[[str], ModelSpec], about: str) -> None:
    """Registers a family of models that is too large to list: ``resolve(rest)`` describes ``prefix/rest``.

    Args:
        prefix: First part of the names.
        resolve: Describes one of the models; raises a MilanError when it cannot.
        about: One line for the list of models.
    """
    _FAMILIES[prefix] = (resolve, about)


def register_later(module: str) -> None:
    """Defers the import of a module of models until a name is looked up that is not registered.

    This is for networks of a library that takes long to import: workers on other models never import it.

    Args:
        module: The module's name. Importing it calls ``register_model``; names that are registered by then keep their
            models.
    """
    if module not in sys.modules and module not in _LATER:
        _LATER.append(module)


def _register_now() -> None:
    """Imports the deferred modules."""
    with _IMPORTING:
        while _LATER:
            taken = dict(_MODELS)
            importlib.import_module(_LATER[0])
            _MODELS.update(taken)
            _LATER.pop(0)


def get_model(name: str) -> ModelSpec:
    """Finds a registered model, or one of a registered family.

    Raises:
        MilanError: No model has that name; the message names the nearest.
    """
    if name in _MODELS:
        return _MODELS[name]
    prefix, _, rest = name.partition("/")
    if prefix in _FAMILIES and rest:
        with blaming(f"model {name} cannot be described"):
            return _FAMILIES[prefix][0](rest)
    _register_now()
    if name in _MODELS:
        return _MODELS[name]
    raise unknown_name("model", name, _MODELS, "`python -m jobs.models` lists them all.")


def match_models(pattern: str) -> list[str]:
    """Finds the models that a name or a pattern matches.

    A registered name matches itself. A pattern (``*``, ``?``, ``[…]``) with a ``/`` is compared with whole names, a
    pattern without one with the part after the ``/``: ``imagenet`` matches every ``…/imagenet``, ``resnet*/imagenet``
    the ResNets.

    Args:
        pattern: Name or pattern.

    Returns:
        Names, sorted.

    Raises:
        MilanError: No name matches; the message names the nearest.
    """
    if pattern in _MODELS:
        return [pattern]
    whole = "/" in pattern
    names = [name for name in model_names() if fnmatchcase(name if whole else name.partition("/")[2] or name, pattern)]
    return names or [get_model(pattern).name]


def model_names() -> list[str]:
    """All registered names, sorted."""
    _register_now()
    return sorted(_MODELS)


def family_names() -> dict[str, str]:
    """The registered families: prefix → one line about it."""
    return {prefix: about for prefix, (_, about) in sorted(_FAMILIES.items())}
