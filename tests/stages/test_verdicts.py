"""Verdicts end to end: descriptions of known units, some of them false, judged by the truth of concept maps."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from milan_ray import cli
from milan_ray.exemplars.pooled import matrix
from milan_ray.schema import CALIBRATIONS, DESCRIPTIONS, EXEMPLARS, POOLED, SCORES, VERDICTS
from milan_ray.scoring.presence import presence_scores
from milan_ray.scoring.simulation import held_out
from milan_ray.scoring.verdicts import weigh
from milan_ray.stages.scores import Described, class_layers, verdicts
from milan_ray.stages.scores.inputs import SYSTEMS
from milan_ray.storage import EXEMPLARS_KEY, Storage

PLUGIN = str(Path(__file__).resolve().parents[1] / "plugins/patches.py")
PLACES = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
TRUE = (*PLACES, *PLACES)
FALSE = {3: "one", 17: "two", 20: "one"}
SAID = [*(FALSE.get(unit, f"the place {name}") for unit, name in enumerate(TRUE)), "nothing"]
NETWORKS = ("watcher", "twin", "untrained-1", "untrained-2")
KEYS = {"predictor": "patches/truth", "labeler": "people", "layer": "seen"}
SOURCE = ["--plugin", PLUGIN, "--probe", "patches"]
WATCHER, TWIN = "patches/watcher", "patches/twin"
UNTRAINED = ["--calibrate", "patches/untrained-1", "patches/untrained-2"]


def score(storage: Storage | Path | str, *more: str, model: str = WATCHER) -> list[str]:
    root = storage.root if isinstance(storage, Storage) else str(storage)
    return ["score", "--model", model, *SOURCE, "--clip", "patches/truth", "--storage", root, *more]


def describe(storage: Storage, model: str, texts: list[str]) -> None:
    keys = {"labeler": "people", "model": model, "layer": "seen"}
    rows = [{**keys, "unit": u, "description": t, "score": 0.0, "n_best": []} for u, t in enumerate(texts)]
    table = DESCRIPTIONS.table({c.name: [row.get(c.name) for row in rows] for c in DESCRIPTIONS.columns})
    storage.write(DESCRIPTIONS, table, f"said of {model}", **keys)


@pytest.fixture(scope="module")
def described(ray_session, tmp_path_factory) -> Storage:
    """Four networks: two with known units, of whose descriptions some are false, and two untrained ones."""
    path = tmp_path_factory.mktemp("judged") / "run"
    models = [f"patches/{name}" for name in NETWORKS]
    options = ["exemplars", "--model", *models, *SOURCE, "--k", "4", "--pooled", "--storage", str(path), "--no-report"]
    assert cli.main(options) == 0
    storage, rng = Storage(path), np.random.default_rng(0)
    for model in models[:2]:
        describe(storage, model, SAID)
    for model in models[2:]:
        describe(storage, model, [*rng.choice(PLACES, 24).tolist(), "nothing"])
    assert cli.main(score(storage)) == 0
    return storage


@pytest.fixture
def mine(described, tmp_path) -> Storage:
    return Storage(shutil.copytree(described.root, tmp_path / "mine"))


def rows(storage: Storage, model: str = WATCHER, labeler: str = "people") -> dict[tuple[str, int], dict]:
    table = storage.read(VERDICTS, **KEYS | {"labeler": labeler}, model=model)
    return {(row["system"], row["unit"]): row for row in table.to_pylist()}


def test_true_descriptions_are_supported_and_false_ones_are_not(described):
    found = rows(described)
    for unit in range(24):
        row = found["own", unit]
        assert row["description"] == SAID[unit] and row["probability"] is None
        assert (row["verdict"] == "supported") == (unit not in FALSE), row
        assert row["score"] > row["others"] if unit not in FALSE else row["score"] < row["best"]
    silent = found["own", 24]
    assert silent["verdict"] == "nothing to describe" and silent["score"] is None and silent["p"] is None
    assert sum(found["shuffled", unit]["verdict"] == "supported" for unit in range(24)) <= 2
    assert {found["constant", unit]["verdict"] for unit in range(24)} <= {"unsupported", "nothing to describe"}


def test_evidence_equals_correlations_of_whole_matrices_without_a_units_exemplars(described):
    found = rows(described)
    shown = np.array([np.random.default_rng([7, n]).random(12) < 0.25 for n in range(200)]).astype(float)
    pooled = described.read(POOLED, model=WATCHER, layer="seen")
    activations, ids = matrix(pooled["mean"]).astype(float), pooled["image_id"].to_numpy()
    exemplars = described.read(EXEMPLARS, model=WATCHER, layer="seen").to_pylist()
    texts = sorted(set(SAID))
    fit = np.stack([shown[ids, PLACES.index(t.split()[-1])] if t != "nothing" else 0 * ids for t in texts], axis=1)
    scores = np.full((25, len(texts)), np.nan)
    for unit in range(24):
        use = ~np.isin(ids, [row["image_id"] for row in exemplars if row["unit"] == unit])
        assert found["own", unit]["images"] == use.sum() == 196
        for place, text in enumerate(texts):
            one = fit[use, place]
            scores[unit, place] = np.corrcoef(activations[use, unit], one)[0, 1] if text != "nothing" else 0.0
    evidence = weigh(scores, np.array([texts.index(text) for text in SAID]))
    for name in ("score", "others", "best", "excess", "p", "q"):
        values = [found["own", unit][name] for unit in range(24)]
        np.testing.assert_allclose(np.array(values, float), getattr(evidence, name)[:24], atol=1e-6)


def test_shares_of_verdicts_stand_beside_those_of_trivial_baselines(described):
    table = described.read(SCORES, experiment=f"verdicts by patches/truth: {WATCHER}").to_pylist()
    shares = {(row["system"], row["metric"]): row for row in table}
    assert shares["people", "supported"]["value"] == pytest.approx(21 / 25)
    assert shares["people, shuffled", "supported"]["value"] <= 2 / 25
    assert shares["people, constant", "supported"]["value"] == 0
    assert shares["people", "supported"]["low"] < 21 / 25 < shares["people", "supported"]["high"]


def test_shards_change_nothing_and_a_second_run_does_nothing(mine, monkeypatch, capsys):
    before = {path: os.stat(mine.uri(path)).st_mtime_ns for path in mine.files("verdicts")}
    assert cli.main(score(mine)) == 0
    assert before == {path: os.stat(mine.uri(path)).st_mtime_ns for path in mine.files("verdicts")}
    assert "verdicts by patches/truth: all up to date" in capsys.readouterr().err
    (path,) = before
    whole = mine.get(path)
    mine.remove("verdicts")
    monkeypatch.setattr(verdicts, "UNITS_PER_SHARD", 7)
    assert cli.main(score(mine)) == 0
    assert mine.get(path) == whole and not mine.files("_work")


def test_held_out_share_pooling_and_seed_decide(mine, capsys):
    planned = ["--dry-run", "--json"]
    assert cli.main(score(mine, "--retrieved", "9", *planned)) == 0  # not a matter of verdicts
    assert "verdicts" not in {step["table"] for step in json.loads(capsys.readouterr().out)["planned"]}
    for option in (["--top", "0.2"], ["--pooling", "max"], ["--held-out", "0.5"], ["--seed", "3"]):
        assert cli.main(score(mine, *option, *planned)) == 0
        assert "verdicts" in {step["table"] for step in json.loads(capsys.readouterr().out)["planned"]}
    assert cli.main(score(mine, "--held-out", "0.5")) == 0
    ids = mine.read(POOLED, ["image_id"], model=WATCHER, layer="seen")["image_id"].to_numpy()
    assert rows(mine)["own", 0]["images"] <= held_out(ids, 0.5).sum() < 120


def test_calibration_learns_from_known_concepts_and_untrained_networks_alone(mine, capsys):
    assert cli.main(score(mine, *UNTRAINED, "--dry-run")) == 0
    plan = capsys.readouterr().out
    for part in ("verdicts      patches/truth truth patches/watcher seen", "calibrations  patches/truth"):
        assert part in plan
    assert cli.main(score(mine, *UNTRAINED)) == 0
    (curve,) = mine.read(CALIBRATIONS, predictor="patches/truth").to_pylist()
    assert curve["models"] == ["patches/untrained-1", "patches/untrained-2", "patches/watcher"]
    assert curve["true"] == 24 and curve["false"] > 48 and curve["slope"] > 0 and curve["auroc"] > 0.9
    for model in ("patches/untrained-1", "patches/watcher"):  # learned from: no probability
        assert {row["probability"] for row in rows(mine, model).values()} == {None}
    capsys.readouterr()
    assert cli.main(score(mine, *UNTRAINED, "--dry-run")) == 0
    assert capsys.readouterr().out.startswith("0 tables would be made")
    assert cli.main(score(mine, model=TWIN)) == 0
    found = rows(mine, TWIN)
    for unit in range(24):
        probability = found["own", unit]["probability"]
        expected = 1 / (1 + np.exp(-curve["intercept"] - curve["slope"] * found["own", unit]["excess"]))
        assert probability == pytest.approx(expected)
        if unit in FALSE:
            assert probability < 0.1
        elif (unit + 12) % 24 not in FALSE:  # a unit of the same place that is described otherwise makes it less sure
            assert probability > 0.5
    assert found["own", 24]["probability"] is None


def test_verdicts_are_made_again_when_there_is_a_calibration(mine, capsys):
    assert cli.main(score(mine, model=TWIN)) == 0
    assert rows(mine, TWIN)["own", 0]["probability"] is None
    assert cli.main(score(mine, *UNTRAINED)) == 0
    capsys.readouterr()
    assert cli.main(score(mine, "--dry-run", model=TWIN)) == 0
    plan = capsys.readouterr().out
    assert re.search("verdicts +patches/truth people patches/twin seen +calibration changed", plan), plan
    assert cli.main(score(mine, model=TWIN)) == 0
    assert rows(mine, TWIN)["own", 0]["probability"] > 0.5


def test_calibration_from_networks_without_descriptions_is_one_sentence(mine, capsys):
    assert cli.main(score(mine, "--calibrate", "patches/nowhere")) == 1
    assert "no descriptions of patches/nowhere" in capsys.readouterr().err
    assert cli.main(["score", "--model", WATCHER, *SOURCE, "--generator", "g", *UNTRAINED]) == 1
    assert "without --clip --calibrate would do nothing" in capsys.readouterr().err


def test_calibration_takes_no_untrained_network_for_a_known_one_and_names_those_that_are_not_there(mine, capsys):
    both = ["patches/untrained-1", *UNTRAINED]
    assert cli.main([*score(mine), *both[1:], "--dry-run"]) == 0
    assert cli.main(["score", "--model", WATCHER, both[0], *score(mine)[3:], *UNTRAINED]) == 0
    (curve,) = mine.read(CALIBRATIONS, predictor="patches/truth").to_pylist()
    assert curve["true"] == 24  # of the watcher's units alone
    capsys.readouterr()
    assert cli.main(score(mine, *UNTRAINED, model="patches/untrained-1")) == 1
    assert "learns true descriptions from other networks" in capsys.readouterr().err
    assert cli.main(score(mine, *UNTRAINED, "patches/nowhere")) == 1
    assert "no descriptions of patches/nowhere" in capsys.readouterr().err


def test_labels_of_earlier_exemplars_are_not_judged(mine, capsys):
    keys = {"labeler": "people", "model": WATCHER, "layer": "seen"}
    table = mine.read(DESCRIPTIONS, **keys)
    mine.write(DESCRIPTIONS, table.replace_schema_metadata({EXEMPLARS_KEY: "earlier"}), "said", **keys)
    assert cli.main(score(mine)) == 1
    assert "is of earlier exemplars: make these labels again" in capsys.readouterr().err


def test_features_are_no_classes_though_they_are_as_many(mine):
    table, meta = (of(POOLED, model=WATCHER, layer="seen") for of in (mine.read, mine.metadata))
    mine.write(POOLED, table.replace_schema_metadata(meta), "c", model=WATCHER, layer="seen#sae")
    described = [Described("people", WATCHER, layer) for layer in ("seen", "seen#sae")]
    assert list(class_layers(mine, described, {WATCHER: tuple(map(str, range(25)))})) == [(WATCHER, "seen")]


def test_scores_of_presence_stand_beside_and_are_judged_by_supported_descriptions(mine, capsys):
    shown = np.array([np.random.default_rng([7, n]).random(12) < 0.25 for n in range(200)]).astype(float)
    pooled = mine.read(POOLED, model=WATCHER, layer="seen")
    activations, ids = matrix(pooled["mean"]).astype(float), pooled["image_id"].to_numpy()
    assert cli.main(score(mine, "--top", "0.2", "--retrieved", "10")) == 0
    said = capsys.readouterr().err
    found, exemplars = rows(mine), mine.read(EXEMPLARS, model=WATCHER, layer="seen").to_pylist()
    for unit in (0, 3, 17):
        use = ~np.isin(ids, [row["image_id"] for row in exemplars if row["unit"] == unit])
        for system in SYSTEMS:
            row = found[system, unit]
            if row["description"] != "nothing":
                present = shown[ids, PLACES.index(row["description"].split()[-1])][use]
                for metric, measure in presence_scores(0.2).items():
                    value = row["score" if metric == "correlation" else metric]
                    assert value == pytest.approx(measure(activations[use, unit], present), abs=1e-6)
    assert found["own", 24]["f1"] is None
    experiment = f"scores judged by supported descriptions: {WATCHER} seen"
    judged = {(row["system"], row["metric"]): row for row in mine.read(SCORES, experiment=experiment).to_pylist()}
    assert judged["missing labels", "f1"]["n"] == 21
    for metric in ("f1", "iou", "correlation", "cosine", "auprc"):
        assert min(judged[test, metric]["value"] for test in ("missing labels", "extra labels")) >= 0.75, metric
    assert judged["missing labels", "retrieval-auc"]["value"] < 0.75
    assert "retrieval-auc (fails: missing labels): people" in said and "  correlation: people" in said
    site = Path(mine.root) / "report"
    assert cli.main(["report", "--storage", mine.root, "--report", str(site)]) == 0
    pages = "".join(path.read_text() for path in site.rglob("index.html"))
    assert '<th scope="col">retrieval-auc – fails: missing labels</th>' in pages
    assert '<th scope="col">correlation</th>' in pages
    (units,) = [path.read_text() for path in site.rglob("units.js") if "retrieval-auc" in path.read_text()]
    assert "retrieval-auc (patches/truth) \\u2013 fails: missing labels" in units
