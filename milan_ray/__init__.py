"""milan_ray: natural-language descriptions of every unit of every vision model, on Ray.

The calls of :mod:`milan_ray.library` are imported when they are first used: ``import milan_ray`` stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from milan_ray.library.captioner import Milan, load
    from milan_ray.library.dissect import Dissection, dissect
    from milan_ray.library.run_directory import open_exemplars
    from milan_ray.library.search import diff, search

__version__ = "0.2.0"

_MODULES = {
    "Dissection": "dissect",
    "Milan": "captioner",
    "diff": "search",
    "dissect": "dissect",
    "load": "captioner",
    "open_exemplars": "run_directory",
    "search": "search",
}
"""Name → the module of :mod:`milan_ray.library` that has it."""

__all__ = ["Dissection", "Milan", "__version__", "diff", "dissect", "load", "open_exemplars", "search"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"milan_ray.library.{_MODULES[name]}"), name)
