"""Generalization through the command line: what trains, what judges, and what is done again."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import spacy

from milan_ray import cli
from milan_ray.annotations.splits import chosen_splits
from milan_ray.captioner.fit import Sizes
from milan_ray.config import Resources, TrainingConfig
from milan_ray.engine.stage import Known, Output, Stage
from milan_ray.schema import ANNOTATIONS, ENCODINGS, EXEMPLARS, GENERALIZATION, HELD_OUT, SCORES, SPLITS, TRAINING
from milan_ray.stages.captioners import EncoderRef, load_captioner
from milan_ray.storage import Storage
from milan_ray.studies.generalization import run as generalization
from milan_ray.studies.generalization.job import GeneralizationConfig, GeneralizationJob
from milan_ray.studies.generalization.run import plan_generalization, run_generalization

PLUGIN = str(Path(__file__).resolve().parents[1] / "plugins/tiny_models.py")
THINGS = ("dog", "cat", "house", "tree")
K, SIZE = 2, 6
WITHIN, ACROSS = "within-mine-a", "mine-a-to-mine-b"


def write_layer(storage: Storage, model: str, units: int) -> None:
    """Encodings that tell a thing, and annotations that name it; the last unit has one exemplar too few."""
    rng = np.random.default_rng(units)
    things = rng.integers(len(THINGS), size=units)
    features = rng.normal(0, 0.1, (units, K, SIZE)).astype(np.float32)
    features[np.arange(units), :, things] += 1
    keys = {"model": model, "layer": "0"}
    rows = units * K - 1
    storage.write(EXEMPLARS, EXEMPLARS.table({column: [] for column in EXEMPLARS.schema.names}), "drawn", **keys)
    encodings = {
        "encoder": ["tiny"] * rows,
        "model": [model] * rows,
        "layer": ["0"] * rows,
        "unit": np.repeat(np.arange(units), K)[:rows],
        "rank": np.tile(np.arange(K), units)[:rows],
        "feature": pa.ListArray.from_arrays(
            np.arange(0, rows * SIZE + 1, SIZE, dtype=np.int32), features.reshape(-1, SIZE)[:rows].ravel()
        ),
    }
    storage.write(ENCODINGS, ENCODINGS.table(encodings), f"encoded {model}", encoder="tiny", **keys)
    annotate(storage, model, [THINGS[thing] for thing in things])


def annotate(storage: Storage, model: str, things: list[str], config: str = "") -> None:
    rows = [
        {"source": "people", "model": model, "layer": "0", "unit": unit, "annotator": who, "text": text.format(thing)}
        for unit, thing in enumerate(things)
        for who, text in (("0", "a {}"), ("1", "{} on the left"))
    ]
    table = pa.Table.from_pylist(rows, schema=ANNOTATIONS.schema)
    storage.write(ANNOTATIONS, table, f"said of {model}{config}", source="people", model=model, layer="0")


TRAINED = TrainingConfig(max_epochs=2)
CONFIG = GeneralizationConfig(2, 0.2, TRAINED, TRAINED, Sizes(8, 16), beam_size=4)


def job_of(**changes: Any) -> GeneralizationJob:
    models = ("mine/a", "mine/b")
    return GeneralizationJob(
        "people",
        dict.fromkeys(models, ("0",)),
        chosen_splits(["mine/a", "mine/a:mine/b"], models),
        EncoderRef("tiny", plugins=(PLUGIN,)),
        replace(CONFIG, **changes),
    )


def generalize(storage: Storage, **changes: Any) -> pl.DataFrame:
    return run_generalization(storage, job_of(**changes), spacy.blank("en"), "rules", Resources(device="cpu"))


class Invented(Stage):
    """Encodings that are there, and come from nowhere."""

    table = ENCODINGS
    name = title = "encodings"

    def __init__(self, *_: object) -> None:
        pass

    def outputs(self, known: Known) -> Iterator[Output]:
        return iter(())


def planned(storage: Storage, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> dict[str, int]:
    """Table → partitions that a dry run would make, where the encodings are those that tests have invented."""
    monkeypatch.setattr(generalization, "Encodings", Invented)
    before = storage.stat("")
    plan = plan_generalization(storage, job_of(**changes), "rules", Resources(device="cpu"))
    assert storage.stat("") == before and not plan.later
    return Counter(step.table for step in plan.due)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    storage = Storage(tmp_path_factory.mktemp("run"))
    write_layer(storage, "mine/a", 21)
    write_layer(storage, "mine/b", 11)
    return storage


@pytest.fixture(scope="module")
def finished(storage: Storage, ray_session: None) -> Storage:
    """A finished experiment: two splits, two trials each."""
    rows = generalize(storage)
    assert rows["split"].n_unique() == 2
    return storage


@pytest.fixture
def done(finished: Storage, tmp_path: Path) -> Storage:
    """A copy of it for each test."""
    return Storage(shutil.copytree(finished.root, tmp_path / "copy"))


def frame(storage: Storage, table, split: str, **keys: str) -> pl.DataFrame:
    return pl.DataFrame(pl.from_arrow(storage.read(table, experiment="generalization", split=split, **keys)))


def test_a_dry_run_says_what_a_run_then_makes(done: Storage, monkeypatch) -> None:
    assert planned(done, monkeypatch) == {}
    stronger = planned(done, monkeypatch, lam=0.5)
    assert stronger == {"held_out": 4, "generalization": 2, "scores": 1}, "captioners stay as they are"
    more = planned(done, monkeypatch, trials=3)
    assert more == {"splits": 2, "training": 2, "held_out": 2, "generalization": 2, "scores": 1}


def test_splits_are_kept_as_a_table(done: Storage) -> None:
    within, across = frame(done, SPLITS, WITHIN), frame(done, SPLITS, ACROSS)
    for trial in (0, 1):
        units = within.filter(trial=trial)
        assert units.height == 20 and units["unit"].n_unique() == 20  # one of 21 is broken
        assert units.filter(part="test").height == 4 and units["model"].unique().to_list() == ["mine/a"]
    tests = [set(within.filter(trial=trial, part="test")["unit"]) for trial in (0, 1)]
    assert tests[0] != tests[1]
    assert set(across.filter(part="train")["model"]) == {"mine/a"}
    assert set(across.filter(part="test")["model"]) == {"mine/b"}


def test_held_out_units_are_described_by_captioners_that_have_not_seen_them(done: Storage) -> None:
    for trial in ("0", "1"):
        said = frame(done, HELD_OUT, WITHIN, trial=trial)
        test = frame(done, SPLITS, WITHIN).filter(trial=int(trial), part="test")
        for system in ("milan", "milan-pdE", "constant", "nearest-copy"):
            assert said.filter(system=system)["unit"].to_list() == test["unit"].to_list()
        name = f"generalization-{WITHIN}-{trial}"
        assert load_captioner(done, name).encoder_state is None
        assert done.count(TRAINING, decoder=name) == 4
        assert "of 16 units of mine/a" in done.get(f"captioners/{name}/about.txt").decode()
    assert set(frame(done, HELD_OUT, ACROSS, trial="0")["model"]) == {"mine/b"}


def test_results_have_trials_and_all_of_them_together(done: Storage) -> None:
    rows = frame(done, GENERALIZATION, ACROSS)
    own = rows.filter(system="milan", metric="rouge-l-f")
    assert own["trial"].to_list() == [0, 1, None] and own["n"].to_list() == [10, 10, 10]
    assert rows.select("kind", "train", "test").unique().rows() == [("own", "mine-a", "mine-b")]
    assert {"words", "length", "bleu", "bleu-1", "bleu-3"} <= set(rows["metric"])
    scores = done.read(SCORES, experiment="generalization").to_pylist()
    assert [row["system"] for row in scores] == ["mine-a → mine-a", "mine-a → mine-b"]
    for ending in ("svg", "png"):
        assert done.exists(f"scores/experiment=generalization/figure.{ending}")


def written(storage: Storage) -> dict[str, object]:
    return {path: stat for path, stat in storage.stat("").items() if not path.startswith("_work")}


def test_what_is_done_is_not_done_again_and_what_is_missing_is(done: Storage, capsys) -> None:
    before = written(done)
    generalize(done)
    assert capsys.readouterr().err.count("up to date") == 6
    assert written(done) == before

    lost = done.path(HELD_OUT, experiment="generalization", split=ACROSS, trial="1")
    done.remove_file(lost)
    generalize(done)
    changed = {path for path, stat in written(done).items() if stat != before[path]}
    assert changed == {lost}, "what a captioner says again is the same, so that nothing behind it changes"


def test_new_annotations_judge_anew_and_train_only_where_they_teach(done: Storage) -> None:
    before = written(done)
    annotate(done, "mine/b", ["boat"] * 11, " again")
    generalize(done, trials=1)
    changed = {path for path, stat in written(done).items() if stat != before.get(path)}
    assert not [path for path in changed if path.startswith(("captioners", "training"))], "nothing trains on mine/b"
    assert done.path(HELD_OUT, experiment="generalization", split=ACROSS, trial="0") in changed
    assert frame(done, GENERALIZATION, ACROSS)["trial"].drop_nulls().unique().to_list() == [0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--split", "nobody"], "unknown group 'nobody'"),
        (["--layers", "9"], "no annotated layer of --layers 9"),
        (["--annotations", "nobody"], "no annotations of source 'nobody'"),
    ],
)
def test_bad_requests_are_one_sentence(storage: Storage, capsys, arguments, says) -> None:
    command = ["generalize", "--storage", storage.root, "--annotations", "people", "--split", "mine/a", *arguments]
    assert cli.main(command) == 1
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error:"))
    assert says in line
