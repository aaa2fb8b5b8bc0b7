"""Plug-ins: modules that register models, probes and more when they are imported.

The built-in ones are loaded by name, as a user's are: nothing below the world may import it.
"""

from __future__ import annotations

import ast
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
        names: Dotted module names, or paths of ``.py`` files, which may import the modules beside them.

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
    if path.is_file():
        _see_neighbours(path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def _see_neighbours(path: Path) -> None:
    """Lets a file import the modules beside it, as a script may, now and later.

    Raises:
        ImportError: Another module of a neighbour's name is loaded: the file would get that one.
    """
    folder = path.parent
    for name in sorted(_neighbours(path, set())):
        loaded = sys.modules.get(name)
        if loaded is None:
            continue
        places = [getattr(loaded, "__file__", None), *getattr(loaded, "__path__", ())]
        if not any(place and Path(place).resolve().is_relative_to(folder) for place in places):
            raise ImportError(
                f"it imports {name}, which lies beside it, but another module {name} "
                f"({next((place for place in places if place), 'of Python')}) is loaded: rename the one beside it"
            )
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _neighbours(path: Path, known: set[str]) -> set[str]:
    """The modules beside a file that it imports, and that these import in turn, by name."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):  # whoever imports it says so
        return known
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names = [node.module]
        for name in {name.partition(".")[0] for name in names} - known:
            file, package = path.parent / f"{name}.py", path.parent / name / "__init__.py"
            if name != "milan_ray" and (file.is_file() or package.is_file()):
                known.add(name)
                _neighbours(package if package.is_file() else file, known)
    return known
