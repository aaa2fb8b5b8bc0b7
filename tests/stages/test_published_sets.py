"""Published sets through the command line: brought in, described as they are, written out again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from toys import toy_captioner

from milan_ray import cli
from milan_ray.annotations.layout import write_annotations
from milan_ray.captioner.checkpoints import load_reference
from milan_ray.captioner.encoder import get_encoder
from milan_ray.models.weights import weights_digest
from milan_ray.schema import ANNOTATIONS, DESCRIPTIONS
from milan_ray.stages.captioners import save_captioner
from milan_ray.storage import Storage

PLUGIN = str(Path(__file__).resolve().parents[1] / "plugins/tiny_models.py")


@pytest.fixture
def published(tmp_path: Path) -> Path:
    root, rng = tmp_path / "net/photos", np.random.default_rng(0)
    (root / "conv").mkdir(parents=True)
    np.save(root / "conv/images.npy", rng.integers(0, 256, (3, 2, 3, 32, 32), dtype=np.uint8))
    np.save(root / "conv/masks.npy", rng.integers(0, 2, (3, 2, 1, 32, 32), dtype=np.uint8))
    write_annotations(root / "annotations.csv", [("conv", 0, "a dog"), ("conv", 2, "grass")])
    return root


def test_published_set_is_imported_described_without_a_probe_and_exported(ray_session, published, tmp_path, capsys):
    storage = Storage(tmp_path / "run")
    where = ["--storage", storage.root]
    assert cli.main(["annotations", "import", str(published), *where]) == 0
    save_captioner(storage, "toy", toy_captioner(), "A toy.")
    describe = ["describe", "--model", "net/photos", "--decoder", "toy", "--plugin", PLUGIN, "--beam-size", "4", *where]
    assert cli.main([*describe, "--dry-run"]) == 0
    assert "4 tables would be made, 0 are up to date" in capsys.readouterr().out
    assert cli.main(describe) == 0
    found = storage.read(DESCRIPTIONS, labeler="milan", model="net/photos", layer="conv")
    assert found["unit"].to_pylist() == [0, 1, 2]
    assert (tmp_path / "run/report/index.html").is_file()
    distinct = len(set(found["description"].to_pylist()))
    assert f"distinct descriptions (milan): {distinct} among 3 units\n" in capsys.readouterr().err
    assert cli.main(["annotations", "export", "net/photos", str(tmp_path / "out"), *where]) == 0
    for name in ("conv/images.npy", "conv/masks.npy", "annotations.csv"):
        assert (tmp_path / "out" / name).read_bytes() == (published / name).read_bytes()


def test_annotation_count_chooses_units_and_annotations(published, tmp_path):
    storage, file = Storage(tmp_path / "run"), published / "annotations.csv"
    write_annotations(file, [("conv", 0, "a dog"), ("conv", 0, "dogs"), ("conv", 2, "grass")])
    where = ["--storage", storage.root]
    for count, units in (("0", [0, 0, 2]), ("1", [0, 2]), ("2", [0, 0])):
        assert cli.main(["annotations", "import", str(published), "--annotation-count", count, *where]) == 0
        csv = ["annotations", "import", str(file), "--model", "net/photos", "--source", "file"]
        assert cli.main([*csv, "--annotation-count", count, *where]) == 0
        for source in ("milannotations", "file"):
            table = storage.read(ANNOTATIONS, source=source, model="net/photos", layer="conv")
            assert sorted(table["unit"].to_pylist()) == units


def test_describing_exemplars_that_are_not_there_names_those_that_are(published, tmp_path, capsys):
    storage = Storage(tmp_path / "run")
    where = ["--storage", storage.root]
    assert cli.main(["annotations", "import", str(published), *where]) == 0
    save_captioner(storage, "toy", toy_captioner(), "A toy.")
    arguments = ["describe", "--model", "net/photo", "--decoder", "toy", "--plugin", PLUGIN, *where]
    assert cli.main(arguments) == 1
    assert "net/photos" in capsys.readouterr().err


def test_export_writes_a_checkpoint_of_the_reference(tmp_path):
    storage = Storage(tmp_path / "run")
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "encoder.pth")
    toy = toy_captioner("resnet18", sizes=(1024, 8, 12))
    save_captioner(storage, "toy", toy, "A toy.")
    out = tmp_path / "milan-toy.pth"
    arguments = ["export", str(out), "--decoder", "toy", "--encoder-weights", str(tmp_path / "encoder.pth")]
    assert cli.main([*arguments, "--storage", storage.root]) == 0
    back = load_reference(out)
    assert back.indexer.vocabulary == toy.indexer.vocabulary
    encoder = replace(get_encoder("resnet18"), weights=str(tmp_path / "encoder.pth")).load()
    assert weights_digest(back.encoder().backbone) == weights_digest(encoder.backbone)
