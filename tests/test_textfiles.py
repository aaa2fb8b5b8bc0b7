"""C5: text files of people."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from milan_ray.annotations.layout import read_annotations
from milan_ray.cli.build_configs import read_text
from milan_ray.cli.parsing import from_file
from milan_ray.errors import MilanError
from milan_ray.labelers.clip_dissect import read_concepts
from milan_ray.models.image_text import CONCEPTS_FILE, own_concepts
from milan_ray.probe.folder import FolderProbe, read_labels
from milan_ray.probe.labelled import read_legend
from milan_ray.studies.annotators.statistics import read_texts

NFD = unicodedata.normalize("NFD", "é.png")

ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be")


def encoded(text: str, encoding: str) -> bytes:
    mark = "\ufeff" if encoding in ("utf-16-le", "utf-16-be") else ""
    return (mark + text).encode(encoding)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_concepts_without_marks_blanks_and_quotes(tmp_path: Path, encoding: str) -> None:
    text = ' red \r\n\r\n"left"\r\n\u00a0e\u0301tang\r\n“red”\r\n\ufeffblue\u200b\r\n'
    (tmp_path / "c.txt").write_bytes(encoded(text, encoding))
    assert read_concepts(read_text("--concepts", str(tmp_path / "c.txt"))) == ("red", "left", "étang", "blue")
    (tmp_path / CONCEPTS_FILE).write_bytes(encoded(text, encoding))
    assert read_concepts("\n".join(own_concepts(str(tmp_path))))[0] == "red"


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    "text",
    [
        "file,label\ncat.jpg, cat \n./d/dog.jpg,\"dog\"\né.png,lake\n",
        "File;Label\ncat.jpg;cat\nd\\dog.jpg;dog\né.png; lake\n",
        " file , label \n cat.jpg , \"cat\"\nd/dog.jpg , dog\né.png , lake\n\n,\n",
        "cat.jpg, cat\nd/dog.jpg, dog\né.png, lake\n",
        "cat.jpg cat\nd/dog.jpg dog\né.png  lake\n",
        "file\tlabel\ncat.jpg\tcat\nd/dog.jpg\tdog\né.png\tlake\n",
    ],
)  # fmt: skip
def test_labels_match_whatever_the_editor(tmp_path: Path, encoding: str, text: str) -> None:
    (tmp_path / "labels.csv").write_bytes(encoded(text, encoding))
    expected = {"cat.jpg": "cat", "d/dog.jpg": "dog", "é.png": "lake"}
    assert read_labels(str(tmp_path / "labels.csv")) == expected


def test_names_are_compared_composed_and_what_matches_nothing_is_counted(tmp_path: Path, capsys: Any) -> None:
    root = tmp_path / "photos"
    root.mkdir()
    for name in (NFD, "cat.jpg", "dog.jpg", "owl.jpg"):
        Image.new("RGB", (4, 4)).save(root / name)
    labels = tmp_path / "labels.csv"
    labels.write_text("file,label\né.png,lake\ncat.jpg, cat\nDOG.jpg,dog\n", encoding="utf-8")
    found = FolderProbe([root], labels).manifest()
    assert dict(zip(found["path"].to_pylist(), found["class_label"].to_pylist(), strict=True)) == {
        NFD: "lake", "cat.jpg": "cat", "dog.jpg": None, "owl.jpg": None,
    }  # fmt: skip
    told = capsys.readouterr().err
    assert "2 of 4 images have no label" in told and "such as dog.jpg, owl.jpg" in told
    assert "1 of 3 names" in told and "such as DOG.jpg" in told


def test_two_labels_of_one_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("file,label\ncat.jpg,cat\n./cat.jpg,dog\n")
    with pytest.raises(MilanError, match=r"labels cat\.jpg twice, as 'cat' and as 'dog'"):
        read_labels(str(tmp_path / "labels.csv"))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_configuration_legend_and_annotations(tmp_path: Path, encoding: str) -> None:
    from milan_ray.cli import build_parser

    file = tmp_path / "f.txt"
    file.write_bytes(encoded("k: 3\n", encoding))
    parser: Any = build_parser()
    verb = parser._subparsers._group_actions[0].choices["exemplars"]
    assert from_file(verb, ["--config", str(file)])[0] == ["--k=3"]
    for text in ('1, "car"\n2,sky \n', "number;name\n1;car\n2;sky\n", "1 car\n2  sky\n"):
        file.write_bytes(encoded(text, encoding))
        assert read_legend(file) == {1: "car", 2: "sky"}
    for between in (",", ";"):
        lines = (between.join(row) for row in (("layer ", "unit", "summary"), ("conv1 ", "3", " a dog, “big” ")))
        text = "\r\n".join(lines)
        text = text.replace(" a dog, “big” ", '" a dog, “big” "')
        file.write_bytes(encoded(text, encoding))
        (row,) = read_annotations(file)
        assert (row.layer, row.unit, row.text) == ("conv1", 3, " a dog, “big” ")  # what people said stays as it is
        assert read_texts(file).rows() == [("conv1", 3, " a dog, “big” ")]
