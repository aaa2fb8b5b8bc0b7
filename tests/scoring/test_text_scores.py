import json
from pathlib import Path

import numpy as np
import pytest

from milan_ray.errors import MilanError
from milan_ray.scoring.text import (
    BERTSCORE_KEYS,
    ROUGE_KEYS,
    BertScore,
    bleu,
    bleu_score,
    bleu_statistics,
    bleu_values,
    minilm_directory,
    rouge,
    rouge_statistics,
)

CASES = ["three_refs", "uneven_refs", "string_refs", "empty_pred"]


@pytest.fixture(scope="module")
def metrics(golden: Path) -> dict:
    return json.loads((golden / "metrics" / "metrics.json").read_text())


@pytest.fixture(scope="module")
def tiny(golden: Path) -> BertScore:
    return BertScore(golden / "metrics" / "tinybert", device="cpu")


@pytest.mark.parametrize("case", CASES)
def test_bleu_with_the_quirk_agrees_with_the_reference(metrics: dict, case: str) -> None:
    given = metrics["cases"][case]
    got = bleu(given["predictions"], given["references"], quirk=True)
    want = given["bleu"]
    assert (got.counts, got.totals, got.sys_len, got.ref_len) == tuple(
        want[key] for key in ("counts", "totals", "sys_len", "ref_len")
    )
    assert got.score == pytest.approx(want["score"], abs=1e-9)
    assert got.precisions == pytest.approx(want["precisions"], abs=1e-9)
    assert got.bp == pytest.approx(want["bp"], abs=1e-9)


def test_bleu_uneven_references_without_the_quirk_uses_them_all(metrics: dict) -> None:
    given = metrics["cases"]["uneven_refs"]
    # "red round objects" also finds "objects" and "round ..." in the two references that the reference throws away.
    assert bleu(given["predictions"], given["references"]).counts[0] == 7
    assert bleu(given["predictions"], given["references"], quirk=True).counts[0] == 6


def test_bleu_even_references_is_the_same_with_and_without_the_quirk(metrics: dict) -> None:
    given = metrics["cases"]["three_refs"]
    assert (
        bleu(given["predictions"], given["references"]).score
        == bleu(given["predictions"], given["references"], quirk=True).score
    )


def test_bleu_of_nothing_but_empty_predictions_is_zero() -> None:
    assert bleu(["", "."], ["a dog", "a cat"]).score == 0


def test_bleu_values_of_many_sums_are_sacrebleus_of_each() -> None:
    rng = np.random.default_rng(0)
    lengths, closest = rng.integers(0, 12, 500), rng.integers(1, 12, 500)
    totals = np.maximum(lengths[:, None] - np.arange(4), 0)
    matched = np.minimum.accumulate((totals * rng.random((500, 4)) * (rng.random((500, 4)) < 0.8)).astype(int), axis=1)
    sums = np.column_stack([lengths, closest, matched, totals])
    expected = [bleu_score(row) for row in sums]
    np.testing.assert_allclose(bleu_values(sums), [score.score for score in expected], atol=1e-9)
    unigrams = [score.bp * score.precisions[0] for score in expected]
    np.testing.assert_allclose(bleu_values(sums, order=1), unigrams, atol=1e-9)


def test_bleu_statistics_one_row_per_unit() -> None:
    rows = bleu_statistics(["a red dog", ""], [["a dog", "a big red dog here"], ["cats"]])
    assert rows.tolist() == [[3, 2, 3, 1, 0, 0, 3, 2, 1, 0], [0, 1, 0, 0, 0, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize("case", CASES)
def test_rouge_agrees_with_the_reference(metrics: dict, case: str) -> None:
    given = metrics["cases"][case]
    want = {f"{kind}-{part}": value for kind, parts in given["rouge"].items() for part, value in parts.items()}
    assert rouge(given["predictions"], given["references"]) == pytest.approx(want, abs=1e-9)


def test_rouge_empty_prediction_is_left_out_of_the_mean() -> None:
    rows = rouge_statistics(["", "dog"], [["cat"], ["dog", "red dog"]])
    assert rows[:, 0].tolist() == [0, 2]
    assert rouge([""], ["cat"]) == dict.fromkeys(ROUGE_KEYS, 0.0)


def test_scores_unit_without_references_says_which() -> None:
    with pytest.raises(MilanError, match="unit number 1"):
        bleu(["a", "b"], [["a"], ["."]])
    with pytest.raises(ValueError, match="2 predictions but 1"):
        rouge(["a", "b"], [["a"]])


def test_bertscore_agrees_with_the_reference(metrics: dict, tiny: BertScore) -> None:
    want = metrics["bertscore_tiny"]
    given = metrics["cases"][want["case"]]
    got = tiny(given["predictions"], given["references"])
    np.testing.assert_allclose(got.T, want["per_sample"], atol=1e-5)
    np.testing.assert_allclose(got.mean(0), [want["result"][key] for key in "prf"], atol=1e-5)


def test_bertscore_layer_and_plain_weights_agree_with_bert_score_itself(golden: Path, metrics: dict) -> None:
    from bert_score import BERTScorer

    given = metrics["cases"]["three_refs"]
    folder = golden / "metrics" / "tinybert"
    theirs = BERTScorer(model_type=str(folder), num_layers=1, idf=False, device="cpu")
    want = theirs.score(
        [text.lower().strip(". ") for text in given["predictions"]], [g[:1] for g in given["references"]]
    )
    got = BertScore(folder, num_layers=1, idf=False, device="cpu")(
        given["predictions"], [[group[0].lower()] for group in given["references"]]
    )
    assert got.shape == (5, len(BERTSCORE_KEYS))
    np.testing.assert_allclose(got[0], [part[0] for part in want], atol=1e-5)
    np.testing.assert_allclose(got[4], [part[4] for part in want], atol=1e-5)


def test_bertscore_edge_cases_are_defined(tiny: BertScore) -> None:
    scores = tiny(["", "red circles"], [["red circles"], ["red circles", "lines"]])
    assert scores[0].tolist() == [0, 0, 0]
    np.testing.assert_allclose(scores[1], 1, atol=1e-6)
    # One reference: its tokens are in every document, so none has weight.
    assert np.isfinite(tiny(["red lines"], ["red circles"])).all()
    assert tiny([" \n. "], [["lines"]]).tolist() == [[0, 0, 0]]


def test_bertscore_weights_from_other_texts_change_the_score(tiny: BertScore) -> None:
    given = (["red lines"], [["red circles"]])
    assert not np.allclose(tiny(*given, ["red", "lines", "circles"]), tiny(*given, ["red", "red", "red lines"]))


def test_bertscore_without_a_model_or_baseline_says_so(golden: Path, tmp_path: Path) -> None:
    with pytest.raises(MilanError, match="no config"):
        BertScore(tmp_path)
    with pytest.raises(MilanError, match="tinybert"):
        BertScore(golden / "metrics" / "tinybert", rescale=True)
    with pytest.raises(MilanError, match="2 layers"):
        BertScore(golden / "metrics" / "tinybert", num_layers=3)


def test_bertscore_rescales_by_the_baseline_of_the_folders_name(golden: Path, metrics: dict, tmp_path: Path) -> None:
    given = metrics["cases"]["three_refs"]
    # The table is found by name; layer 2 of distilroberta-base stands in for a real one.
    folder = tmp_path / "distilroberta-base"
    folder.mkdir()
    for file in (golden / "metrics" / "tinybert").iterdir():
        (folder / file.name).symlink_to(file)
    raw = BertScore(folder, num_layers=2, device="cpu")(given["predictions"], given["references"])
    rescaled = BertScore(folder, num_layers=2, rescale=True, device="cpu")(given["predictions"], given["references"])
    np.testing.assert_allclose(rescaled[1], 1, atol=1e-5)  # perfect stays perfect
    assert (rescaled[2] < raw[2]).all()


def test_minilm_when_installed_tells_meaning_from_nonsense() -> None:
    folder = minilm_directory()
    if folder is None:
        pytest.skip("needs pip install 'milan-ray[minilm]'")
    scores = BertScore(folder, device="cpu")(
        ["a red automobile", "a red automobile"], [["a crimson car"], ["vertical stripes on fabric"]]
    )
    assert scores[0, 2] > scores[1, 2] + 0.2
