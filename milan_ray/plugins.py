"""Plug-ins: modules that register models, probes and more when they are imported.

Built-in plug-ins are loaded by name, as a user's are, because lower floors may not import the built-in world.
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
    "milan_ray.models.class_captions",
    "milan_ray.models.conse",
    "milan_ray.models.diffusion",
    "milan_ray.models.dino_zoo",
    "milan_ray.models.timm_zoo",
    "milan_ray.models.transformers_zoo",
    "milan_ray.world.plugin",
)

LATER = (
    "milan_ray.models.torchvision_zoo",
    "milan_ray.models.places365_zoo",
    "milan_ray.models.efficientnet_lite",
)
"""Built-in plug-ins that are loaded when one of their models is asked for."""


def load_plugins(names: Sequence[str] = ()) -> None:
    """Loads the built-in plug-ins, then the user's; a plug-in that is loaded is not loaded again.

    Every process that looks names up calls this first, with the same names: registrations belong to the process, and
    registered objects can only be unpickled where their module is loaded.

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
        except (Exception, SystemExit) as error:  # user code may raise anything, SystemExit too
            if "attempted relative import" in str(error):
                raise MilanError(
                    f"plug-in {name!r} cannot be imported ({error}): write `from helper import …` for a module beside "
                    "it, without the dot."
                ) from error
            raise MilanError(
                f"plug-in {name!r} cannot be imported ({type(error).__name__}: {error}): give an importable module or "
                "the path of a .py file."
            ) from error


def _load_file(path: Path) -> None:
    # The name differs for files of the same stem, and is the same in every process that sees the same path.
    name = f"milan_ray_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"no Python file at {path}")
    if path.is_file():
        _allow_neighbours(path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def _allow_neighbours(path: Path) -> None:
    """Adds a file's folder to the import path, so that it can import the modules beside it, as a script can.

    Raises:
        ImportError: Another module has a neighbour's name, and the file would import that one.
    """
    folder = path.parent
    names = sorted(_neighbours(path, set()))
    for name in names:
        places = _places(name)
        claimed = _claimed.get(name, folder)
        if claimed != folder:
            places = [str(claimed)]
        if places and not any(Path(place).resolve().is_relative_to(folder) for place in places):
            raise ImportError(
                f"it imports {name}, which lies beside it, but there is another module {name} ({places[0]}), which it "
                "would get: rename the one beside it"
            )
    _claimed.update(dict.fromkeys(names, folder))
    # At the end of the path, so that no file beside a plug-in hides a module that other code imports.
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


_claimed: dict[str, Path] = {}
"""Module beside a plug-in → its folder; the module may be imported late, when a model is built."""


def _places(name: str) -> list[str]:
    """Locations of the module of this name that is loaded or would be found; empty where there is none."""
    loaded = sys.modules.get(name)
    if loaded is not None:
        places = [getattr(loaded, "__file__", None), *getattr(loaded, "__path__", ())]
        return [place for place in places if place] or ["of Python"]
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return []
    if spec is None:
        return []
    return [place for place in (spec.origin, *(spec.submodule_search_locations or ())) if place] or ["of Python"]


def _neighbours(path: Path, known: set[str], folder: Path | None = None) -> set[str]:
    """Names of the modules beside a plug-in that it imports, directly or through one another."""
    folder = path.parent if folder is None else folder
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):  # importing the file raises the error
        return known
    for node in ast.walk(tree):
        imported = _imported(node)
        for name in sorted({module.partition(".")[0] for module in imported} - known - {"milan_ray"}):
            # A folder without __init__.py is a package too, if the imported module lies in it.
            parts = [folder.joinpath(*module.split(".")) for module in imported if module.startswith(f"{name}.")]
            files = [folder / f"{name}.py", folder / name / "__init__.py", *(Path(f"{part}.py") for part in parts)]
            existing = [file for file in files if file.is_file()]
            if existing or any((part / "__init__.py").is_file() for part in parts):
                known.add(name)
                for file in existing:
                    _neighbours(file, known, folder)
    return known


def _imported(node: ast.AST) -> list[str]:
    """Dotted names of the modules that a statement or call may import; an imported name may be a module too."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and not node.level and node.module:
        return [node.module, *(f"{node.module}.{alias.name}" for alias in node.names if alias.name != "*")]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        name = node.args[0].value
        if called in ("import_module", "__import__") and isinstance(name, str) and not name.startswith("."):
            return [name]
    return []
