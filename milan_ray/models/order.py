"""The order of a model's layers."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def places(model: nn.Module, layers: Iterable[str]) -> dict[str, int]:
    """Layer → its place among all modules of a model, in the order in which the model defines them.

    Places are comparable between jobs on different layers. The model's own output comes last, unless a module has that
    name; a path with a call number (``relu@1``) has its module's place.
    """
    modules = {name: place for place, (name, _) in enumerate(model.named_modules())}
    last = len(modules)
    return {layer: modules.get(layer, modules.get(layer.rpartition("@")[0] or layer, last)) for layer in layers}
