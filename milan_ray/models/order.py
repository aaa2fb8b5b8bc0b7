"""The order of a model's layers."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from milan_ray.names import SIGN


def places(model: nn.Module, layers: Iterable[str]) -> dict[str, int]:
    """Layer → its place among all modules of a model, in the order in which the model defines them.

    Places are comparable between jobs on different layers. The model's own output comes last, unless a module has that
    name; a path with a call number (``relu@1``), or a feature set (``relu#sae``), has its module's place.
    """
    modules = {name: place for place, (name, _) in enumerate(model.named_modules())}
    last = len(modules)
    paths = {layer: layer.partition(SIGN)[0] for layer in layers}
    return {
        layer: modules.get(path, modules.get(path.rpartition("@")[0] or path, last)) for layer, path in paths.items()
    }
