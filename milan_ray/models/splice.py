"""A network's outputs when what a layer puts out at its positions is replaced."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from milan_ray.device import to_device
from milan_ray.errors import MilanError
from milan_ray.models.ablation import replaced
from milan_ray.models.hooks import call, find_places, first_tensor, hooked
from milan_ray.models.inputs import prepare, runs_alone
from milan_ray.models.layouts import Layout
from milan_ray.models.registry import ModelSpec


class Splice:
    """A classifier with other values in the place of a layer's output.

    Only the positions of the layer's maps are replaced: tokens before and after them (CLS, registers) stay. Of a module
    that runs several times, the call that the layer names is replaced, or else the last one, as exemplars read it.

    Args:
        spec: The model.
        model: The model, built, in eval mode, on its device.
        layer: The layer.
        layout: How its output is read.

    Raises:
        MilanError: There is no such layer.
    """

    def __init__(self, spec: ModelSpec, model: nn.Module, layer: str, layout: Layout) -> None:
        self._spec, self._model, self._layer, self._layout = spec, model, layer, layout
        self._place = find_places(model, [layer])[layer]
        self._call = self._place.call or 0
        self._alone = runs_alone(model)
        parameter = next(iter(model.parameters()), None)
        self._device = torch.device("cpu") if parameter is None else parameter.device

    @torch.inference_mode()
    def logits(self, views: torch.Tensor, maps: torch.Tensor | None) -> torch.Tensor:
        """The model's outputs with other maps in the layer.

        Args:
            views: uint8 (n, H, W, bands), the model's views.
            maps: (n, C, h, w), what stands in the layer's place; None leaves it.

        Returns:
            float32 (n, classes).

        Raises:
            MilanError: The model does not put out one row of logits per image, or the layer runs in another way.
        """
        if self._alone and len(views) > 1:
            ones = range(len(views))
            return torch.cat([self.logits(views[n : n + 1], None if maps is None else maps[n : n + 1]) for n in ones])
        inputs = prepare(self._spec, self._model, to_device(views, self._device))
        if maps is None:
            return self._rows(call(self._model, inputs), len(views))
        if not self._call:
            self._call = self._calls(inputs)
        with hooked([self._place.module.register_forward_hook(self._hook(maps))]):
            return self._rows(call(self._model, inputs), len(views))

    def _calls(self, inputs: Any) -> int:
        """How often the module runs."""
        seen = 0

        def count(*_: object) -> None:
            nonlocal seen
            seen += 1

        with hooked([self._place.module.register_forward_hook(count)]):
            call(self._model, inputs)
        return seen

    def _hook(self, maps: torch.Tensor) -> Any:
        calls = 0

        def hook(module: nn.Module, args: object, output: object) -> object:
            nonlocal calls
            calls += 1
            if calls != self._call:
                return output
            own = first_tensor(output)
            if own is None:
                raise MilanError(f"layer {self._layer!r} puts out no tensor, so that nothing can be put in its place.")
            return replaced(output, own, spliced(own, maps, self._layout))

        return hook

    def _rows(self, output: object, images: int) -> torch.Tensor:
        logits = first_tensor(output)
        if logits is None or logits.ndim != 2 or len(logits) != images:
            raise MilanError(
                f"{self._spec.name} does not put out one row of logits per image, so that it has no accuracy."
            )
        return logits.float()


def spliced(output: torch.Tensor, maps: torch.Tensor, layout: Layout) -> torch.Tensor:
    """A layer's output with its maps replaced.

    Args:
        output: The output for n images.
        maps: (n, C, h, w).
        layout: How the output is read.

    Returns:
        A tensor like ``output``.
    """
    # Where each value of the maps lies in the output: whatever the layout does with axes and tokens, it says here.
    where = torch.arange(output.numel(), device=output.device).view(output.shape)
    flat = output.flatten().clone()
    flat[layout.maps(where).reshape(-1)] = maps.to(flat).reshape(-1)
    return flat.view(output.shape)
