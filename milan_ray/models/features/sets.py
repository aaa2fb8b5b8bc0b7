"""Feature sets by name.

A feature set belongs to a layer and is dissected as a layer of its own, called ``LAYER#NAME``. So every table, query,
labeler and study that knows layers and units knows features, and nothing joins feature 5 with neuron 5.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import nn

from milan_ray.errors import MilanError, unknown_name
from milan_ray.models.layouts import Layout
from milan_ray.models.registry import source_of
from milan_ray.models.weights import weights_digest
from milan_ray.names import SIGN, checked_name


class Encoder(Protocol):
    """What computes a feature set, on one device."""

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Computes codes (N, F) of a layer's output (N, C) at N positions."""
        ...

    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        """Computes what the codes of a layer's output (N, C) stand for, (N, C); where the set reconstructs."""
        ...

    def to(self, device: torch.device) -> Encoder:
        """Moves it to a device."""
        ...


@dataclass(frozen=True)
class FeatureSet:
    """Features of one layer.

    Attributes:
        name: Its name.
        layer: The layer that it reads.
        count: Number of features F.
        width: Number of units C of the layer that it was made for; None where it does not say.
        rectified: Whether codes are never below zero, and zero means absent. Then only images with a code above zero
            are exemplars, so that a feature that never fires has none.
        digest: What decides the codes.
        build: Makes the encoder on the CPU.
        reconstructs: Whether codes stand for the layer's whole output, which is checked on the first images.
        directions: Returns float32 (F, C), what each feature adds to the layer's output; None where that is unknown.
        source: Where it comes from, for messages.
    """

    name: str
    layer: str
    count: int
    width: int | None
    rectified: bool
    digest: str
    build: Callable[[], Encoder]
    reconstructs: bool = False
    directions: Callable[[], torch.Tensor] | None = None
    source: str = "a plug-in"

    @property
    def path(self) -> str:
        """The layer's name in tables and on the command line."""
        return f"{self.layer}{SIGN}{self.name}"

    def layout(self, layout: Layout, model: str) -> Layout:
        """The layer's layout with features in place of units.

        Raises:
            MilanError: The features were made for a layer with another number of units.
        """
        if self.width is not None and self.width != layout.width:
            raise MilanError(
                f"features {self.name!r} ({self.source}) were made for a layer of {self.width} units, and "
                f"{self.layer!r} of {model} has {layout.width}: give the layer and network that they were made for"
                + (", or the matrix with a row per feature." if self.count == layout.width else ".")
            )
        return replace(layout, features=self.count, rectified=self.rectified)


class _Registered(nn.Module):
    """A user's functions as an encoder; modules among them move with it."""

    def __init__(self, encode: Callable[..., torch.Tensor], decode: Callable[..., torch.Tensor] | None) -> None:
        super().__init__()
        self._encode, self._decode = encode, decode

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self._encode(x)

    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        assert self._decode is not None
        return self._decode(self._encode(x))


_SETS: dict[tuple[str, str, str], FeatureSet] = {}


def register_features(
    name: str,
    model: str,
    layer: str,
    encode: Callable[[torch.Tensor], torch.Tensor],
    count: int,
    *,
    decode: Callable[[torch.Tensor], torch.Tensor] | None = None,
    directions: torch.Tensor | None = None,
    rectified: bool = False,
) -> None:
    """Registers features of a model's layer, which ``--layers LAYER#NAME`` dissects like units.

    Args:
        name: Name of the set; a later registration of the same name replaces it.
        model: The model's registered name.
        layer: Module path.
        encode: Maps the layer's output float32 (N, C) at N positions to codes (N, F), each row by itself. A module's
            tensors, or else the function's source, decide whether stored tables are current.
        count: F.
        decode: Maps codes (N, F) back to (N, C), for the check that the set fits the layer.
        directions: float32 (F, C), what each feature adds to the layer's output; needed to ablate features.
        rectified: Whether codes are never below zero, and zero means absent.

    Raises:
        MilanError: The name cannot be used, or a number is wrong.
    """
    checked_name("a feature set", name)
    if SIGN in name or count < 1:
        raise MilanError(f"features {name!r} of {model}: give a name without {SIGN!r}, and count= of at least 1.")
    if directions is not None and (directions.ndim != 2 or len(directions) != count):
        raise MilanError(
            f"features {name!r} of {model}: directions= has shape {tuple(directions.shape)}, not ({count}, units of "
            f"{layer})."
        )
    modules = [part for part in (encode, decode) if isinstance(part, nn.Module)]
    identity = [source_of(part) for part in (encode, decode) if part is not None and not isinstance(part, nn.Module)]
    identity += [f"{module!r} {weights_digest(module)}" for module in modules]
    _SETS[model, layer, name] = FeatureSet(
        name, layer, count, None if directions is None else directions.shape[1], rectified,
        hashlib.sha256(repr((count, rectified, identity)).encode()).hexdigest(),
        lambda: _Registered(encode, decode).eval(),
        decode is not None, None if directions is None else lambda: directions.float(),
    )  # fmt: skip


def find_features(model: str, layer: str) -> FeatureSet:
    """Finds a registered feature set.

    Args:
        model: The model.
        layer: The set's name as a layer, ``LAYER#NAME``.

    Raises:
        MilanError: There is no such set; the message names the nearest.
    """
    known = {features.path: features for (of, _, _), features in _SETS.items() if of == model}
    if layer not in known:
        raise unknown_name(
            "feature set", layer, known, "Register it in a plug-in (register_features), or give its --features FILE."
        )
    return known[layer]
