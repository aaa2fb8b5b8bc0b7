"""Plug-ins: modules that register models, probes and more when they are imported.

The built-in ones are loaded by name, as a user's are: nothing below the world may import it.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from milan_ray.errors import MilanError
from milan_ray.models.registry import register_later

BUILT_IN = (
    "milan_ray.models.diffusion",
    "milan_ray.models.dino_zoo",
    "milan_ray.models.timm_zoo",
    "milan_ray.models.transformers_zoo",
    "milan_ray.world.plugin",
)

LATER = ("milan_ray.models.torchvision_zoo", "milan_ray.models.places365_zoo")
"""Built-in ones that are loaded when one of their models is asked for."""


def load_plugins(names: Sequence[str] = ()) -> None:
    """Loads the built-in plug-ins, then the user's; one already loaded is left alone.

    Every process that looks names up calls this first, with the same names: registrations live in the process, and
    what they hold can only be unpickled where its module is loaded.

    Args:
        names: Dotted module names, or paths of ``.py`` files.

    Raises:
        MilanError: A module is missing or fails while being imported.
    """
    for module in LATER:
        register_later(module)
    for name in (*BUILT_IN, *names):
        try:
            if name.endswith(".py"):
                _load_file(Path(name).expanduser().resolve())
            else:
                importlib.import_module(name)
        except Exception as error:  # user code may raise anything
            raise MilanError(
                f"plug-in {name!r} cannot be imported ({type(error).__name__}: {error}): give an importable module or "
                "the path of a .py file."
            ) from error


def _load_file(path: Path) -> None:
    # The name tells files of the same stem apart and is the same in every process that sees the same path.
    name = f"milan_ray_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"no Python file at {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
