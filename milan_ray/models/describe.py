"""What can be dissected in a model."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from milan_ray.errors import MilanError
from milan_ray.models.hooks import call, first_tensor, named_layers
from milan_ray.models.registry import RANDOM, ModelSpec

_BATCH = 2  # with one image, an output without a batch dimension would pass for one with


@dataclass(frozen=True)
class LayerInfo:
    """One module of a model.

    Attributes:
        path: Module path; ``outputs`` is the model itself.
        kind: The module's class.
        shape: Shape of its output for one image, without the batch dimension; None when it puts out no tensor, does
            not run, or its first dimension is not the batch.
        units: Number of units, or None when the layer cannot be dissected.
        default: Whether it is dissected when no layers are asked for.
    """

    path: str
    kind: str
    shape: tuple[int, ...] | None
    units: int | None
    default: bool

    @property
    def dissectable(self) -> bool:
        """Whether units can be read from the layer."""
        return self.units is not None


def layer_table(spec: ModelSpec) -> list[LayerInfo]:
    """Lists all modules of a model, by one forward pass of blank images.

    Weights are not needed: a model whose weights are a file that nobody chose is built untrained. A generator's modules
    are listed without shapes: what it takes is known to its probe alone.

    Args:
        spec: The model.

    Returns:
        One entry per module path, in the model's order, its own output last.

    Raises:
        MilanError: It is a generator, or its weights are missing or do not fit.
    """
    if spec.images is not None:
        raise MilanError(
            f"{spec.name} is a generator, whose layers depend on latents that only a probe has, so they cannot be "
            f"listed here; dissected by default are {', '.join(spec.layers)}, and --layers takes any module's path."
        )
    if spec.published and spec.weights is None:
        spec = replace(spec, weights=RANDOM)
    model = spec.load()
    modules = named_layers(model)
    shapes: dict[str, torch.Size] = {}
    units: dict[str, int] = {}
    handles = []
    for path, module in modules.items():

        def note(module: torch.nn.Module, args: object, output: object, path: str = path) -> None:
            tensor = first_tensor(output)
            if tensor is None or tensor.ndim == 0 or len(tensor) != _BATCH:
                return
            shapes[path] = tensor.shape[1:]
            try:
                units[path] = spec.unit_maps(path, tensor).shape[1]
            except MilanError:
                units.pop(path, None)  # listed, but not dissectable

        handles.append(module.register_forward_hook(note))
    try:
        with torch.inference_mode():
            if spec.images is None:  # what a generator takes, only its probe knows
                call(model, spec.prepare(torch.zeros((_BATCH, *spec.view_shape), dtype=torch.uint8)))
    finally:
        for handle in handles:
            handle.remove()
    return [
        LayerInfo(
            path,
            type(module).__name__,
            tuple(shapes[path]) if path in shapes else None,
            units.get(path),
            path in spec.layers,
        )
        for path, module in modules.items()
    ]
