"""milan_ray: natural-language descriptions of every unit of every vision model, on Ray.

The calls of :mod:`milan_ray.library` are imported when they are first used: ``import milan_ray`` stays light.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from milan_ray.library.captioner import Milan, load
    from milan_ray.library.dissect import Dissection, dissect
    from milan_ray.library.run_directory import open_exemplars
    from milan_ray.library.search import diff, search

__version__ = "0.2.0"

__all__ = ["Dissection", "Milan", "__version__", "diff", "dissect", "load", "open_exemplars", "search"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from milan_ray.library import captioner, dissect, run_directory, search

    modules = (captioner, dissect, run_directory, search)
    return getattr(next(module for module in modules if hasattr(module, name)), name)
