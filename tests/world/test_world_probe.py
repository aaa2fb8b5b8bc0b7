from __future__ import annotations

import hashlib
import pickle

import numpy as np
import pytest

from milan_ray.errors import MilanError
from milan_ray.probe.base import ImageRef
from milan_ray.schema import MANIFEST
from milan_ray.world.probe import WORLD_DIGEST, WorldProbe


def refs(probe: WorldProbe) -> list[ImageRef]:
    rows = probe.manifest().select(["image_id", "root", "path"]).to_pylist()
    return [ImageRef(**row) for row in rows]


def test_manifest_has_labels_and_the_worlds_version() -> None:
    table = WorldProbe("probe", 5).manifest()
    assert table.schema.equals(MANIFEST.schema)
    assert table["image_id"].to_pylist() == [0, 1, 2, 3, 4]
    assert set(table["etag"].to_pylist()) == {WORLD_DIGEST}
    assert table["class_label"].to_pylist() == [WorldProbe("probe", 5).scene(i).label for i in range(5)]


def test_read_gives_the_same_pixels_on_every_machine() -> None:
    probe = WorldProbe("heldout", 3)
    ref = refs(probe)[2]
    first, second = probe.read(ref), pickle.loads(pickle.dumps(probe)).read(ref)
    assert first.sha256 == second.sha256 == hashlib.sha256(np.asarray(first.image).tobytes()).hexdigest()
    assert first.image.size == (64, 64)
    assert first.image.mode == "RGB"


def test_options_change_root_and_pixels() -> None:
    plain, marked = WorldProbe("probe", 2), WorldProbe("probe", 2, spurious="text")
    assert plain.name == "world:probe"
    assert marked.name == "world:probe+spurious-text"
    assert WorldProbe("probe", 2, False, "colour", 0.5, True).name == "world:probe+spurious-colour-0.5+misleading"
    assert plain.read(refs(plain)[0]).sha256 != marked.read(refs(marked)[0]).sha256


def test_unknown_split_and_empty_probe_are_refused() -> None:
    with pytest.raises(MilanError, match="no split 'test'"):
        WorldProbe("test", 5)
    with pytest.raises(MilanError, match="choose one of text, colour"):
        WorldProbe("train", 5, spurious="smell")
    with pytest.raises(MilanError, match="empty"):
        WorldProbe("train", 0)
