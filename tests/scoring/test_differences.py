from __future__ import annotations

from fractions import Fraction
from math import comb

import numpy as np
import polars as pl
import pytest

from milan_ray.errors import MilanError
from milan_ray.scoring.differences import diff_descriptions, false_discovery, fisher, newcombe, summary


def frame(model: str, layers: dict[str, list[str]], labeler: str = "milan") -> pl.DataFrame:
    rows = [(labeler, model, layer, unit, text) for layer, texts in layers.items() for unit, text in enumerate(texts)]
    return pl.DataFrame(rows, ["labeler", "model", "layer", "unit", "description"], orient="row")


PLAIN = {"conv1": ["Dog faces", "a face", "red lines", "the faces of people"], "fc": ["cats", "faces"]}
BLURRED = {"conv1": ["Dog legs", "a face", "red line", "grass"], "fc": ["cats", "faces", "striped cats"]}


@pytest.fixture(scope="module")
def both() -> pl.DataFrame:
    return pl.concat([frame("plain", PLAIN), frame("blurred", BLURRED), frame("third", {"conv1": ["face"]})])


def test_words_count_units_with_any_form_once(both: pl.DataFrame) -> None:
    found = diff_descriptions(both, "plain", "blurred")
    rows = {row["word"]: row for row in found.words.iter_rows(named=True)}
    face = rows["face"]
    assert (face["units"], face["of"], face["other_units"], face["other_of"]) == (4, 6, 2, 7)
    assert face["difference"] == pytest.approx(2 / 7 - 4 / 6)
    assert face["low"] < face["difference"] < face["high"]
    assert (rows["cats"]["units"], rows["cats"]["other_units"]) == (1, 2)
    assert not {"a", "the", "of", "faces"} & set(rows)
    assert found.words["word"][0] == "face" and set(found.words["layer"]) == {""}
    assert found.words["p"].is_sorted() and (found.words["q"] >= found.words["p"]).all()


def test_units_are_paired_in_layers_of_the_same_units_alone(both: pl.DataFrame) -> None:
    found = diff_descriptions(both, "plain", "blurred")
    assert found.units == 4 and set(found.changes["layer"]) == {"conv1"}
    changes = {row["unit"]: (row["gained"], row["lost"]) for row in found.changes.iter_rows(named=True)}
    assert changes == {0: (["legs"], ["face"]), 2: ([], []),
                       3: (["grass"], ["face", "people"])}  # fmt: skip
    shown = summary(found, "plain", "blurred", 3)
    assert "unit by unit: 3 of 4 say something else" in shown and "Dog faces → Dog legs" in shown


def test_features_are_counted_where_both_have_them_and_paired_where_they_are_the_same(capsys) -> None:
    one, other = {"a#sae": ["a dog", "a cat"], "a": ["red"]}, {"a#sae": ["a dog", "a cow"], "a": ["red"]}
    both = pl.concat([frame("one", {**one, "a#own": ["faces"]}), frame("other", other)])
    found = diff_descriptions(both, "one", "other")
    assert "left out a#own" in capsys.readouterr().err
    assert set(found.words["word"]) == {"dog", "cat", "cow", "red"} and found.sizes == (3, 3)
    assert found.units == 1  # the unit of a; nothing says that feature 1 of both is one feature
    found = diff_descriptions(both, "one", "other", same=["a#sae"])
    assert found.units == 3 and found.changes["other_description"].to_list() == ["a cow"]


def test_network_with_features_alone_that_the_other_lacks_is_one_sentence() -> None:
    both = pl.concat([frame("one", {"a#sae": ["a dog"]}), frame("other", {"a": ["a dog"]})])
    with pytest.raises(MilanError, match="only features of one are described that others lack: describe its units"):
        diff_descriptions(both, "one", "other")


def test_words_asked_for_may_be_alternatives_and_unsaid(both: pl.DataFrame) -> None:
    found = diff_descriptions(both, "plain", "blurred", words=["people|cat", "unicorn", "red line"])
    assert found.words["word"].to_list() == ["people|cat", "unicorn", "red line"]
    assert found.words["units"].to_list() == [2, 0, 1] and found.words["other_units"].to_list() == [2, 0, 1]
    assert found.changes.filter(pl.col("lost").list.contains("people|cat"))["unit"].to_list() == [3]


def test_layers_one_by_one_follow_all_together(both: pl.DataFrame) -> None:
    found = diff_descriptions(both, "plain", "blurred", words=["face"], by_layer=True)
    assert found.words.select("layer", "units", "of", "other_units", "other_of").rows() == [
        ("", 4, 6, 2, 7), ("conv1", 3, 4, 1, 4), ("fc", 1, 2, 1, 3),
    ]  # fmt: skip


def test_networks_without_a_common_layer_are_compared_by_words_alone(both: pl.DataFrame) -> None:
    found = diff_descriptions(both, "third", "plain")
    assert found.units == 0 and found.changes.is_empty()
    assert "nothing" in summary(found, "third", "plain", 3)


def test_bad_pairs_are_one_sentence(both: pl.DataFrame) -> None:
    with pytest.raises(MilanError, match="no descriptions of nobody"):
        diff_descriptions(both, "plain", "nobody")
    with pytest.raises(MilanError, match="of one labeler"):
        diff_descriptions(pl.concat([both, frame("plain", PLAIN, "other")]), "plain", "blurred")


def test_fisher_is_the_sum_of_exact_chances() -> None:
    """Against the definition in whole numbers."""

    def exact(a: int, n: int, b: int, m: int) -> float:
        chances = [comb(n, k) * comb(m, a + b - k) for k in range(a + b + 1)]
        return float(Fraction(sum(c for c in chances if c <= chances[a]), comb(n + m, a + b)))

    cases = [(a, b) for a in (0, 1, 3, 7, 12) for b in (0, 2, 9, 17)]
    a, b = np.array(cases).T
    np.testing.assert_allclose(fisher(a, 12, b, 17), [exact(a, 12, b, 17) for a, b in cases], rtol=1e-9)
    assert fisher(np.array([900]), 100_000, np.array([1100]), 100_000)[0] == pytest.approx(8e-6, rel=0.5)


def test_interval_is_newcombes() -> None:
    """His example of 1998: 56/70 and 48/80, method 10: .2 (.0524, .3339)."""
    low, high = newcombe(np.array([48]), 80, np.array([56]), 70)
    assert (low[0], high[0]) == (pytest.approx(0.0524, abs=5e-5), pytest.approx(0.3339, abs=5e-5))


def test_false_discovery_is_benjamini_and_hochbergs() -> None:
    np.testing.assert_allclose(false_discovery(np.array([0.04, 0.01, 0.03, 0.9])), [0.16 / 3, 0.04, 0.16 / 3, 0.9])
    assert false_discovery(np.zeros(0)).shape == (0,)
