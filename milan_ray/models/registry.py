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
from typing import Any, Literal

import torch
from torch import nn

from milan_ray.errors import MilanError, unknown_name
from milan_ray.models.layouts import UNSAID, Reading
from milan_ray.models.view import GENERATED, Preprocess
from milan_ray.models.weights import WeightsFile
from milan_ray.names import checked_name

ModelInput = torch.Tensor | Sequence[torch.Tensor] | Mapping[str, torch.Tensor]
"""One tensor, several positional ones, or keyword arguments."""

OUTPUTS = "outputs"
"""The layer name that stands for the model's own output."""

Activations = Literal["seen", "pre", "post"]

BUILDING = threading.RLock()
"""Held while a network is built: factories seed torch's one random generator, and threads may want networks at once."""

TOKEN_BATCH = 32
"""Images per forward pass of vision transformers, as the reference's: their MLPs put out 617 MB for 128 images."""

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
        preprocess: View and normalisation of its inputs; of a generator, size and normalisation of its images.
        inputs: Turns uint8 views (B, H, W, 3), or of ``bands`` bands, into the model's input for models that take
            something else than normalised RGB; None means ``preprocess``. Of a generator: turns the probe's tensors,
            as so many arguments, into the model's input; None passes them on (the reference's ``transform_inputs``).
        images: Makes the model a generator: its output → images float (B, 3, H, W), normalised as ``preprocess`` says
            (the reference's ``transform_outputs``); their bytes are what people and encoders see.
        hidden: Takes the tensor of units out of what a layer puts out (``transform_hiddens``); None takes the first
            tensor in it.
        prefix_tokens: Tokens before the patches (CLS, registers) in the layers that have them; None where that is not
            known, so that it is found out (:mod:`milan_ray.models.establish`).
        channels_last: Regular expression of the layers whose 4-d outputs are (B, H, W, U); None leaves it to be found
            out.
        reading: What is said of the layers' axes and overrides what would be found out.
        activations: Which values of a layer count where an activation function follows it: ``seen``, ``pre`` or
            ``post``; see :class:`milan_ray.models.hooks.LayerTap`.
        max_batch: The most images per forward pass, for models with large layers; None for no limit.
        weights: Path of a weights file, or :data:`RANDOM`; None for the model's own.
        published: Its published weights by name, the default first; empty when the factory needs no file.
        classes: Names of the outputs, when known; not meant where their number differs.
        bands: How many bands ``inputs`` takes; an image with another number is skipped. 3 takes RGB and drops alpha, 1
            takes grey. None takes RGB and refuses images with bands that would be lost.
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

    def load(self) -> nn.Module:
        """Builds the model, in eval mode and without gradients.

        Raises:
            MilanError: Its weights are missing or do not fit, or its factory failed.
        """
        weights = self.weights
        if weights is None and self.published:
            weights = next(iter(self.published.values())).find()
        with BUILDING, blaming(f"model {self.name} cannot be built"):
            network = self.factory(weights).eval()
            for parameter in network.parameters():  # TorchScript cannot do so by itself
                if not nn.parameter.is_lazy(parameter):  # refused where it is looked at
                    parameter.requires_grad_(False)
            return network

    def batch(self, wanted: int) -> int:
        """Images per forward pass, as far as the model allows."""
        return min(wanted, self.max_batch or wanted)

    def prepare(self, *tensors: torch.Tensor) -> ModelInput:
        """Model inputs from uint8 views (B, *:attr:`view_shape`), or from a generator's latents, each (B, …)."""
        if self.inputs is not None:
            return self.inputs(*tensors)
        return tensors if self.images is not None else self.preprocess(*tensors)

    def is_channels_last(self, layer: str) -> bool:
        """Whether the model says that a layer's 4-d outputs are (B, H, W, U)."""
        return self.channels_last is not None and re.fullmatch(self.channels_last, layer) is not None


@contextmanager
def blaming(what: str) -> Iterator[None]:
    """Makes one sentence of whatever a network, or code that comes with it, raises.

    Args:
        what: What went wrong, to begin the sentence with.

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
    """What a user's function is, for configuration hashes: its source, so that an edited one makes its results anew."""
    if isinstance(function, partial):
        return f"{source_of(function.func)} {function.args} {function.keywords}"
    try:
        return inspect.getsource(function) if function is not None else ""
    except (OSError, TypeError):  # built in, or an object that can be called
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
        preprocess: View and normalisation; ImageNet's when left out, of generators :data:`GENERATED`.
        **options: Further fields of :class:`ModelSpec`; ``batch_axis``, ``units_axis`` and ``grid`` are those of its
            ``reading`` (docs/layouts.md).
    """
    checked_name("a model", name, slashes=True)
    said = {field: options.pop(field) for field in ("batch_axis", "units_axis", "grid") if field in options}
    if said:
        options["reading"] = Reading(**said)  # type: ignore[arg-type]
    if preprocess is None:
        preprocess = GENERATED if options.get("images") else Preprocess()
    spec = ModelSpec(name, factory, tuple(layers), preprocess, **options)  # type: ignore[arg-type]
    _MODELS[name] = spec
    return spec


def register_family(prefix: str, resolve: Callable[[str], ModelSpec], about: str) -> None:
    """Registers models too many to list: every name ``prefix/rest`` is ``resolve(rest)``.

    Args:
        prefix: First part of the names.
        resolve: Describes one of them; raises a MilanError when it cannot.
        about: One line for the list of models.
    """
    _FAMILIES[prefix] = (resolve, about)


def register_later(module: str) -> None:
    """Leaves the models of a module aside until one is asked for that nobody else has registered.

    For networks of a library that takes long to import: workers on other models never need it.

    Args:
        module: Its name. Importing it calls ``register_model``; names that are taken by then stay as they are.
    """
    if module not in sys.modules and module not in _LATER:
        _LATER.append(module)


def _register_now() -> None:
    """Imports what was left aside."""
    with _IMPORTING:
        while _LATER:
            taken = dict(_MODELS)
            importlib.import_module(_LATER[0])
            _MODELS.update(taken)
            _LATER.pop(0)


def get_model(name: str) -> ModelSpec:
    """Finds a registered model, or one of a registered family.

    Raises:
        MilanError: No model of that name; the text names the nearest.
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
    """The models that a name or a pattern means.

    A registered name means itself. A pattern (``*``, ``?``, ``[…]``) with a ``/`` is compared with whole names, one
    without with what follows their ``/``: ``imagenet`` means every ``…/imagenet``, ``resnet*/imagenet`` the ResNets.

    Args:
        pattern: Name or pattern.

    Returns:
        Names, sorted.

    Raises:
        MilanError: Nothing is meant by it; the text names the nearest.
    """
    if pattern in _MODELS:
        return [pattern]
    whole = "/" in pattern
    found = [name for name in model_names() if fnmatchcase(name if whole else name.partition("/")[2] or name, pattern)]
    return found or [get_model(pattern).name]


def model_names() -> list[str]:
    """All registered names, sorted."""
    _register_now()
    return sorted(_MODELS)


def family_names() -> dict[str, str]:
    """What :func:`register_family` registered: prefix → one line about it."""
    return {prefix: about for prefix, (_, about) in sorted(_FAMILIES.items())}
