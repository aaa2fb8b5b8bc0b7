from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from milan_ray.errors import MilanError
from milan_ray.scoring.agreement import leave_one_out, mean_agreement, rouge_l
from milan_ray.scoring.evaluation import best_constant, shuffled
from milan_ray.scoring.text import BertScore, bleu, minilm_directory
from milan_ray.studies.annotators.statistics import (
    annotation_statistics,
    load_spacy_pipeline,
    read_texts,
    tag_words,
)

PAPER = {  # Table 5, ResNet152-ImageNet: words, mean length, % noun, % adjective, % preposition
    "conv1": (285, 4.7, 43.8, 11.8, 10.3),
    "layer1": (653, 5.5, 43.1, 10.5, 12.5),
    "layer2": (936, 5.1, 44.0, 12.5, 12.6),
    "layer3": (1222, 4.2, 49.6, 10.9, 11.3),
    "layer4": (1728, 4.6, 47.6, 8.6, 7.8),
}


@pytest.fixture(scope="module")
def human(shared: Path) -> pl.DataFrame:
    return read_texts(shared / "data/annotations/milannotations_resnet152_imagenet.csv")


def generated(shared: Path, name: str) -> pl.DataFrame:
    return read_texts(shared / f"data/annotations/milan_generated_{name}.csv")


def test_parity_annotation_statistics_of_resnet152_imagenet_are_table_5(human: pl.DataFrame, shared: Path) -> None:
    found = annotation_statistics(human, load_spacy_pipeline(shared / "data/text/en_ud_ewt_sm"))
    assert found["units"].sum() == 3904 and found["texts"].sum() == 11712
    for layer, *row in found.select("layer", "words", "length", "noun", "adjective", "preposition").rows():
        words, length, *shares = PAPER[layer]
        assert row[0] == pytest.approx(words, rel=0.03)
        assert round(row[1], 2) == pytest.approx(length, abs=0.05 + 1e-9)  # the paper's have one decimal
        # The paper's tagger is another one (en_core_web_sm): its shares are near, not the same.
        assert row[2:] == pytest.approx(shares, abs=2.5)


def test_statistics_of_real_milan_output_are_shorter_and_poorer_than_people(shared: Path) -> None:
    texts = generated(shared, "m_base_resnet50_imagenet").filter(pl.col("layer") != "fc")
    ((units, count, words, length, *shares),) = annotation_statistics(texts, load_spacy_pipeline(), by=()).rows()
    assert (units, count, words) == (3904, 3904, 387) and texts["text"].n_unique() == 605
    assert length == pytest.approx(2.62, abs=0.005)
    assert shares == [None] * 3


@pytest.mark.parametrize(
    ("name", "units"),
    [
        ("m_base_resnet18_places365", 1024),
        ("m_imagenet_resnet18_places365", 1024),
        ("flex_alexnet_imagenet", 1152),
        ("flex_resnet18_imagenet", 1024),
        ("cosy_vit_b_16-features", 768),
    ],
)
def test_read_texts_of_every_published_milan_output(shared: Path, name: str, units: int) -> None:
    texts = generated(shared, name)
    assert texts.select("layer", "unit").n_unique() == len(texts) == units
    assert (texts["text"].str.len_chars() > 0).all()


def test_bleu_of_real_milan_output_is_beaten_by_a_constant(human: pl.DataFrame, shared: Path) -> None:
    """A text metric alone misleads. The descriptions are ResNet50's, the annotations ResNet152's."""
    people = human.group_by("layer", "unit", maintain_order=True).agg(pl.col("text").alias("people"))
    aligned = people.join(generated(shared, "m_base_resnet50_imagenet"), on=["layer", "unit"], maintain_order="left")
    references, said = aligned["people"].to_list(), aligned["text"].to_list()
    assert best_constant(references) == "rounded edges in pictures"
    constant = bleu(["rounded edges in pictures"] * len(said), references).score
    milan, mixed = bleu(said, references).score, bleu(shuffled(said), references).score
    assert constant == pytest.approx(4.74, abs=0.01)
    assert constant > milan > mixed
    left_out = [bleu([g[i] for g in references], [g[:i] + g[i + 1 :] for g in references]).score for i in range(3)]
    assert sum(left_out) / 3 == pytest.approx(0.90, abs=0.01)


@pytest.mark.parametrize("column", ["summary", "description", "caption", "annotation", "text"])
def test_read_texts_keeps_layer_names_quotes_and_empty_texts(tmp_path: Path, column: str) -> None:
    path = tmp_path / "texts.csv"
    path.write_text(f'extra,unit,{column},layer\nx,7,"red, ""round"" things",0\nx,10,,conv1\n', encoding="utf-8")
    assert read_texts(path).rows() == [("0", 7, 'red, "round" things'), ("conv1", 10, "")]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot read"),
        ("", "cannot read"),
        ("unit,summary\n0,a\n", "needs layer, unit"),
        ("layer,unit,words\nx,0,a\n", "one of text, summary"),
        ("layer,unit,text\nx,one,a\n", "not whole numbers"),
        ("layer,unit,text\nx,0,a,b,c\n", "cannot read"),
    ],
)
def test_read_texts_of_another_file_says_what_is_wrong(tmp_path: Path, content: str | None, reason: str) -> None:
    path = tmp_path / "texts.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(MilanError, match=reason):
        read_texts(path)


def test_load_language_unknown_name_is_one_sentence() -> None:
    with pytest.raises(MilanError, match="no spaCy pipeline 'no_such_pipeline'"):
        load_spacy_pipeline("no_such_pipeline")


def test_statistics_without_a_tagger_count_lowercased_words_and_no_punctuation() -> None:
    texts = pl.DataFrame(
        {
            "layer": ["b", "b", "a", "a", "c"],
            "unit": [0, 0, 0, 1, 0],
            "text": ["Red things, red!", "red", "a dog's nose", "a dog's nose", " . "],
        }
    )
    nlp = load_spacy_pipeline()
    found = annotation_statistics(texts, nlp)
    assert found.rows() == [
        ("b", 1, 2, 2, 2.0, None, None, None),
        ("a", 2, 2, 4, 4.0, None, None, None),
        ("c", 1, 1, 0, 0.0, None, None, None),
    ]
    assert annotation_statistics(texts, nlp, by=()).rows() == [(4, 5, 6, 12 / 5, None, None, None)]
    assert annotation_statistics(texts.clear(), nlp).rows() == []


def test_tag_words_uses_the_pipeline_s_lemmas_and_tags() -> None:
    nlp = load_spacy_pipeline()
    ruler: Any = nlp.add_pipe("attribute_ruler")
    ruler.add([[{"LOWER": "dogs"}]], {"LEMMA": "Dog", "POS": "NOUN"})
    ruler.add([[{"LOWER": "on"}]], {"LEMMA": "on", "POS": "ADP"})
    rows = tag_words(["Dogs on dogs", "", "Dogs on dogs"], nlp).rows()
    assert rows == [(place, word, tag) for place in (0, 2) for word, tag in _DOGS]
    texts = pl.DataFrame({"layer": ["x"], "unit": [0], "text": ["Dogs on dogs"]})
    assert annotation_statistics(texts, nlp).rows()[0][1:] == pytest.approx((1, 1, 2, 3.0, 200 / 3, 0.0, 100 / 3))


_DOGS = [("dog", "NOUN"), ("on", "ADP"), ("dog", "NOUN")]


def test_annotator_agreement_is_higher_where_people_say_the_same() -> None:
    folder = minilm_directory()
    if folder is None:
        pytest.skip("needs a language model for BERTScore: pip install 'milan-ray[minilm]'")
    texts = pl.DataFrame(
        {
            "layer": ["far", "near", "far", "near", "near", "far"],
            "unit": [0, 0, 0, 0, 0, 1],
            "text": ["dogs on grass", "red cars", "blue sky", "red car", ".", "left alone"],
        }
    )
    bert_score = BertScore(folder)
    found = mean_agreement(leave_one_out(texts, bert_score))
    assert found["layer"].to_list() == ["far", "near"] and found["texts"].to_list() == [2, 2]
    assert found["agreement"][1] > found["agreement"][0] + 0.1
    (whole,) = mean_agreement(leave_one_out(texts, bert_score), by=()).to_dicts()
    assert (whole["units"], whole["texts"]) == (2, 4)
    # Two units: a resample has both, or one of them twice.
    assert [whole["low"], whole["high"]] == pytest.approx(found["agreement"].to_list(), abs=0.02)


def test_agreement_leaves_each_annotation_out_once_whatever_the_order_of_rows() -> None:
    rows = [("a", 0, "x", "red dogs"), ("a", 1, "x", "sky"), ("a", 0, "y", "dogs"), ("a", 1, "y", " . ")]
    rows += [("b", 0, "x", "cats"), ("a", 0, "z", "red cats")]
    texts = pl.DataFrame(rows, ["layer", "unit", "annotator", "text"], orient="row")
    scores = leave_one_out(texts, rouge_l)
    # ROUGE-L F of: red dogs with dogs 2/3 and with red cats 1/2; dogs with red cats 0.
    assert scores.select("text", "score").rows() == [
        ("red dogs", pytest.approx((2 / 3 + 1 / 2) / 2)),
        ("dogs", pytest.approx((2 / 3 + 0) / 2)),
        ("red cats", pytest.approx((1 / 2 + 0) / 2)),
    ]
    by_person = mean_agreement(scores, ("annotator",))
    assert by_person.select("annotator", "units", "texts").rows() == [("x", 1, 1), ("y", 1, 1), ("z", 1, 1)]
    assert by_person["agreement"].to_list() == pytest.approx(scores["score"].to_list())
    assert leave_one_out(texts.filter(pl.col("annotator") == "x"), rouge_l).is_empty()
