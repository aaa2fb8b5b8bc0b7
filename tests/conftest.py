"""Fixtures shared by all tests."""

from __future__ import annotations

import functools
import os
import runpy

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # two OpenMP threads stall each other otherwise

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from milan_ray import runtime

runtime.prepare(None)  # before anything imports Ray

ROOT = Path(__file__).resolve().parents[1]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Under ``-n 2``: one process has the Ray session, and a folder's or file's fixtures are made once."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFixtures(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid.split("::")[0])

    return ByFixtures(config, log)


@functools.cache
def group_of(file: str) -> str:
    """The group of tests that a test file belongs to, by its path below the root."""
    return "ray" if "ray_session" in (ROOT / file).read_text(encoding="utf-8") else Path(file).parts[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and reference outputs beside the checkout; tests that need it skip without it."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip("needs the folder ../shared (real photographs, weights and reference outputs)")
    return path


@pytest.fixture(scope="session")
def golden(shared: Path) -> Path:
    """Outputs of the genuine reference implementation."""
    return shared / "golden"


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One local Ray for all tests that need it."""
    from milan_ray.config import Resources
    from milan_ray.pipelines.cluster import connected

    with connected(Resources()):
        yield


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 90 small random images of 3 classes, in three sizes."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for index in range(90):
        folder = root / f"class {index % 3}"
        folder.mkdir(exist_ok=True)
        size = (24 + index % 3 * 8, 32)
        coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(folder / f"{index:03d}.png")
    return root


@pytest.fixture(scope="session")
def save_clip() -> Callable[..., str]:
    """Saves a tiny random CLIP or SigLIP: ``save_clip(folder, kind)`` of ``tests/plugins/tiny_clip.py``."""
    return runpy.run_path(str(ROOT / "tests/plugins/tiny_clip.py"))["save_clip"]
