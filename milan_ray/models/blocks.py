"""Finds a network's blocks, for families whose own list of features names no module that runs."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

_LISTS = re.compile(r"(.*\.)?(blocks?|stages?|layers?|levels?|network|features)")


def blocks(model: nn.Module) -> tuple[str, ...]:
    """The paths of the outermost list of blocks or stages, else of the children that have parameters.

    Args:
        model: The network; weights are not needed.

    Returns:
        Module paths in the model's order; empty for a network without parts.
    """
    lists = [
        (path.count("."), path)
        for path, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and _LISTS.fullmatch(path) and len(module) > 1
    ]
    if lists:
        path = min(lists, key=lambda entry: entry[0])[1]
        return running(model, (f"{path}.{child}" for child, _ in model.get_submodule(path).named_children()))
    children = (path for path, child in model.named_children() if next(child.parameters(), None) is not None)
    return running(model, children)


def running(model: nn.Module, paths: Iterable[str]) -> tuple[str, ...]:
    """Keeps the paths that are modules; replaces a list, which never runs itself, by its last member."""
    modules = dict(model.named_modules())
    kept = []
    for path in paths:
        while isinstance(modules.get(path), nn.ModuleList) and len(modules[path]):
            path = f"{path}.{list(modules[path].named_children())[-1][0]}"
        if path and path in modules and not isinstance(modules[path], nn.ModuleList):
            kept.append(path)
    return tuple(dict.fromkeys(kept))
