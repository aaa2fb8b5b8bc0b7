"""Tasks in which people say whether an image shows what a description names, and their answers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from milan_ray.annotations.cleaning import REJECTED, WORKER, read_results
from milan_ray.annotations.collection import csv_text, jsonl_text, read_export
from milan_ray.annotations.layout import read_csv
from milan_ray.errors import MilanError

RATING_COLUMNS = ("labeler", "model", "layer", "unit", "image_id", "draws", "description", "image")
"""Fields of a task; Mechanical Turk returns them as ``Input.labeler`` and so on, Label Studio as the task's data."""

_KEYS = RATING_COLUMNS[:6]
_DRAWS, _CHOICE = "draws", "choice"  # names in the tasks and the templates
_YES = {"yes": True, "no": False}


@dataclass(frozen=True)
class RatingTask:
    """One image and one description.

    Attributes:
        labeler: Whose description it is.
        model: Name of the model.
        layer: Its layer.
        unit: Channel.
        image_id: Row in the probe manifest.
        draws: Configuration hash of the draws that the image is from.
        description: What to look for.
        image: URL of the image.
    """

    labeler: str
    model: str
    layer: str
    unit: int
    image_id: int
    draws: str
    description: str
    image: str

    @property
    def place(self) -> str:
        """A key that orders tasks so that their order tells nothing: neither units nor activations follow it."""
        return hashlib.sha256(f"{self.draws} {self.labeler} {self.unit} {self.image_id}".encode()).hexdigest()


@dataclass(frozen=True)
class RatingAnswer:
    """What one worker said of one image and description.

    Attributes:
        labeler: Whose description it is.
        model: Name of the model.
        layer: Its layer.
        unit: Channel.
        image_id: Row in the probe manifest.
        draws: Configuration hash of the draws.
        worker: The worker's identifier on the platform.
        yes: Whether the worker found what the description names.
    """

    labeler: str
    model: str
    layer: str
    unit: int
    image_id: int
    draws: str
    worker: str
    yes: bool


def ratings_csv(tasks: Iterable[RatingTask]) -> str:
    """Formats tasks as a batch file of Mechanical Turk."""
    return csv_text(RATING_COLUMNS, ([getattr(task, name) for name in RATING_COLUMNS] for task in tasks))


def ratings_jsonl(tasks: Iterable[RatingTask]) -> str:
    """Formats tasks for Label Studio, one JSON object a line."""
    return jsonl_text(map(asdict, tasks))


def are_ratings(paths: Sequence[Path]) -> bool:
    """Whether files of answers are about images to rate, and not about units to describe.

    Raises:
        MilanError: Some are and others are not, or a file cannot be read.
    """
    kinds = {path: _is_rating(path) for path in paths}
    if len(set(kinds.values())) > 1:
        rated = ", ".join(str(path) for path, rating in kinds.items() if rating)
        raise MilanError(f"{rated} rate descriptions and the other files describe units: give each kind by itself.")
    return any(kinds.values())


def _is_rating(path: Path) -> bool:
    if path.suffix.lower() == ".csv":
        remedy = "give Mechanical Turk's results as CSV."
        return any(f"Input.{_DRAWS}" in row for _, row in read_csv(path, [WORKER], remedy, remedy))
    return any(_DRAWS in data for data, *_ in read_export(path, _CHOICE))


def read_ratings(path: Path, *, keep_rejected: bool = False) -> tuple[list[RatingAnswer], int]:
    """Reads the ratings of either platform, which it tells apart by the file's extension.

    Args:
        path: Mechanical Turk's results (``.csv``), or Label Studio's export.
        keep_rejected: Keep rejected or skipped answers.

    Returns:
        The answers, and the number of those left out because they were rejected or skipped.

    Raises:
        MilanError: The file has neither format, an answer is neither yes nor no, or a task lacks a field.
    """
    places: list[Mapping[str, Any]]
    if path.suffix.lower() == ".csv":
        inputs = {name: f"Input.{name}" for name in _KEYS}
        answer = f"Answer.{_CHOICE}"
        rows, rejected = read_results(path, [*inputs.values(), answer, WORKER, REJECTED], keep_rejected=keep_rejected)
        places = [{name: row[column] for name, column in inputs.items()} for row in rows]
        given = [(row[WORKER], [row[answer]]) for row in rows]
    else:
        exported = read_export(path, _CHOICE)
        # A skipped annotation has no choice; it cannot be kept.
        kept = [each for each in exported if each[3] and (keep_rejected or not each[2])]
        rejected = len(exported) - len(kept)
        places = [data for data, *_ in kept]
        given = [(worker, choices) for _, worker, _, choices in kept]
    return [_answer(path, place, *each) for place, each in zip(places, given, strict=True)], rejected


def _answer(path: Path, place: Mapping[str, Any], worker: str, choices: Sequence[str]) -> RatingAnswer:
    texts = {name: str(place.get(name, "")).strip() for name in _KEYS}
    missing = [name for name, text in texts.items() if not text]
    if missing or not (texts["unit"].isdecimal() and texts["image_id"].isdecimal()):
        lacks = ", ".join(missing) or "a whole number as unit and as image_id"
        raise MilanError(
            f"{path} has an answer to a task without {lacks}: give the answers to tasks of `annotations collect "
            "--sampling`, as downloaded."
        )
    choice = choices[0].strip().lower() if len(choices) == 1 else ""
    if choice not in _YES:
        said = ", ".join(choices)
        raise MilanError(f"{path} has the answer {said!r}, which is neither yes nor no: correct the file.")
    labeler, model, layer, unit, image_id, draws = (texts[name] for name in _KEYS)
    return RatingAnswer(labeler, model, layer, int(unit), int(image_id), draws, worker, _YES[choice])
