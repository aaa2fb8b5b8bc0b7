"""Prints pyproject's lowest versions as constraints for pip: what `make test-floors` installs."""

from __future__ import annotations

import re
from pathlib import Path

REQUIREMENT = re.compile(r'"(?P<name>[\w-]+)(?:\[[^\]]*\])?>=(?P<lowest>[\d.]+)(?:,[^"]*)?"')


def constraints(pyproject: str) -> list[str]:
    """`name==version` of every requirement that says from which version on, extras' too."""
    project = pyproject.partition("\ndependencies = ")[2].partition("\n[project.scripts]")[0]
    return list(dict.fromkeys(f"{found['name']}=={found['lowest']}" for found in REQUIREMENT.finditer(project)))


if __name__ == "__main__":
    print("\n".join(constraints((Path(__file__).resolve().parents[1] / "pyproject.toml").read_text(encoding="utf-8"))))
