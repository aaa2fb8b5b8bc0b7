from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from milan_ray.annotations.collection import (
    TEMPLATES,
    Answer,
    Question,
    Task,
    answer_key,
    key_csv,
    passed_workers,
    question_form,
    questions_jsonl,
    read_answers,
    read_questions,
    tasks_csv,
    tasks_jsonl,
)
from milan_ray.errors import MilanError

TASKS = [Task("net/a", "conv,1", 7, "e1", "https://x.org/?a=1&b=2"), Task("net/a", "conv2", 0, "e2", "y.jpg")]
QUESTIONS = [
    Question(TASKS[0], "red <wheels> & lamps", ("cats", "dogs", "sky")),
    Question(TASKS[1], "sky", ("clouds", "a bird", "blue")),
]


def export(folder: Path, tasks: list[dict[str, object]], lines: bool = False) -> Path:
    path = folder / ("answers.jsonl" if lines else "answers.json")
    path.write_text("\n".join(map(json.dumps, tasks)) if lines else json.dumps(tasks), encoding="utf-8")
    return path


def labelled(data: dict[str, object], name: str, kind: str, *given: tuple[object, object, bool]) -> dict[str, object]:
    return {
        "id": 1,
        "data": data,
        "annotations": [
            {
                "completed_by": who,
                "was_cancelled": cancelled,
                "result": [{"from_name": name, "to_name": "image", "type": kind, "value": {key_of(kind): what}}],
            }
            for who, what, cancelled in given
        ],
    }


def key_of(kind: str) -> str:
    return {"textarea": "text"}.get(kind, kind)


def test_mturk_tasks_fill_the_template() -> None:
    rows = list(csv.DictReader(io.StringIO(tasks_csv(TASKS))))
    assert rows[0] == {
        "model": "net/a",
        "layer": "conv,1",
        "unit": "7",
        "exemplars": "e1",
        "image": "https://x.org/?a=1&b=2",
    }
    page = (TEMPLATES / "mturk.html").read_text(encoding="utf-8")
    assert "${image}" in page and 'name="summary"' in page and "one\n      sentence" in page


def test_label_studio_tasks_fill_the_configuration() -> None:
    tasks = [json.loads(line) for line in tasks_jsonl(TASKS).splitlines()]
    assert tasks[1] == {"data": {"model": "net/a", "layer": "conv2", "unit": 0, "exemplars": "e2", "image": "y.jpg"}}
    view = ElementTree.fromstring((TEMPLATES / "label-studio.xml").read_text(encoding="utf-8"))
    image, area = view.find("Image"), view.find("TextArea")
    assert image is not None and image.get("value") == "$image"
    assert area is not None and area.get("name") == "summary"


def test_qualification_test_hides_the_answer_and_its_key_has_it() -> None:
    spaces = {"q": "http://mechanicalturk.amazonaws.com/AWSMechanicalTurkDataSchemas/2017-11-06/QuestionForm.xsd"}
    form = ElementTree.fromstring(question_form(QUESTIONS).encode())
    questions = form.findall("q:Question", spaces)
    assert [each.findtext(".//q:DataURL", namespaces=spaces) for each in questions] == [TASKS[0].image, TASKS[1].image]
    key = ElementTree.fromstring(answer_key(QUESTIONS).encode())
    space = {"k": key.tag[1 : key.tag.index("}")]}
    for asked, question, answer in zip(QUESTIONS, questions, key.findall("k:Question", space), strict=True):
        chosen = answer.findtext(".//k:SelectionIdentifier", namespaces=space)
        (text,) = [
            each.findtext("q:Text", namespaces=spaces)
            for each in question.findall(".//q:Selection", spaces)
            if each.findtext("q:SelectionIdentifier", namespaces=spaces) == chosen
        ]
        assert text == asked.right and "wheels" not in asked.name
    assert key.findtext(".//k:MaximumSummedScore", namespaces=space) == "2"
    of_label_studio = [json.loads(line)["data"] for line in questions_jsonl(QUESTIONS).splitlines()]
    assert [option["value"] for option in of_label_studio[1]["options"]] == QUESTIONS[1].options
    assert all("right" not in data for data in of_label_studio)


def test_only_who_answered_all_questions_rightly_passed(tmp_path: Path) -> None:
    first, second = (json.loads(line)["data"] for line in questions_jsonl(QUESTIONS).splitlines())
    right = [question.right for question in QUESTIONS]
    tasks = [
        labelled(first, "choice", "choices", (1, [right[0]], False), (2, [right[0]], False), (3, ["cats"], False)),
        labelled(second, "choice", "choices", (1, [right[1]], False), (3, [right[1]], False)),
    ]
    (tmp_path / "key.csv").write_text(key_csv(QUESTIONS), encoding="utf-8")
    assert passed_workers(export(tmp_path, tasks), tmp_path / "key.csv") == {"1"}
    with pytest.raises(MilanError, match="cannot be read"):
        passed_workers(export(tmp_path, tasks), tmp_path / "absent.csv")


@pytest.mark.parametrize("lines", [False, True])
def test_label_studio_answers_of_numbers_and_of_records_of_people(tmp_path: Path, lines: bool) -> None:
    data = {"model": "m", "layer": "0", "unit": 3, "exemplars": "e", "image": "x"}
    tasks = [
        labelled(data, "summary", "textarea", (4, ["dogs"], False), ({"id": 5, "email": "a@b.c"}, "two\ncats", False)),
        labelled(data, "summary", "textarea", (6, ["skipped"], True)),
    ]
    found, rejected = read_answers(export(tmp_path, tasks, lines))
    assert found == [Answer("m", "0", 3, "e", "4", "dogs"), Answer("m", "0", 3, "e", "5", "two\ncats")]
    assert rejected == 1
    assert len(read_answers(export(tmp_path, tasks, lines), keep_rejected=True)[0]) == 3


def test_mturk_answers_without_rejected_ones(tmp_path: Path) -> None:
    header = "Input.model,Input.layer,Input.unit,Input.exemplars,Answer.summary,WorkerId,RejectionTime\n"
    path = tmp_path / "results.csv"
    path.write_text(header + 'm,0,3,e,"dogs, cats",W1,\nm,0,3,e,good,W2,Mon\n', encoding="utf-8")
    assert read_answers(path) == ([Answer("m", "0", 3, "e", "W1", "dogs, cats")], 1)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{", "no export of Label Studio"),
        ("a.json", '[{"data": {}}]', "no export of Label Studio"),
        ("a.csv", "layer,unit\n", "has no column Input.model"),
        (
            "a.json",
            '[{"data": {"model": "m", "layer": "l", "unit": 1}, "annotations": [{"completed_by": 1, "result": []}]}]',
            "a task without exemplars",
        ),
    ],
)
def test_foreign_answers_are_one_sentence(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(MilanError, match=message):
        read_answers(tmp_path / name)


def test_questions_are_read_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "questions.csv"
    path.write_text("model,layer,unit,right,wrong\nm,conv1,4,dogs,cats | sky|\n", encoding="utf-8")
    assert read_questions(path) == [("m", "conv1", 4, "dogs", ("cats", "sky"))]
    for text, message in (
        ("model,layer,unit,right\n", "has no column wrong"),
        ("model,layer,unit,right,wrong\nm,conv1,4,dogs,dogs\n", "question 1"),
        ("model,layer,unit,right,wrong\nm,conv1,x,dogs,cats\n", "question 1"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(MilanError, match=message):
            read_questions(path)
