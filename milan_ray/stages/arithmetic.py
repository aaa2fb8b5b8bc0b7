"""The arithmetic of a dissection, and models that run again in the same arithmetic.

Activations that are compared with a layer's exemplars, levels or pooled activations must be computed in the same
arithmetic. ``--precision`` and ``--channels-last`` are options of the dissection only; the tables' metadata hold them
where they differ from the defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

from milan_ray.config import FLOAT32, Arithmetic
from milan_ray.exemplars.forward import Forward, Inputs
from milan_ray.models.registry import ModelSpec
from milan_ray.schema import EXEMPLARS, Table
from milan_ray.storage import Storage

_PRECISION, _CHANNELS_LAST = "precision", "channels_last"


def metadata(arithmetic: Arithmetic) -> dict[str, str]:
    """The tables' metadata entries of an arithmetic; none for the default."""
    if arithmetic == FLOAT32:
        return {}
    return {_PRECISION: arithmetic.precision, _CHANNELS_LAST: str(arithmetic.channels_last).lower()}


def arithmetic_of(storage: Storage, model: str, layer: str, table: Table = EXEMPLARS) -> Arithmetic:
    """The arithmetic of a layer's exemplars, or of another table of it; the default where the table is missing."""
    entries = storage.metadata(table, model=model, layer=layer) or {}
    if _PRECISION not in entries:
        return FLOAT32
    return Arithmetic(entries[_PRECISION], entries[_CHANNELS_LAST] == "true")  # type: ignore[arg-type]


def arithmetics_of(
    storage: Storage, model: str, layers: Iterable[str], table: Table = EXEMPLARS
) -> dict[str, Arithmetic]:
    """Layer → the arithmetic of its exemplars, or of another table of it."""
    return {layer: arithmetic_of(storage, model, layer, table) for layer in layers}


def refused_by(arithmetic: Arithmetic) -> str:
    """Suffix for the error of a model that failed: which options may be the cause; empty for the default."""
    options = [f"--precision {arithmetic.precision}"] if arithmetic.precision != "float32" else []
    options += ["--channels-last"] if arithmetic.channels_last else []
    return f" (not every model allows {' or '.join(options)}: try without)" if options else ""


class Forwards:
    """A model with forward hooks on dissected layers, each run in the arithmetic of its dissection.

    Args:
        spec: The model.
        build: Builds it on its device; called for each arithmetic, because channels-last changes weights in place.
        layers: Layer → arithmetic of its dissection.
        batch_size: Images per forward pass.
    """

    def __init__(
        self, spec: ModelSpec, build: Callable[[], nn.Module], layers: Mapping[str, Arithmetic], batch_size: int
    ) -> None:
        self._forwards = [
            Forward(
                spec, build(), [layer for layer, own in layers.items() if own == arithmetic], batch_size, arithmetic
            )
            for arithmetic in dict.fromkeys(layers.values())
        ]

    def maps(self, inputs: Inputs) -> dict[str, torch.Tensor]:
        """Activation maps of every layer for at most a batch of inputs, as from :meth:`Forward.maps`."""
        return {layer: maps for forward in self._forwards for layer, maps in forward.maps(inputs).items()}
