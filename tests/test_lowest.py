"""The lowest declared versions, which `make test-floors` installs."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]


def test_constraints_are_the_lower_ends_of_all_declared_ranges():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    project = tomllib.loads(text)["project"]
    extras = project["optional-dependencies"].values()
    asked = [*project["dependencies"], *(one for extra in extras for one in extra)]
    found = runpy.run_path(str(ROOT / "tests/lowest.py"))["constraints"](text)
    lowest = {}
    for requirement in map(Requirement, asked):
        lower = [bound.version for bound in requirement.specifier if bound.operator == ">="]
        if lower:
            (lowest[requirement.name],) = lower
    assert dict(one.split("==") for one in found) == lowest
    assert len(found) == len(lowest) > 25
