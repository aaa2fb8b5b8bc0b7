"""Imports only point down, and Ray is imported in one place (ARCHITECTURE.md)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "milan_ray"

FLOORS = (
    {"errors"},
    {"schema", "config", "device", "runtime", "progress", "remote", "names", "tensorfiles", "textfiles", "yaml_files"},
    {"models", "probe", "storage", "plugins", "hub", "damaged"},
    {"exemplars", "annotations", "scoring"},
    {"world", "captioner"},
    {"labelers", "report"},
    {"engine"},
    {"stages"},
    {"library"},
    {"studies"},
    {"showcase", "benchmarks", "doctor"},
    {"cli"},
)
"""Who may import whom: a module its own part, all on lower floors, and its neighbours as long as there is no circle."""

FLOOR = {part: number for number, parts in enumerate(FLOORS) for part in parts}


def imports(path: Path) -> set[str]:
    """The modules that a file imports anywhere, as dotted names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def parts_imported(path: Path) -> set[str]:
    names = {name.split(".")[1] for name in imports(path) if name.startswith("milan_ray.")}
    return {name for name in names if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").exists()}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path):
    own = part_of(path)
    for part in parts_imported(path) - {own}:
        assert FLOOR[part] <= FLOOR[own], f"{own} may not import {part}"


def test_imports_make_no_circles_between_parts():
    edges: dict[str, set[str]] = {}
    for path in FILES:
        edges.setdefault(part_of(path), set()).update(parts_imported(path) - {part_of(path)})
    done: set[str] = set()

    def visit(part: str, above: tuple[str, ...]) -> None:
        assert part not in above, f"circle: {' → '.join([*above, part])}"
        if part not in done:
            for other in edges.get(part, ()):
                visit(other, (*above, part))
            done.add(part)

    for part in edges:
        visit(part, ())


def test_ray_is_imported_by_the_engine_alone():
    guilty = [
        str(path.relative_to(PACKAGE))
        for path in FILES
        if part_of(path) != "engine" and any(name.split(".")[0] == "ray" for name in imports(path))
    ]
    assert not guilty


def test_package_imports_without_torch_or_ray():
    """`import milan_ray` and `--help` stay quick: what is heavy comes with the verb that needs it."""
    import subprocess
    import sys

    code = "import milan_ray.cli, sys; print(sorted({'torch', 'ray', 'spacy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
