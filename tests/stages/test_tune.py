"""Tuning on a real local Ray Tune, against decoding by hand."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import torch
from gates import Gate
from toys import toy_captioner

from milan_ray import runtime
from milan_ray.labelers.milan import MILAN

runtime.prepare(None)  # before anything imports Ray: this file is a job, too

from milan_ray.captioner.captioner import Captioner, best_descriptions
from milan_ray.captioner.rerank import choice_order
from milan_ray.captioner.text import Vocabulary, readable
from milan_ray.cli.describe import search_of
from milan_ray.config import Resources
from milan_ray.engine.cluster import connected
from milan_ray.engine.stage import Known
from milan_ray.errors import MilanError
from milan_ray.schema import ANNOTATIONS, CANDIDATES, CONTRAST_ENCODINGS, DESCRIPTIONS, ENCODINGS, SCORES, TRIALS
from milan_ray.scoring.text import bleu_statistics, bleu_values
from milan_ray.stages import tuning, tuning_trial
from milan_ray.stages.captioners import save_captioner
from milan_ray.stages.descriptions import Search, run_descriptions
from milan_ray.stages.tuning import Tuning
from milan_ray.stages.tuning_statistics import Sweep, read_setting, split_units
from milan_ray.stages.tuning_trial import TuningJob
from milan_ray.storage import EXEMPLARS_KEY, UNITS_KEY, Storage

ROOT = Path(__file__).resolve().parents[2]
UNITS = {"a": range(12), "b": range(8)}
LAYERS = {"toy/model": tuple(UNITS)}
WORDS = [["the red house", "dark areas"], ["a dog", "dogs on grass"], ["blue sky", "areas of the sky"]]
SWEEP = Sweep((3, 6), (0.0, 0.2, 2.0), ("greedy", "greedy-mi", "beam", "rerank"), (5,), "bleu-2", samples=50)
JOB = TuningJob("toy-sweep", "toy", "people", tuple(("toy/model", layer) for layer in UNITS), SWEEP)
KEYS = {"decoder": "toy", "sweep": "toy-sweep"}


def peaked_captioner() -> Captioner:
    captioner = toy_captioner(vocabulary=Vocabulary.build(WORDS))
    with torch.no_grad():
        for parameter in captioner.decoder.parameters():
            parameter.mul_(4)  # so that units differ
    return captioner


def features() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {layer: rng.normal(size=(len(units), 4, 10)).astype(np.float32) for layer, units in UNITS.items()}


def fill(root: Path) -> Storage:
    """A run directory with a captioner, encodings and annotations."""
    storage = Storage(root)
    save_captioner(storage, "toy", peaked_captioner(), "A toy.")
    for layer, values in features().items():
        n, k, _ = values.shape
        keys = {"model": "toy/model", "layer": layer}
        encoded = {
            "encoder": ["tiny"] * n * k,
            "model": ["toy/model"] * n * k,
            "layer": [layer] * n * k,
            "unit": np.repeat(np.arange(n), k),
            "rank": np.tile(np.arange(k), n),
            "feature": list(values.reshape(n * k, -1)),
        }
        storage.write(ENCODINGS, ENCODINGS.table(encoded), "encoded", encoder="tiny", **keys)
        texts = [text for unit in range(n) for text in WORDS[unit % 3]]
        annotated = {
            "source": ["people"] * len(texts),
            "model": ["toy/model"] * len(texts),
            "layer": [layer] * len(texts),
            "unit": np.repeat(np.arange(n), 2),
            "annotator": ["1", "2"] * n,
            "text": texts,
        }
        storage.write(ANNOTATIONS, ANNOTATIONS.table(annotated), "annotated", source="people", **keys)
    return storage


@pytest.fixture(scope="module")
def storage(ray_session, tmp_path_factory) -> Storage:
    storage = fill(tmp_path_factory.mktemp("run"))
    Tuning(JOB).run(storage, Resources())
    return storage


def trials(storage: Storage) -> pl.DataFrame:
    return pl.DataFrame(storage.read(TRIALS, **KEYS))


def bleu_2(texts: list[str], places: np.ndarray) -> float:
    references = [WORDS[unit % 3] for units in UNITS.values() for unit in units]
    statistics = bleu_statistics([texts[i] for i in places], [references[i] for i in places])
    return float(bleu_values(statistics.sum(axis=0, keepdims=True), 2)[0])


def said_by_hand(strategy: str, beam_size: int | None, lam: float) -> list[str]:
    mi, captioner, length = strategy.endswith("-mi"), peaked_captioner(), SWEEP.lengths[0]
    said: list[str] = []
    for values in features().values():
        if strategy.startswith("greedy"):
            said += captioner.decode(values, "greedy", mi, lam, length=length).texts
            continue
        candidates = captioner.candidates(values, beam_size, length, lam if mi else None)
        best = best_descriptions(candidates, lam if strategy == "rerank" else 0.0)
        said += [description.text for (description,) in best]
    return said


def test_trials_equal_decoding_by_hand(storage):
    rows = trials(storage).filter(pl.col("metric") == "bleu-2")
    split = split_units(20, SWEEP)
    tried = rows.select("strategy", "beam_size", "lam").unique().rows()
    assert len(tried) == 1 + 2 + 2 * 3
    for row in rows.iter_rows(named=True):
        said = said_by_hand(row["strategy"], row["beam_size"], row["lam"])
        assert row["value"] == pytest.approx(bleu_2(said, split[row["split"]])), row
        assert row["low"] <= row["high"] and row["n"] == 10


def test_the_choice_is_the_best_on_validation_and_what_describing_says(storage):
    rows = trials(storage).filter(pl.col("metric") == "bleu-2")
    eligible = rows.filter(pl.col("split") == "validation", pl.col("strategy") != "greedy-mi")
    chosen = rows.filter("chosen")
    assert chosen["split"].to_list() == ["validation", "held-out"]
    assert chosen["value"][0] == eligible["value"].max()
    path = Path(storage.root, storage.path(TRIALS, **KEYS)).with_name("setting.yaml")
    setting = read_setting(path.read_text(encoding="utf-8"), "setting.yaml")
    run_descriptions(storage, LAYERS, Search("toy", setting.beam_size, setting.length, setting.lam), Resources())
    said = [
        text
        for layer in UNITS
        for text in storage.read(DESCRIPTIONS, labeler=MILAN, model="toy/model", layer=layer)["description"].to_pylist()
    ]
    assert bleu_2(said, split_units(20, SWEEP)["held-out"]) == pytest.approx(chosen["value"][1])
    options = {"beam_size": None, "length": None, "lam": 7.0, "setting": str(path), "reference_quirks": False}
    arguments = argparse.Namespace(**options)
    assert search_of(arguments, "toy") == Search("toy", setting.beam_size, setting.length, 7.0)


def test_held_out_units_judge_the_choice_in_the_scores(storage):
    rows = storage.read(SCORES, experiment="tuning of toy by toy-sweep").to_pylist()
    assert {row["n"] for row in rows} == {10}
    systems = {row["system"] for row in rows}
    others = {system for system in systems if system.startswith("λ")}  # λ = 0, or the paper's, if it is not chosen
    assert others and len(systems) == 1 + 2 * len(others)  # each with its difference from the chosen one
    assert sum(" − " in system for system in systems) == len(others)
    assert Path(storage.root, storage.path(TRIALS, **KEYS)).with_name("figure.svg").stat().st_size > 1000


def test_tuning_again_does_nothing(storage, capsys):
    path = Path(storage.root, storage.path(TRIALS, **KEYS))
    before = path.stat().st_mtime_ns
    tunings = [Tuning(JOB), Tuning(replace(JOB, sweep=replace(SWEEP, validation=0.3)))]
    trials = len(SWEEP.trials())
    reasons = [tuning.why(storage, output) for tuning in tunings for output in tuning.outputs(Known(storage))]
    assert reasons == [None, f"{trials} trials: validation changed"]
    storage.put_work(storage.config_of(TRIALS, **KEYS), "left", pa.table({"by": ["a killed job"]}))
    Tuning(JOB).run(storage, Resources())
    assert path.stat().st_mtime_ns == before and "up to date" in capsys.readouterr().err
    assert not Path(storage.root, "_work").exists()


def test_candidates_of_the_storage_are_rescored_and_not_searched_again(ray_session, tmp_path):
    storage = fill(tmp_path)
    run_descriptions(storage, LAYERS, Search("toy", 3, 5, 0.0), Resources())
    for layer in UNITS:
        keys = {"decoder": "toy", "model": "toy/model", "layer": layer}
        table = storage.read(CANDIDATES, **keys)
        units = table["unit"].to_numpy()
        texts = [WORDS[unit % 3][0] for unit in units]
        place = table.schema.get_field_index("text")
        changed = table.set_column(place, table.schema.field(place), [texts])
        meta = storage.metadata(CANDIDATES, **keys)
        assert meta is not None
        storage.write(CANDIDATES, changed, meta["milan_ray.config"], **keys)
    Tuning(replace(JOB, sweep=replace(SWEEP, strategies=("beam",), beam_sizes=(3,)))).run(storage, Resources())
    rows = trials(storage).filter(pl.col("metric") == "rouge-1-f", pl.col("split") == "held-out")
    assert rows["value"].to_list() == pytest.approx([rows["value"].max()]) and rows["value"][0] > 0.5


@pytest.mark.slow
def test_a_killed_tuning_goes_on_where_it_was(storage, kill_all, tmp_path, tmp_path_factory):
    resumed = fill(tmp_path)
    gate = Gate(tmp_path_factory.mktemp("gate"), r"/scores/[^/]+\.arrow$", 3)  # two trials are done, the third is not
    command = [sys.executable, __file__, str(tmp_path)]
    first = subprocess.Popen(command, cwd=ROOT, start_new_session=True, env=gate.environment)
    gate.wait(first)
    kill_all(first)
    (work,) = (path.name for path in tmp_path.glob("_work/*") if path.is_dir())
    assert not (tmp_path / "trials").exists()
    done = resumed.work_names(work, "scores")
    assert len(done) == 2 < len(SWEEP.trials())
    for name in done:  # marked, to see that they are not made again
        table = pl.DataFrame(resumed.get_work(work, name))
        marked = table.with_columns(
            pl.when(pl.col("metric") == "rouge-1-f").then(1000.0).otherwise("value").alias("value")
        )
        resumed.put_work(work, name, marked.to_arrow().replace_schema_metadata({"search": "0", "score": "0"}))
    Tuning(JOB).run(resumed, Resources())
    found, undisturbed = trials(resumed), trials(storage)
    mark = pl.col("value") == 1000
    assert found.filter(mark).height == 2 * sum(
        len(trial.lams) for trial in SWEEP.trials() if f"scores/{trial.name}" in done
    )
    assert found.filter(~mark).equals(undisturbed.filter(~found["value"].eq(1000.0)))


def test_what_a_captioner_cannot_do_is_said_before_any_trial(storage):
    for sweep, says in (
        (replace(SWEEP, beam_sizes=(500,)), "a beam of 500 does not fit"),
        (replace(SWEEP, metric="bertscore-f"), "bertscore-f needs a language model"),
    ):
        with pytest.raises(MilanError, match=says):
            Tuning(replace(JOB, sweep=sweep)).run(storage, Resources())
    save_captioner(storage, "mute", replace(peaked_captioner(), lm=None), "No language model.")
    with pytest.raises(MilanError, match="has no language model"):
        Tuning(replace(JOB, decoder="mute")).run(storage, Resources())


def test_trials_with_contrasts_equal_ranking_by_hand(storage, tmp_path, monkeypatch):
    copy = Storage(shutil.copytree(storage.root, tmp_path / "copy"))
    sweep = Sweep((6,), (0.0, 0.2), ("beam", "rerank", "contrast"), (5,), "bleu-2", samples=50, mus=(0.3, 0.8))
    job = replace(JOB, name="contrasts", sweep=sweep)
    with pytest.raises(MilanError, match="describe --contrast MODEL"):
        Tuning(job).run(copy, Resources())
    of = [copy.exemplars_of(ENCODINGS, encoder="tiny", model="toy/model", layer=layer) for layer in features()]
    own = {EXEMPLARS_KEY: of[0]} if of[0] else {}
    others = {layer: np.flip(values, axis=0)[1:, :3].copy() for layer, values in features().items()}  # last unit: none
    for layer, values in others.items():
        n, k, _ = values.shape
        columns = {"unit": np.repeat(np.arange(n), k), "rank": np.tile(np.arange(k), n)}
        keys = {"encoder": "tiny", "model": "toy/model", "layer": layer}
        rows = CONTRAST_ENCODINGS.table(columns | {"feature": list(values.reshape(n * k, -1))}, **keys)
        for wrong, says in (
            ({EXEMPLARS_KEY: "x"}, "of earlier exemplars"),
            ({UNITS_KEY: "1,2"}, "units 1,2 alone"),
        ):
            copy.write(CONTRAST_ENCODINGS, rows.replace_schema_metadata(own | wrong), "contrasts", **keys)
            with pytest.raises(MilanError, match=says):
                Tuning(replace(job, layers=(("toy/model", layer),))).run(copy, Resources())
        rows = rows.replace_schema_metadata(own)
        copy.write(CONTRAST_ENCODINGS, rows, "contrasts", **keys)

    def here(storage, task, trials, resources):
        for trial in trials:
            tuning_trial.run_trial({"trial": asdict(trial)}, task)

    monkeypatch.setattr(tuning, "_run_trials", here)
    monkeypatch.setattr("milan_ray.engine.tuner.report", lambda scores: None)
    setting = Tuning(job).run(copy, Resources())
    tried = pl.DataFrame(copy.read(TRIALS, decoder="toy", sweep="contrasts")).filter(pl.col("metric") == "bleu-2")
    split = split_units(20, sweep)
    assert len(tried.select("strategy", "lam", "mu").unique()) == 2 + 4
    for row in tried.iter_rows(named=True):
        said = said_with_contrasts(others, row["lam"], row["mu"])
        assert row["value"] == pytest.approx(bleu_2(said, split[row["split"]])), row
    best = tried.filter("chosen").row(0, named=True)
    assert best["value"] == tried.filter(pl.col("split") == "validation")["value"].max()
    assert (setting.lam, setting.mu) == (best["lam"], best["mu"])
    assert len({tuple(said_with_contrasts(others, 0.2, mu)) for mu in (0.0, 0.3, 0.8)}) == 3  # μ matters


def said_with_contrasts(others: dict[str, np.ndarray], lam: float, mu: float) -> list[str]:
    captioner, said = peaked_captioner(), []
    for layer, values in features().items():
        found = captioner.candidates(values, 6, 5)
        for unit, texts in enumerate(found.texts):
            scores = found.scores(lam)[unit].copy()
            for beam, tokens in enumerate(found.tokens[unit]):
                if unit < len(others[layer]):
                    images = torch.from_numpy(others[layer][unit])[None]
                    with torch.no_grad():
                        log_probs, _ = captioner.decoder(images, torch.tensor([tokens]))
                    scores[beam] -= mu * float(log_probs[0].gather(1, torch.tensor([tokens]).T).sum())
            order = choice_order(scores, texts, found.finished[unit])
            said.append(readable(texts[order[0]]))
    return said


if __name__ == "__main__":
    with connected(Resources()):
        Tuning(JOB).run(Storage(sys.argv[1]), Resources(actors=1))
