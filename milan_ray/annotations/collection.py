"""Collects human annotations: task files for Mechanical Turk and Label Studio, a qualification test, and answers."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from milan_ray.annotations.cleaning import REJECTED, TEXT, WORKER, read_results
from milan_ray.annotations.layout import read_csv
from milan_ray.errors import MilanError
from milan_ray.textfiles import read_text

TASK_COLUMNS = ("model", "layer", "unit", "exemplars", "image")
"""Fields of a task; Mechanical Turk returns them as ``Input.model`` and so on, Label Studio as the task's data."""

QUESTION_COLUMNS = ("model", "layer", "unit", "right", "wrong")
"""Columns of the file of qualification questions; ``wrong`` holds one or more sentences, separated by ``|``."""

TEMPLATES = Path(__file__).parent / "templates"

_SCHEMAS = "http://mechanicalturk.amazonaws.com/AWSMechanicalTurkDataSchemas"
_FORM, _KEY = f"{_SCHEMAS}/2017-11-06/QuestionForm.xsd", f"{_SCHEMAS}/2005-10-01/AnswerKey.xsd"
_SUMMARY, _CHOICE = "summary", "choice"  # names in the templates


@dataclass(frozen=True)
class Task:
    """One unit to describe.

    Attributes:
        model: Name of the model.
        layer: Its layer.
        unit: Channel.
        exemplars: Configuration hash of the exemplars shown, to which the answers refer.
        image: URL of the image that shows them.
    """

    model: str
    layer: str
    unit: int
    exemplars: str
    image: str


@dataclass(frozen=True)
class Question:
    """One question of the qualification test: which sentence describes a unit best?

    Attributes:
        task: The unit.
        right: The answer.
        wrong: The other sentences.
    """

    task: Task
    right: str
    wrong: tuple[str, ...]

    @property
    def name(self) -> str:
        """An identifier that hides the answer."""
        unit = f"{self.task.model}/{self.task.layer}/{self.task.unit}"
        return f"question-{hashlib.sha256(unit.encode()).hexdigest()[:8]}"

    @property
    def options(self) -> list[str]:
        """All sentences, in a fixed order that hides the answer."""
        return sorted((self.right, *self.wrong), key=lambda text: hashlib.sha256(text.encode()).hexdigest())


@dataclass(frozen=True)
class Answer:
    """What one worker wrote about one unit.

    Attributes:
        model: Name of the model.
        layer: Its layer.
        unit: Channel.
        exemplars: Configuration hash of the exemplars that the worker saw.
        worker: The worker's identifier on the platform.
        text: The description, as written.
    """

    model: str
    layer: str
    unit: int
    exemplars: str
    worker: str
    text: str


def read_questions(path: Path) -> list[tuple[str, str, int, str, tuple[str, ...]]]:
    """Reads the questions of a qualification test.

    Args:
        path: CSV with columns :data:`QUESTION_COLUMNS`.

    Returns:
        Model, layer, unit, the right sentence, the wrong ones.

    Raises:
        MilanError: The file cannot be read, a column is missing, or a question is invalid: its unit is no whole number,
            or it lacks a right sentence and a wrong one that all differ.
    """
    names = ", ".join(QUESTION_COLUMNS)
    needs = f"a qualification test needs {names} (several wrong sentences with | between)."
    questions = []
    for number, (_, row) in enumerate(read_csv(path, QUESTION_COLUMNS, needs, f"give a CSV file of {names}."), 1):
        unit, right = (row["unit"] or "").strip(), (row["right"] or "").strip()
        wrong = tuple(filter(None, (text.strip() for text in (row["wrong"] or "").split("|"))))
        if not unit.isdecimal() or not right or not wrong or len({right, *wrong}) < 1 + len(wrong):
            raise MilanError(
                f"{path}, question {number}: needs a whole number as unit, a right sentence, and wrong ones that "
                "all differ."
            )
        questions.append((row["model"], row["layer"], int(unit), right, wrong))
    return questions


# -- writing tasks ------------------------------------------------------------------------------------------------


def tasks_csv(tasks: Iterable[Task]) -> str:
    """Formats tasks as a batch file of Mechanical Turk."""
    return csv_text(TASK_COLUMNS, ([getattr(task, name) for name in TASK_COLUMNS] for task in tasks))


def tasks_jsonl(tasks: Iterable[Task]) -> str:
    """Formats tasks for Label Studio, one JSON object a line."""
    return jsonl_text(map(asdict, tasks))


def questions_jsonl(questions: Iterable[Question]) -> str:
    """Formats the qualification test as tasks for Label Studio, without the answers."""
    return jsonl_text(
        {"question": each.name, "image": each.task.image, "options": [{"value": option} for option in each.options]}
        for each in questions
    )


def key_csv(questions: Iterable[Question]) -> str:
    """Formats the answer key of the qualification test as CSV."""
    return csv_text(("question", "right"), ((each.name, each.right) for each in questions))


def question_form(questions: Iterable[Question]) -> str:
    """Builds the qualification test of Mechanical Turk (``CreateQualificationType``, parameter Test)."""
    task = "Choose the sentence that describes best what is inside the highlighted regions."
    overview = _element("Overview", _element("Title", "Describing highlighted regions"), _element("Text", task))
    form = _element("QuestionForm", overview, xmlns=_FORM)
    for each in questions:
        picture = _element(
            "Binary",
            _element("MimeType", _element("Type", "image"), _element("SubType", "jpeg")),
            _element("DataURL", each.task.image),
            _element("AltText", "Pictures with highlighted regions"),
        )
        selections = [
            _element("Selection", _element("SelectionIdentifier", f"{number}"), _element("Text", option))
            for number, option in enumerate(each.options)
        ]
        answer = _element(
            "SelectionAnswer", _element("StyleSuggestion", "radiobutton"), _element("Selections", *selections)
        )
        form.append(
            _question(
                each,
                _element("IsRequired", "true"),
                _element("QuestionContent", picture),
                _element("AnswerSpecification", answer),
            )
        )
    return _xml(form)


def answer_key(questions: Sequence[Question]) -> str:
    """Builds the test's answer key (parameter AnswerKey); the score is the percentage of right answers."""
    key = _element("AnswerKey", xmlns=_KEY)
    for each in questions:
        right = _element("SelectionIdentifier", f"{each.options.index(each.right)}")
        key.append(_question(each, _element("AnswerOption", right, _element("AnswerScore", "1"))))
    mapping = _element("PercentageMapping", _element("MaximumSummedScore", f"{len(questions)}"))
    key.append(_element("QualificationValueMapping", mapping))
    return _xml(key)


def csv_text(header: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    """Formats rows as CSV with lines that end in a newline alone."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return buffer.getvalue()


def jsonl_text(tasks: Iterable[Mapping[str, object]]) -> str:
    """Formats tasks for Label Studio, one JSON object a line."""
    return "".join(json.dumps({"data": task}, ensure_ascii=False) + "\n" for task in tasks)


def _element(name: str, *content: str | ElementTree.Element, **attributes: str) -> ElementTree.Element:
    """An XML element with a text or with elements inside."""
    element = ElementTree.Element(name, attributes)
    for part in content:
        if isinstance(part, str):
            element.text = part
        else:
            element.append(part)
    return element


def _question(question: Question, *content: ElementTree.Element) -> ElementTree.Element:
    return _element("Question", _element("QuestionIdentifier", question.name), *content)


def _xml(root: ElementTree.Element) -> str:
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


# -- reading answers ----------------------------------------------------------------------------------------------


def read_answers(path: Path, *, keep_rejected: bool = False) -> tuple[list[Answer], int]:
    """Reads the answers of either platform, which it tells apart by the file's extension.

    Args:
        path: Mechanical Turk's results (``.csv``), or Label Studio's export (``.json``, or ``.jsonl`` with a task per
            line).
        keep_rejected: Keep rejected or skipped answers.

    Returns:
        The answers, and the number of rejected or skipped answers left out.

    Raises:
        MilanError: The file has neither format, or is damaged.
    """
    if path.suffix.lower() == ".csv":
        inputs = {name: f"Input.{name}" for name in TASK_COLUMNS[:4]}
        rows, rejected = read_results(path, [*inputs.values(), TEXT, WORKER, REJECTED], keep_rejected=keep_rejected)
        places: list[Mapping[str, Any]] = [{name: row[column] for name, column in inputs.items()} for row in rows]
        texts = [(row[WORKER], row[TEXT]) for row in rows]
    else:
        exported = read_export(path, _SUMMARY)
        kept = [each for each in exported if keep_rejected or not each[2]]
        rejected = len(exported) - len(kept)
        places = [data for data, *_ in kept]
        texts = [(worker, " ".join(parts)) for _, worker, _, parts in kept]
    answers = []
    for place, (worker, text) in zip(places, texts, strict=True):
        missing = [name for name in TASK_COLUMNS[:4] if not str(place.get(name, "")).strip()]
        if missing or not str(place["unit"]).strip().isdecimal():
            raise MilanError(
                f"{path} has an answer to a task without {', '.join(missing) or 'a whole number as unit'}: give the "
                "answers to tasks of `annotations collect`, as downloaded."
            )
        model, layer, exemplars = (str(place[name]) for name in ("model", "layer", "exemplars"))
        answers.append(Answer(model, layer, int(place["unit"]), exemplars, worker, text))
    return answers, rejected


def passed_workers(path: Path, key: Path) -> set[str]:
    """Returns the workers who answered all questions of the qualification test correctly.

    Args:
        path: Label Studio's export of the test. Mechanical Turk needs none: it gives tasks only to workers who passed.
        key: ``qualification-key.csv``.

    Raises:
        MilanError: One of the files cannot be read.
    """
    remedy = "give the qualification-key.csv of the tasks."
    right = {row["question"]: row["right"] for _, row in read_csv(key, ("question", "right"), remedy, remedy)}
    answered: dict[str, dict[str, str]] = {}
    for data, worker, _, choices in read_export(path, _CHOICE):
        answered.setdefault(worker, {})[str(data.get("question"))] = choices[0] if choices else ""
    return {
        worker for worker, given in answered.items() if all(given.get(name) == text for name, text in right.items())
    }


def read_export(path: Path, name: str) -> list[tuple[Mapping[str, Any], str, bool, list[str]]]:
    """Reads an export of Label Studio.

    Args:
        path: Its JSON, or JSON with a task per line.
        name: Name of the control whose values are read.

    Returns:
        Of each annotation: the task's data, the worker, whether it was skipped, and the control's values.

    Raises:
        MilanError: The file is no such export.
    """
    try:
        text = read_text(path)
        tasks = (
            json.loads(text)
            if text.lstrip().startswith("[")
            else list(map(json.loads, filter(str.strip, text.splitlines())))
        )
        annotations: list[tuple[Mapping[str, Any], str, bool, list[str]]] = []
        for task in tasks:
            for annotation in task["annotations"]:
                who = annotation["completed_by"]  # a number; in some exports the person's record
                worker = str(who["id"] if isinstance(who, dict) else who)
                given: list[str] = []
                for result in annotation["result"]:
                    if result.get("from_name") == name:
                        value = result["value"].get("text" if name == _SUMMARY else "choices", [])
                        given += [value] if isinstance(value, str) else list(map(str, value))
                annotations.append((dict(task["data"]), worker, bool(annotation.get("was_cancelled")), given))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise MilanError(
            f"{path} is no export of Label Studio ({type(error).__name__}: {error}): give its JSON, or the results of "
            "Mechanical Turk as .csv."
        ) from error
    return annotations
