"""The wheel: built from a copy of the sources, installed into a fresh environment, used through its entry point."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from milan_ray import __version__

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, without a network: with the setuptools that is installed here."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("needs setuptools")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "milan_ray", source / "milan_ray", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder]
    done = subprocess.run([*map(str, command), str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = folder.glob("*.whl")
    return found


@pytest.mark.slow
def test_wheel_has_the_package_and_its_data_and_nothing_else(wheel) -> None:
    assert wheel.name == f"milan_ray-{__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    own = {str(path.relative_to(ROOT)) for path in (ROOT / "milan_ray").rglob("*") if path.is_file()}
    own = {path for path in own if "__pycache__" not in path}
    assert names >= own
    assert {name.split("/")[0] for name in names} == {"milan_ray", f"milan_ray-{__version__}.dist-info"}


@pytest.mark.slow
def test_installed_wheel_runs_by_its_entry_point(wheel, photos, tmp_path) -> None:
    """A fresh environment that has our dependencies, but neither this checkout nor its own metadata of the project."""
    fresh = tmp_path / "fresh"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(fresh)], check=True)
    python = fresh / "bin/python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, str(wheel)], check=True)
    packages = subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    )
    # Ours names the folder of dependencies; the .pth files in there, as an editable install's, are not read.
    Path(packages.strip(), "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: str) -> str:
        arguments = [str(fresh / "bin/milan-ray"), *command]
        done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "describe" in run("--help")
    model = ("--model", "tiny/cnn", "--plugin", str(ROOT / "tests/plugins/tiny_models.py"), "--layers", "0")
    run("exemplars", *model, "--probe", str(photos), "--k", "3", "--storage", str(tmp_path / "run"))
    assert (tmp_path / "run/report/index.html").is_file()  # its templates are in the wheel
    where = "import milan_ray; print(milan_ray.__file__)"
    found = subprocess.check_output([python, "-c", where], text=True, cwd=tmp_path, env=environment)
    assert Path(found.strip()).is_relative_to(fresh)
