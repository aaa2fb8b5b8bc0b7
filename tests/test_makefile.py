"""The Makefile: targets install what they need first, in a fresh checkout and after a change of pyproject.toml."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = {
    "demo": "minilm",
    "photos": "photos",
    "test": "test",
    "test-slow": "test",
    "soak": "test",
    "conformance": "test",
    "lint": "lint",
    "types": "types",
    "docs": "docs",
    "test-floors": "test",
}
"""Target → the extra of pyproject.toml that it installs."""

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with what the Makefile decides by, and no environment."""
    (tmp_path / "tests").mkdir()
    for name in ("Makefile", "pyproject.toml", "tests/lowest.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def planned(checkout: Path, *arguments: str) -> list[str]:
    """The commands that make would run."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "TORCH")}
    command = ["make", "--dry-run", "--no-print-directory", *arguments]
    return subprocess.check_output(command, cwd=checkout, text=True, env=inherited).splitlines()


def installs(commands: list[str]) -> list[str]:
    """The extras that some commands install."""
    return re.findall(r"pip install --quiet (?:--no-compile )?--editable '\.\[(\w+)\]'", "\n".join(commands))


@pytest.mark.parametrize(("target", "extra"), EXTRAS.items())
def test_target_in_a_fresh_checkout_creates_an_environment_and_installs_its_extra(checkout, target, extra) -> None:
    commands = planned(checkout, target)
    created = next(number for number, command in enumerate(commands) if " -m venv " in command)
    installed = next(number for number, command in enumerate(commands) if installs([command]) == [extra])
    assert created < installed < len(commands) - 1
    assert installs(commands) == [extra]
    assert re.search(rf"^{extra} = \[", (checkout / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)


def test_every_target_that_runs_something_is_listed_here(checkout) -> None:
    text = (checkout / "Makefile").read_text(encoding="utf-8")
    assert set(re.findall(r"^([\w-]+):.*  ## ", text, re.MULTILINE)) == {*EXTRAS, "tools"}


def test_tools_are_what_the_checks_need_installed_at_once(checkout) -> None:
    commands = planned(checkout, "tools")
    (extras,) = re.findall(r"--editable '\.\[(.*)\]'", "\n".join(commands))
    assert set(extras.split(",")) == {"test", "lint", "types", "docs"}
    stamps = commands[-1].split()
    assert stamps[0] == "touch" and set(stamps[1:]) == {f".venv/.{extra}" for extra in extras.split(",")}


def test_installed_extra_is_installed_again_only_after_a_change_of_pyproject(checkout) -> None:
    (checkout / ".venv").mkdir()
    for name, seconds in (("pyproject.toml", 1000), (".venv/.created", 1001), (".venv/.test", 1002)):
        (checkout / name).touch()
        os.utime(checkout / name, (seconds, seconds))
    assert installs(planned(checkout, "test")) == []
    assert installs(planned(checkout, "demo", "test")) == ["minilm"]
    os.utime(checkout / "pyproject.toml", (1003, 1003))
    commands = planned(checkout, "test")
    assert installs(commands) == ["test"]
    assert not any(" -m venv " in command for command in commands)


def test_photos_are_those_of_the_folder_named_and_asked_for_without_one(checkout) -> None:
    assert planned(checkout, "photos", "PHOTOS=~/my pictures")[-1].endswith('-m jobs.demo --photos "~/my pictures"')
    (checkout / ".venv").mkdir()
    for seconds, name in enumerate(("pyproject.toml", ".venv/.created", ".venv/.photos")):
        (checkout / name).touch()
        os.utime(checkout / name, (1000 + seconds, 1000 + seconds))
    done = subprocess.run(["make", "photos"], cwd=checkout, capture_output=True, text=True, check=False)
    assert done.returncode and "make photos PHOTOS=~/pictures" in done.stderr


def test_torch_that_is_given_is_installed_before_the_package(checkout) -> None:
    commands = planned(checkout, "demo", "TORCH=torch==1 torchvision==2 --pre")
    given = next(number for number, command in enumerate(commands) if "torch==1 torchvision==2 --pre" in command)
    assert given < next(number for number, command in enumerate(commands) if installs([command]))
    assert not any("torch" in command for command in planned(checkout, "demo"))
