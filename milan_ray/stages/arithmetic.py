"""The arithmetic in which layers were dissected, and models run again in the same one.

Whatever is compared with a layer's exemplars, levels or pooled activations is computed as these were: ``--precision``
and ``--channels-last`` are options of the dissection alone, and stand in the tables' metadata where they are not the
defaults.
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
    """What tables say of the arithmetic: nothing of the default one."""
    if arithmetic == FLOAT32:
        return {}
    return {_PRECISION: arithmetic.precision, _CHANNELS_LAST: str(arithmetic.channels_last).lower()}


def arithmetic_of(storage: Storage, model: str, layer: str, table: Table = EXEMPLARS) -> Arithmetic:
    """How a layer's exemplars, or its pooled activations, were computed; the default where there are none."""
    found = storage.metadata(table, model=model, layer=layer) or {}
    if _PRECISION not in found:
        return FLOAT32
    return Arithmetic(found[_PRECISION], found[_CHANNELS_LAST] == "true")  # type: ignore[arg-type]


def arithmetics_of(
    storage: Storage, model: str, layers: Iterable[str], table: Table = EXEMPLARS
) -> dict[str, Arithmetic]:
    """Layer → how its exemplars, or its pooled activations, were computed."""
    return {layer: arithmetic_of(storage, model, layer, table) for layer in layers}


def refused_by(arithmetic: Arithmetic) -> str:
    """What to add to the error of a model that failed: that it may be the arithmetic's fault."""
    options = [f"--precision {arithmetic.precision}"] if arithmetic.precision != "float32" else []
    options += ["--channels-last"] if arithmetic.channels_last else []
    return f" (not every model allows {' or '.join(options)}: try without)" if options else ""


class Forwards:
    """A model with taps on layers that were dissected, each run as it was then.

    Args:
        spec: The model.
        build: Builds it, on its device: once for each arithmetic, because channels-last weights are changed in place.
        layers: Layer → how it was dissected.
        batch_size: Images per forward pass.
    """

    def __init__(
        self, spec: ModelSpec, build: Callable[[], nn.Module], layers: Mapping[str, Arithmetic], batch_size: int
    ) -> None:
        self._forwards = [
            Forward(spec, build(), [layer for layer, own in layers.items() if own == how], batch_size, how)
            for how in dict.fromkeys(layers.values())
        ]

    def maps(self, inputs: Inputs) -> dict[str, torch.Tensor]:
        """Every layer's activation maps of up to a batch of inputs, as :meth:`Forward.maps` gives them."""
        return {layer: maps for forward in self._forwards for layer, maps in forward.maps(inputs).items()}
