"""Labels and scores from the command line on a real local Ray: whole matrices, and units whose truth is built in."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from milan_ray import cli
from milan_ray.config import Resources
from milan_ray.engine.references import ModelRef, ProbeRef, load, model
from milan_ray.engine.stage import run_stage
from milan_ray.errors import MilanError
from milan_ray.exemplars.pooled import matrix
from milan_ray.labelers.clip_dissect import CLIP_DISSECT
from milan_ray.models.generators import GeneratorRef
from milan_ray.models.image_text import ImageTextRef
from milan_ray.schema import DESCRIPTIONS, EXEMPLARS, IMAGE_EMBEDDINGS, POOLED, SCORES, UNIT_SCORES
from milan_ray.scoring.simulation import held_out
from milan_ray.stages.cosy import CosyConfig
from milan_ray.stages.embeddings import ImageEmbeddings, image_embeddings
from milan_ray.stages.scores import Described, ScoreConfig, described_layers, run_scores, score_stages
from milan_ray.stages.scores import stage as score
from milan_ray.stages.scores.sanity import Sanity
from milan_ray.storage import Storage

PLUGIN = str(Path(__file__).resolve().parents[1] / "plugins/flags.py")
MODEL = ModelRef("flags/watcher", layers=("seen",), plugins=(PLUGIN,))
PROBE = ProbeRef(("flags/some",), plugins=(PLUGIN,))
TRUTH, PAINTER = ImageTextRef("flags/truth"), GeneratorRef("flags/fields")
KEYS = {"model": "flags/watcher", "layer": "seen"}
CLASSES = {("flags/watcher", "seen"): ("red", "green", "blue", "red green", "blue left")}
CONFIG = ScoreConfig(share=0.9, top=0.2, retrieved=10)
ONE = Resources()
SOURCE = ["--model", "flags/watcher", "--layers", "seen", "--plugin", PLUGIN, "--probe", "flags/some"]
SCORE = ["score", *SOURCE, "--held-out", "0.9", "--top", "0.2", "--retrieved", "10"]
DRAW = ["--generator", "flags/fields", "--images", "20", "--prompt", "a field, {}"]


def labelled(path: Path) -> list[str]:
    concepts = path / "concepts.txt"
    concepts.write_text("red\n\ngreen\nblue\nleft\n\n")
    options = ["label", *SOURCE, "--k", "3", "--batch-size", "16", "--no-report", "--storage", str(path / "run")]
    options += ["--labeler", "clip-dissect", "--clip", "flags/truth", "--concepts", str(concepts)]
    return options


@pytest.fixture(scope="module")
def storage(ray_session, tmp_path_factory) -> Storage:
    """Labelled by CLIP-Dissect with the truth for CLIP; scored by the truth, and by images drawn."""
    path = tmp_path_factory.mktemp("scored")
    assert cli.main(labelled(path)) == 0
    assert cli.main([*SCORE, "--storage", str(path / "run"), "--clip", "flags/truth", *DRAW]) == 0
    return Storage(path / "run")


def test_units_are_named_and_a_dry_run_finds_them_done(storage, tmp_path, capsys):
    rows = storage.read(DESCRIPTIONS, labeler=CLIP_DISSECT, **KEYS).to_pylist()
    assert [row["description"] for row in rows[:3]] == ["red", "green", "blue"]
    assert rows[4]["description"] == "blue"  # what is red or green has no name in the list
    options = labelled(tmp_path)
    assert cli.main([*options, "--dry-run"]) == 0
    planned = capsys.readouterr().out
    for part in ("pooled", "image_embeddings  flags/truth", "clip-dissect flags/watcher seen", "4 tables would be"):
        assert part in planned
    done = ["--storage", storage.root, "--dry-run"]
    assert cli.main([*options, *done]) == 0
    assert capsys.readouterr().out.startswith("0 tables would be made")
    assert cli.main([*options, *done, "--concepts", str(tmp_path / "absent.txt")]) == 1
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "--concepts" in error and "one concept per line" in error
    assert cli.main([*labelled(tmp_path)[:-2], *done]) == 0  # the list that the truth brings is another
    assert "concepts changed" in capsys.readouterr().out
    assert cli.main([*options, *done, "--similarity", "soft"]) == 1
    assert "unknown similarity 'soft'; nearest: soft_wpmi" in capsys.readouterr().err


def test_contrasts_are_asked_for_by_mu(storage, capsys):
    options = [*labelled(Path(storage.root).parent), "--mu", "0.5", "--contrasts", "2", "--contrast-quantile", "0.3"]
    assert cli.main([*options, "--dry-run"]) == 0
    planned = capsys.readouterr().out
    assert "contrasts" in planned and "clip-dissect-contrast flags/watcher seen" in planned
    assert cli.main([*options, "--similarity", "cos_similarity", "--dry-run"]) == 1
    assert "has no use for contrasts" in capsys.readouterr().err
    assert cli.main([*labelled(Path(storage.root).parent), "--contrasts", "2"]) == 1
    assert "without --mu --contrasts would do nothing" in capsys.readouterr().err


def described(storage: Storage) -> list[Described]:
    return described_layers(storage, ["flags/watcher"])


def values(storage: Storage, labeler: str = "clip-dissect") -> dict[tuple[str, str, int], dict]:
    rows = storage.read(UNIT_SCORES, predictor="flags/truth", labeler=labeler, **KEYS).to_pylist()
    return {(row["metric"], row["system"], row["unit"]): row for row in rows}


def test_scores_equal_whole_matrices_without_a_units_exemplars(storage):
    (keys,) = storage.partitions(IMAGE_EMBEDDINGS)
    ids, images = image_embeddings(storage, **keys)
    act = matrix(storage.read(POOLED, **KEYS)["mean"]).astype(float)
    exemplars = storage.read(EXEMPLARS, **KEYS).to_pylist()
    found, embedder = values(storage), load(TRUTH)
    for unit in range(5):
        own = {row["image_id"] for row in exemplars if row["unit"] == unit}
        use = held_out(ids, 0.9) & ~np.isin(ids, list(own))
        for system in ("own", "shuffled", "constant"):
            row = found["simulation", system, unit]
            fit = images[use] @ embedder.embed_texts([row["description"]])[0].numpy()
            assert row["images"] == use.sum()
            assert row["value"] == pytest.approx(np.corrcoef(act[use, unit], fit)[0, 1], abs=1e-6)
            best = np.argsort(-act[use, unit], kind="stable")[: round(0.2 * use.sum())]
            steps = [fit >= level for level in np.unique(fit)[::-1]]
            hits = [np.isin(np.flatnonzero(step), best).sum() for step in steps]
            gains = np.diff([0, *hits]) / len(best)
            expected = sum(gain * hit / step.sum() for gain, hit, step in zip(gains, hits, steps, strict=True))
            assert found["auprc", system, unit]["value"] == pytest.approx(expected)
            near = np.argsort(-fit, kind="stable")[:10]
            other = np.delete(act[use, unit], near)
            mad = (act[use, unit][near].mean() - other.mean()) / other.std()
            assert found["retrieval-mad", system, unit]["value"] == pytest.approx(mad, rel=1e-5)


def test_true_descriptions_are_above_the_rows_that_cost_nothing(storage):
    table = storage.read(SCORES, experiment="scores by flags/truth: flags/watcher").to_pylist()
    found = {(row["system"], row["metric"]): row for row in table}
    for metric in ("simulation", "correlation", "auprc", "retrieval-auc"):
        own = found["clip-dissect", metric]
        assert own["n"] == 5 and own["low"] <= own["value"] <= own["high"]
        for system in ("shuffled", "constant"):
            other = found[f"clip-dissect, {system}", metric]
            gap = found[f"clip-dissect − {system}", metric]
            assert gap["value"] == pytest.approx(own["value"] - other["value"]) and gap["value"] > 0
    assert {row["metric"] for row in table if row["system"] == "exemplars"} == {
        "clarity",
        "polysemanticity",
        "redundancy",
    }


def test_exemplars_are_scored_without_words(storage):
    found = values(storage, "exemplars")
    assert len(found) == 15
    assert all(-0.5 <= row["value"] <= 1.5 and row["images"] == 3 for row in found.values())


def test_blocks_of_units_change_nothing_and_a_second_run_does_nothing(storage, tmp_path, monkeypatch, capsys):
    mine = Storage(shutil.copytree(storage.root, tmp_path / "again"))
    before = {path: os.stat(mine.uri(path)).st_mtime_ns for path in mine.files("unit_scores")}
    run_scores(mine, score_stages(described(mine), PROBE, TRUTH, CONFIG), CONFIG, ONE)
    assert before == {path: os.stat(mine.uri(path)).st_mtime_ns for path in mine.files("unit_scores")}
    assert "scores by flags/truth: all up to date" in capsys.readouterr().err
    whole = values(mine)
    mine.remove("unit_scores")
    monkeypatch.setattr(score, "UNITS_PER_SHARD", 2)
    run_scores(mine, score_stages(described(mine), PROBE, TRUTH, CONFIG), CONFIG, ONE)
    for place, row in values(mine).items():
        assert row["value"] == pytest.approx(whole[place]["value"], abs=1e-6)
    assert not mine.files("_work")


def test_images_drawn_for_descriptions_equal_whole_matrices(storage):
    rows = storage.read(UNIT_SCORES, predictor="flags/fields", labeler=CLIP_DISSECT, **KEYS).to_pylist()
    assert len(rows) == 5 * 3 * 2
    spec, painter = model(MODEL), load(PAINTER, (PLUGIN,))
    pooled = storage.read(POOLED, **KEYS)
    ids, control = pooled["image_id"].to_numpy(), matrix(pooled["mean"])
    exemplars = storage.read(EXEMPLARS, **KEYS).to_pylist()
    for row in rows:
        with torch.inference_mode():
            views = torch.from_numpy(painter.generate(f"a field, {row['description']}", 20, 0))
            own = spec.load()(spec.prepare(views)).mean(dim=(2, 3))[:, row["unit"]].numpy()
        left_out = [found["image_id"] for found in exemplars if found["unit"] == row["unit"]]
        other = control[held_out(ids, 0.9) & ~np.isin(ids, left_out), row["unit"]]
        assert row["images"] == len(own) + len(other)
        expected = {
            "cosy-auc": (own[:, None] > other).mean() + 0.5 * (own[:, None] == other).mean(),
            "cosy-mad": (own.mean() - other.mean()) / other.std(),
        }
        assert row["value"] == pytest.approx(expected[row["metric"]], rel=1e-4)
    table = storage.read(SCORES, experiment="scores by flags/fields: flags/watcher").to_pylist()
    found = {(row["system"], row["metric"]): row["value"] for row in table}
    assert found["clip-dissect − shuffled", "cosy-mad"] > 0 and found["clip-dissect − constant", "cosy-auc"] > 0


def test_class_names_and_scores_judged(storage, tmp_path):
    mine = Storage(shutil.copytree(storage.root, tmp_path / "classes"))
    run_scores(mine, score_stages(described(mine), PROBE, TRUTH, CONFIG, CLASSES), CONFIG, ONE)
    found = values(mine)
    assert [found["class-top1", "own", unit]["value"] for unit in range(3)] == [1, 1, 1]
    assert found["class-similarity", "own", 0]["value"] == 1
    assert found["class-similarity", "shuffled", 0]["value"] < 1
    (output,) = run_stage(Sanity(ImageEmbeddings(TRUTH, PROBE), CONFIG, CLASSES), mine, ONE)
    experiment = output.keys["experiment"]
    judged = {(row["system"], row["metric"]): row for row in mine.read(SCORES, experiment=experiment).to_pylist()}
    assert judged["missing labels", "simulation"]["value"] == judged["extra labels", "simulation"]["value"] == 1
    assert judged["extra labels", "retrieval-auc"]["value"] == 1
    with pytest.raises(MilanError, match="class names are for the layer that puts them out"):
        run_scores(
            mine,
            score_stages(described(mine), PROBE, TRUTH, CONFIG, {("flags/watcher", "seen"): ("red",)}),
            CONFIG,
            ONE,
        )


CLASSIFIER = """
import torch
from torch import nn
from milan_ray.models.registry import register_model
from milan_ray.models.view import Preprocess, View


class Classifier(nn.Module):
    def __init__(self, classes):
        super().__init__()
        torch.manual_seed(0)
        self.features, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, classes, 1)

    def forward(self, images):
        return self.head(self.features(images).relu()).amax((-2, -1))


view = Preprocess(View(16, 16), (0, 0, 0), (1, 1, 1))
three = ("red", "green", "blue")
register_model("two/classifier", lambda weights: Classifier(3), ("features", "head"), view, classes=three)
register_model("two/other", lambda weights: Classifier(2), ("features", "head"), view, classes=three)
"""


def test_class_names_are_for_layers_with_as_many_units_as_classes(tmp_path, capsys):
    plugin = tmp_path / "classifier.py"
    plugin.write_text(CLASSIFIER)
    (tmp_path / "concepts.txt").write_text("red\ngreen\nblue\n")
    options = ["--plugin", str(plugin), "--plugin", PLUGIN, "--probe", "flags/some", "--storage", str(tmp_path / "run")]
    label = ["--labeler", "clip-dissect", "--concepts", str(tmp_path / "concepts.txt"), "--k", "3", "--no-report"]
    judge = [*options, "--clip", "flags/truth"]
    models = ["--model", "two/classifier", "two/other"]
    assert cli.main(["label", *models, *judge, *label]) == 0
    capsys.readouterr()
    assert cli.main(["score", *models, *judge, "--class-names"]) == 0
    said = capsys.readouterr().err
    assert "class names: compared in two/classifier head, which have as many units as classes" in said
    for left_out in (
        "two/classifier features (4 units, 3 classes)",
        "two/other features (4 units, 3 classes)",
        "two/other head (2 units, 3 classes)",
    ):
        assert left_out in said
    storage = Storage(tmp_path / "run")
    judged = {
        keys["layer"] + keys["model"]
        for keys in storage.partitions(UNIT_SCORES)
        if "class-top1" in storage.read(UNIT_SCORES, **keys)["metric"].to_pylist()
    }
    assert judged == {"headtwo/classifier"}
    (top,) = [
        row
        for row in storage.read(SCORES, experiment="scores by flags/truth: two/classifier").to_pylist()
        if (row["system"], row["metric"]) == ("clip-dissect", "class-top1")
    ]
    assert top["n"] == 3  # the units of the head, and none of another layer
    assert cli.main(["score", "--model", "two/other", *judge, "--class-names"]) == 1
    assert "class names are for the layer that puts the classes out, which has as many units: not " in (
        capsys.readouterr().err
    )


def test_what_cannot_be_scored_says_so(storage, tmp_path):
    with pytest.raises(MilanError, match="no descriptions of flags/watcher by milan"):
        described_layers(storage, ["flags/watcher"], ["milan"])
    mine = Storage(shutil.copytree(storage.root, tmp_path / "refused"))
    mine.remove(POOLED.name)
    with pytest.raises(MilanError, match="no pooled activations of this probe"):
        run_scores(mine, score_stages(described(mine), PROBE, TRUTH, CONFIG), CONFIG, ONE)
    with pytest.raises(MilanError, match=r"no \{\} in the place"):
        CosyConfig(template="a photo")
    with pytest.raises(MilanError, match="unknown generator 'flags/field'; nearest: flags/fields"):
        load(GeneratorRef("flags/field"), (PLUGIN,))


def test_command_line_says_what_is_up_to_date_and_what_is_missing(storage, capsys):
    options = [*SCORE, "--storage", storage.root]
    assert cli.main([*options, "--clip", "flags/truth", *DRAW]) == 0
    said = capsys.readouterr().err
    assert "scores by flags/truth: all up to date" in said and "scores by flags/fields: all up to date" in said
    assert "simulation: clip-dissect " in said and "· clip-dissect, shuffled" in said and "cosy-auc: " in said
    planned = [*options, "--clip", "flags/truth", *DRAW, "--dry-run"]
    assert cli.main(planned) == 0
    assert capsys.readouterr().out == "0 tables would be made, 6 are up to date; nothing was done.\n"
    assert cli.main([*planned, "--prompt", "{}", "--json"]) == 0
    (due,) = json.loads(capsys.readouterr().out)["planned"]
    assert due["keys"] == ["flags/fields", "clip-dissect", "flags/watcher", "seen"] and due["reason"] == "cosy changed"
    assert cli.main(options) == 1
    assert "give what judges" in capsys.readouterr().err
    assert cli.main([*options, "--clip", "flags/truth", "--class-names"]) == 1
    assert "without names of its classes" in capsys.readouterr().err
