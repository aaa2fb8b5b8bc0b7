"""Fixtures shared by all tests."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # two OpenMP threads stall each other otherwise

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


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
