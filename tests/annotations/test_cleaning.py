"""Raw crowd results into annotations."""

from __future__ import annotations

import csv
import json

import pytest

from milan_ray.annotations.cleaning import CleaningTables, clean_results, read_tables
from milan_ray.annotations.layout import read_annotations
from milan_ray.errors import MilanError

HEADER = ["HITId", "WorkerId", "RejectionTime", "Input.layer", "Input.unit", "Answer.summary"]


def write(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


@pytest.mark.parametrize(
    ("tables", "text", "cleaned"),
    [
        ({}, "  A Red DOG ", "a red dog"),
        ({"prefixes": {"images of ": "", "a ": ""}}, "Images of a dog", "dog"),  # one after the other
        ({"prefixes": {"a ": "", "images of ": ""}}, "Images of a dog", "a dog"),  # in their order, each once
        ({"substrings": {"teh": "the", "the the": "the"}}, "teh teh", "the"),
        ({"suffixes": {".": "", " etc": ""}}, "dogs etc.", "dogs"),
        ({"suffixes": {" etc": "", ".": ""}}, "dogs etc.", "dogs etc"),
        ({"exact": {"dogs": "a dog", "a dog": "animals"}}, "DOGS", "animals"),
        ({"exact": {"dogs": "cats"}}, " dogs", "dogs"),  # exact comes before stripping
        (
            {"prefixes": {"x": "y"}, "substrings": {"y": "z"}, "suffixes": {"z": "w"}, "exact": {"w": "done"}},
            "x",
            "done",
        ),
        ({"words": {"gren": "green"}}, "gren, gren grens gren-ish gren", "green, green grens green-ish green"),
        ({"words": {"gren": "green"}}, "gren", "green"),
        ({"words": {"gren": "green"}}, "a gren.", "a green."),
        ({"words": {"gren": "green"}, "prefixes": {"gren ": "grain "}}, "gren field", "grain field"),
    ],
)
def test_clean_text_follows_the_tables(tables, text, cleaned):
    assert CleaningTables(**tables).spelled().clean(text) == cleaned


def test_clean_text_worker_table_comes_last_and_only_for_its_worker():
    tables = CleaningTables(suffixes={".": ""}, workers={"W1": {"space around": "", "Dog.": "never"}})
    assert tables.clean("Space around dog.", "W1") == " dog"
    assert tables.clean("Space around dog.", "W2") == "space around dog"


def test_clean_results_drops_rejected_and_keeps_order(tmp_path):
    rows = [
        HEADER,
        ["h1", "W1", "", "layer3", "7", "The RED dog,\nrunning"],
        ["h2", "W2", "Tue Jun 01", "layer3", "7", "spam"],
        ["h3", "W2", "  ", "conv1", "0", ""],
    ]
    results = write(tmp_path / "results.csv", rows)
    out = tmp_path / "clean/annotations.csv"
    assert clean_results(results, out, CleaningTables(prefixes={"the ": ""})) == (2, 1)
    found = [(item.layer, item.unit, item.text) for item in read_annotations(out)]
    assert found == [("layer3", 7, "red dog,\nrunning"), ("conv1", 0, "")]
    assert clean_results(results, results, keep_rejected=True) == (3, 0)
    assert [item.text for item in read_annotations(results)][1] == "spam"


@pytest.mark.parametrize(
    ("rows", "tables", "message"),
    [
        ([HEADER[:2] + HEADER[3:]], {}, "no column RejectionTime"),
        ([HEADER[:1] + HEADER[2:]], {"workers": {"W": {"a": "b"}}}, "no column WorkerId"),
        ([HEADER, ["h1", "W1", "", "conv1"]], {}, "row 1 is incomplete"),
    ],
)
def test_clean_results_malformed_is_one_sentence(tmp_path, rows, tables, message):
    with pytest.raises(MilanError, match=message):
        clean_results(write(tmp_path / "r.csv", rows), tmp_path / "out.csv", CleaningTables(**tables))
    assert not (tmp_path / "out.csv").exists()


def test_clean_results_missing_file_is_one_sentence(tmp_path):
    with pytest.raises(MilanError, match="cannot be read"):
        clean_results(tmp_path / "absent.csv", tmp_path / "out.csv")


def test_read_tables_keeps_order_and_workers(tmp_path):
    content = {"prefixes": {"b": "", "a": ""}, "workers": {"W": {"x": "y"}}}
    (tmp_path / "t.json").write_text(json.dumps(content))
    tables = read_tables(tmp_path / "t.json")
    assert list(tables.prefixes) == ["b", "a"]
    assert tables.workers == {"W": {"x": "y"}}


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{",
        '"a"',
        '{"prefix": {}}',
        '{"exact": ["a"]}',
        '{"workers": {"W": "x"}}',
        '{"workers": []}',
        '{"suffixes": {"": "x"}}',
    ],
)
def test_read_tables_other_content_is_refused(tmp_path, content):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(MilanError, match=r"t\.json"):
        read_tables(tmp_path / "t.json")
