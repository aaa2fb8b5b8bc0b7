"""Fingerprints of all tables are those of earlier versions: nobody computes a zoo again because of a new name."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from milan_ray.storage import CONFIG_KEY, INPUTS_KEY

PINNED = Path(__file__).with_name("fingerprints.json")
PIN = "MILAN_TEST_PIN"
"""Environment variable: write the file anew, for a change that is meant."""

LAST = {
    "photographs": "text embeddings",
    "fields": "rating draws",
    "scenes": "dnd",
    "found": "dnd-probe",
    "experiments": "pasting",
}
OF_FILES = ("photographs", "experiments")
"""Worlds whose pictures are files, so that what follows from these is another in every run."""

FOLLOWS = ("probe", "probes", "exemplars", "encodings", "candidates", "descriptions", "annotations", "texts", "pooled")
"""Ingredients that follow from the files, or from what is made of them."""


def fingerprints(root: Path, of_files: bool) -> dict[str, dict[str, str]]:
    """File → its hash and the digests of its ingredients."""
    found = {}
    for path in sorted(root.rglob("*.parquet")):
        name = str(path.relative_to(root))
        told = pq.read_schema(path).metadata or {}
        if name.startswith("runs/") or (of_files and name.startswith(("manifest/", "views/", "image_embeddings/"))):
            continue
        parts = json.loads(told.get(INPUTS_KEY.encode(), b"{}"))
        if of_files:
            parts = {key: value for key, value in parts.items() if key not in FOLLOWS}
        else:
            parts["hash"] = told[CONFIG_KEY.encode()].decode()
        if parts:
            found[name] = parts
    return found


@pytest.mark.parametrize(
    "world", [pytest.param(world, marks=[pytest.mark.slow] * (world == "experiments")) for world in LAST]
)
def test_fingerprints_are_what_they_were(before_and_after, world):
    """Weights are drawn at random from fixed seeds: those of the torch that wrote the file."""
    _, after, _ = before_and_after(world, LAST[world])
    found = fingerprints(after, world in OF_FILES)
    pinned = json.loads(PINNED.read_text()) if PINNED.exists() else {}
    if PIN in os.environ:
        pinned |= {"torch": torch.__version__, world: found}
        PINNED.write_text(json.dumps(pinned, indent=1, sort_keys=True) + "\n")
    if pinned["torch"] != torch.__version__:
        pytest.skip(f"{PINNED.name} is of torch {pinned['torch']}")
    assert found == pinned[world]
