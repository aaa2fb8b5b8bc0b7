"""Lists the layers of a model and how their outputs are read."""

from __future__ import annotations

from dataclasses import dataclass, replace

from milan_ray.errors import MilanError
from milan_ray.models.establish import examine
from milan_ray.models.hooks import find_places, named_layers
from milan_ray.models.registry import RANDOM, ModelSpec


@dataclass(frozen=True)
class LayerInfo:
    """One module of a model.

    Attributes:
        path: Module path; ``outputs`` is the model itself.
        kind: The module's class.
        shape: Shape of its output for one image, without the batch's axis; None when it cannot be dissected.
        units: Number of units, or None when the layer cannot be dissected.
        default: Whether it is dissected when no layers are asked for.
        reading: How its output is read, or why it cannot be.
    """

    path: str
    kind: str
    shape: tuple[int, ...] | None
    units: int | None
    default: bool
    reading: str = ""


def layer_table(spec: ModelSpec) -> list[LayerInfo]:
    """Lists all modules of a model, by a few small forward passes.

    Weights are not needed: a model with published weights is built untrained where none are chosen. Generators are not
    supported, because only a probe has their inputs.

    Args:
        spec: The model.

    Returns:
        One entry per module path, in the model's order, its own output last.

    Raises:
        MilanError: The model is a generator, or its weights are missing or do not fit.
    """
    if spec.images is not None:
        raise MilanError(
            f"{spec.name} is a generator, whose layers depend on latents that only a probe has, so they cannot be "
            f"listed here; dissected by default are {', '.join(spec.layers)}, and --layers takes any module's path."
        )
    if spec.published and spec.weights is None:
        spec = replace(spec, weights=RANDOM)
    model = spec.load(parts=True)
    modules = named_layers(model)
    default = find_places(model, spec.layers)
    paths = list(dict.fromkeys([*modules, *spec.layers]))
    return [
        LayerInfo(
            path,
            type(default[path].module if path in default else modules[path]).__name__,
            None if isinstance(reading, str) else reading.shape,
            None if isinstance(reading, str) else reading.units,
            path in spec.layers,
            str(reading),
        )
        for path, reading in examine(spec, model, paths).items()
    ]
