"""Small published sets of random content."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from milan_ray.annotations.layout import write_annotations

WriteSet = Callable[..., Path]
WriteLayer = Callable[..., None]


def _write_layer(
    folder: Path, rng: np.random.Generator, count: int, k: int, size: int, **files: np.ndarray | None
) -> None:
    """Writes one layer; `files` replaces or, with None, leaves out what is usually there."""
    folder.mkdir(parents=True)
    content: dict[str, np.ndarray | None] = {
        "images": rng.integers(0, 256, (count, k, 3, size, size), dtype=np.uint8),
        "masks": rng.integers(0, 2, (count, k, 1, size, size), dtype=np.uint8),
        "ids": np.arange(count * k).reshape(count, k),
        "activations": np.sort(rng.normal(size=(count, k)).astype(np.float32))[:, ::-1],
        **files,
    }
    for name in ("images", "masks", "units"):
        array = content.get(name)
        if array is not None:
            np.save(folder / f"{name}.npy", array)
    if content["ids"] is not None:
        np.savetxt(folder / "ids.csv", content["ids"], fmt="%i", delimiter=",")
    if content["activations"] is not None:
        np.savetxt(folder / "activations.csv", content["activations"], fmt="%.5e", delimiter=",")


@pytest.fixture(scope="session")
def write_layer() -> WriteLayer:
    """Writes one layer of random content."""
    return _write_layer


@pytest.fixture
def write_set(tmp_path: Path) -> WriteSet:
    """Writes a set of layers "0" (units 0…2) and "10" (units 5, 9), with annotations of uneven number."""

    def write(name: str = "net/photos", **files: np.ndarray | None) -> Path:
        root, rng = tmp_path / name, np.random.default_rng(0)
        _write_layer(root / "0", rng, 3, 2, 8, **files)
        _write_layer(root / "10", rng, 2, 2, 8, units=np.array([5, 9]), ids=np.array([[90, 91], [92, 93]]))
        rows = [("10", 9, "a dog"), ("0", 2, 'Red, "bright"'), ("10", 9, ""), ("0", 0, "sky"), ("10", 9, "dogs")]
        write_annotations(root / "annotations.csv", rows)
        return root

    return write
