"""Tasks of images to rate, and the answers of both platforms."""

from __future__ import annotations

import csv
import io
import json
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

from milan_ray.annotations.collection import TEMPLATES
from milan_ray.annotations.rating_tasks import (
    RatingAnswer,
    RatingTask,
    are_ratings,
    ratings_csv,
    ratings_jsonl,
    read_ratings,
)
from milan_ray.errors import MilanError

TASKS = [
    RatingTask("milan", "net/a", "conv,1", 7, 30, "d1", "red, striped", "https://x.org/30.jpg"),
    RatingTask("milan", "net/a", "conv,1", 8, 31, "d1", "dogs", "https://x.org/31.jpg"),
]
HEADER = [f"Input.{name}" for name in ("labeler", "model", "layer", "unit", "image_id", "draws")]


def mturk(path: Path, *rows: tuple[str, str, str]) -> Path:
    """Results: worker, choice and time of rejection of each answer to the first task."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*HEADER, "Answer.choice", "WorkerId", "RejectionTime"])
        for worker, choice, rejected in rows:
            writer.writerow(["milan", "net/a", "conv,1", 7, 30, "d1", choice, worker, rejected])
    return path


def export(path: Path, *annotations: tuple[int, list[str], bool], data: dict[str, object] | None = None) -> Path:
    task = json.loads(ratings_jsonl(TASKS).splitlines()[0])
    if data is not None:
        task["data"] = data
    task["annotations"] = [
        {"completed_by": who, "was_cancelled": skipped, "result": [{"from_name": "choice", "value": {"choices": said}}]}
        for who, said, skipped in annotations
    ]
    path.write_text(json.dumps([task]), encoding="utf-8")
    return path


def answer(worker: str, yes: bool) -> RatingAnswer:
    return RatingAnswer("milan", "net/a", "conv,1", 7, 30, "d1", worker, yes)


def test_tasks_fill_both_templates() -> None:
    rows = list(csv.DictReader(io.StringIO(ratings_csv(TASKS))))
    page = (TEMPLATES / "mturk-rating.html").read_text(encoding="utf-8")
    assert rows[0]["description"] == "red, striped" and "${description}" in page and "${image}" in page
    assert 'name="choice" value="yes"' in page and 'name="choice" value="no"' in page
    data = json.loads(ratings_jsonl(TASKS).splitlines()[1])["data"]
    assert data["unit"] == 8 and data["image_id"] == 31
    view = ElementTree.fromstring((TEMPLATES / "label-studio-rating.xml").read_text(encoding="utf-8"))
    assert {each.get("value") for each in view.findall(".//Choice")} == {"yes", "no"}
    shown = [element.get("value") for element in view if element.get("value", "").startswith("$")]
    assert shown == ["$description", "$image"]
    # Nothing that the page shows says how much the image excites the unit.
    assert not {"activation", "weight", "top"} & set(rows[0])


def test_order_of_tasks_tells_nothing_and_is_fixed() -> None:
    many = [RatingTask("milan", "m", "l", unit, image, "d", "x", "y") for unit in range(4) for image in range(50)]
    ordered = sorted(many, key=lambda task: task.place)
    backwards = many[::-1]
    assert ordered == sorted(backwards, key=lambda task: task.place)
    units = [task.unit for task in ordered]
    assert sum(a == b for a, b in pairwise(units)) < 80  # a quarter of them by chance


def test_answers_of_both_platforms_are_the_same(tmp_path: Path) -> None:
    results = mturk(tmp_path / "a.csv", ("W1", "Yes", ""), ("W2", "no", ""), ("W3", "no", "Mon"))
    assert read_ratings(results) == ([answer("W1", True), answer("W2", False)], 1)
    assert read_ratings(results, keep_rejected=True) == (
        [answer("W1", True), answer("W2", False), answer("W3", False)],
        0,
    )
    studio = export(tmp_path / "a.json", (1, ["yes"], False), (2, ["no"], False), (3, [], True), (4, ["no"], True))
    assert read_ratings(studio) == ([answer("1", True), answer("2", False)], 2)
    assert [each.worker for each in read_ratings(studio, keep_rejected=True)[0]] == ["1", "2", "4"]


def test_kinds_of_answers_are_told_apart_and_not_mixed(tmp_path: Path) -> None:
    rating = mturk(tmp_path / "rating.csv", ("W1", "yes", ""))
    studio = export(tmp_path / "rating.json", (1, ["yes"], False))
    words = tmp_path / "words.csv"
    words.write_text("Input.model,Answer.summary,WorkerId,RejectionTime\nm,dogs,W1,\n", encoding="utf-8")
    assert are_ratings([rating, studio]) and not are_ratings([words])
    with pytest.raises(MilanError, match="rate descriptions and the other files describe units"):
        are_ratings([rating, words])


def test_damaged_answers_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(MilanError, match="neither yes nor no"):
        read_ratings(mturk(tmp_path / "a.csv", ("W1", "maybe", "")))
    data = {"labeler": "milan", "model": "m", "layer": "l", "unit": 1, "draws": "d"}
    with pytest.raises(MilanError, match="without image_id"):
        read_ratings(export(tmp_path / "b.json", (1, ["yes"], False), data=data))
    with pytest.raises(MilanError, match="a whole number"):
        read_ratings(export(tmp_path / "c.json", (1, ["yes"], False), data={**data, "image_id": "x"}))
    (tmp_path / "d.csv").write_text("Input.draws,WorkerId\nd,W1\n", encoding="utf-8")
    with pytest.raises(MilanError, match="has no column"):
        read_ratings(tmp_path / "d.csv")
