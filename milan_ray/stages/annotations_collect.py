"""Annotation tasks for people: exemplars + views ─► images and task files; answers ─► annotations."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from PIL import Image

from milan_ray.annotations import collection
from milan_ray.annotations.cleaning import CleaningTables
from milan_ray.annotations.collection import Answer, Question, Task
from milan_ray.annotations.layout import whole_folder
from milan_ray.annotations.merge import nearest
from milan_ray.annotations.published import Sample
from milan_ray.config import config_hash
from milan_ray.errors import MilanError
from milan_ray.exemplars import masks
from milan_ray.exemplars.masks import mask_size
from milan_ray.names import checked_name
from milan_ray.progress import Progress, say
from milan_ray.schema import ANNOTATIONS, EXEMPLARS
from milan_ray.scoring.agreement import TextScore, leave_one_out, mean_agreement
from milan_ray.stages.annotations_export import exemplar_layers
from milan_ray.storage import EXEMPLARS_KEY, Storage
from milan_ray.storage.image_blocks import decode, read_pngs

KERNEL_VERSION = "answers-1"

SMALLEST = 160
"""Minimum side of an exemplar in the images of the tasks, pixels."""

UNITS_AT_ONCE = 512
"""Units whose images are in memory at a time, as PNG: a few hundred megabytes."""

IMAGES, TASKS, LABEL_STUDIO = "images", "tasks.csv", "label-studio.jsonl"
QUALIFICATION, KEY = "qualification", "qualification-key"
"""Names of the files and folders of a folder of tasks."""


def run_collect(
    storage: Storage,
    model: str,
    folder: Path,
    *,
    layers: Sequence[str] | None = None,
    units: Sequence[int] = (),
    url: str = "",
    qualification: Path | None = None,
) -> int:
    """Writes the tasks in which people describe units; a folder that exists is complete.

    Into the folder: ``images/``, a picture per unit with its exemplars side by side, darkened outside the masks;
    ``tasks.csv`` and ``mturk.html`` for Mechanical Turk; ``label-studio.jsonl`` and ``label-studio.xml`` for Label
    Studio. With a qualification test, for Mechanical Turk ``qualification.xml`` and ``qualification-key.xml``, for
    Label Studio ``qualification.jsonl`` and ``qualification-label-studio.xml``; ``qualification-key.csv`` has the right
    answers.

    Args:
        storage: The run directory, which holds exemplars and views.
        model: Name of the model.
        folder: Folder to be made.
        layers: Which layers; None takes all.
        units: Which units of each; none takes all.
        url: What pictures' addresses begin with: where ``images/`` will be served.
        qualification: CSV of the test's questions (:func:`~milan_ray.annotations.collection.read_questions`); their
            units may be of any model with exemplars, and are not asked about.

    Returns:
        How many tasks.

    Raises:
        MilanError: There are no such exemplars, a file is damaged, or the folder is there already or cannot be written.
    """
    wanted = [(model, layer) for layer in exemplar_layers(storage, model, layers)]
    asked = [] if qualification is None else collection.read_questions(qualification)
    for of, layer, *_ in asked:
        exemplar_layers(storage, of, [layer])
    questioned = {(of, layer, unit) for of, layer, unit, *_ in asked}
    with whole_folder(folder) as part:
        tasks: list[Task] = []
        for number, (of, layer) in enumerate(wanted):
            present = storage.read(EXEMPLARS, ["unit"], model=of, layer=layer)["unit"].unique().to_pylist()
            chosen = [u for u in sorted(present) if (not units or u in units) and (of, layer, u) not in questioned]
            tasks += _write_images(storage, of, layer, chosen, part, f"{IMAGES}/{number:02d}", url)
        if not tasks:
            raise MilanError(f"none of the chosen units of {model} has exemplars: choose others with --units.")
        questions = []
        for number, (of, layer, unit, right, wrong) in enumerate(asked):
            shown = _write_images(storage, of, layer, [unit], part, f"{IMAGES}/{QUALIFICATION}/{number:02d}", url)
            if not shown:
                raise MilanError(f"the qualification test asks about {of} {layer} {unit}, which has no exemplars.")
            questions.append(Question(shown[0], right, wrong))
        _write(part, tasks, questions)
    return len(tasks)


def _write(folder: Path, tasks: Sequence[Task], questions: Sequence[Question]) -> None:
    def template(name: str) -> str:
        return (collection.TEMPLATES / name).read_text(encoding="utf-8")

    files = {
        TASKS: collection.tasks_csv(tasks),
        LABEL_STUDIO: collection.tasks_jsonl(tasks),
        "mturk.html": template("mturk.html"),
        "label-studio.xml": template("label-studio.xml"),
    }
    if questions:
        files |= {
            f"{QUALIFICATION}.xml": collection.question_form(questions),
            f"{KEY}.xml": collection.answer_key(questions),
            f"{QUALIFICATION}.jsonl": collection.questions_jsonl(questions),
            f"{QUALIFICATION}-label-studio.xml": template("qualification.xml"),
            f"{KEY}.csv": collection.key_csv(questions),
        }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8", newline="")


def _write_images(
    storage: Storage, model: str, layer: str, units: Sequence[int], folder: Path, place: str, url: str
) -> list[Task]:
    """Writes one image of each unit's exemplars; returns the tasks of the units that have any."""
    keys = {"model": model, "layer": layer}
    table = storage.read(EXEMPLARS, ["unit", "rank", "image_id", "mask"], **keys).combine_chunks()
    meta = storage.metadata(EXEMPLARS, **keys) or {}
    size = mask_size(meta)
    unit_of, rank = table["unit"].to_numpy(), table["rank"].to_numpy()
    order = np.lexsort((rank, unit_of))
    exemplars = storage.config_of(EXEMPLARS, **keys)
    (folder / place).mkdir(parents=True)
    tasks: list[Task] = []

    def write(unit: int, rows: np.ndarray, pngs: dict[int, bytes]) -> Task:
        of_unit = table.take(rows)
        pixels = [nearest(decode(pngs[i]).transpose(2, 0, 1), size) for i in of_unit["image_id"].to_pylist()]
        regions = masks.unpack(of_unit["mask"].to_pylist(), size)
        images = np.stack(pixels).astype(np.float32) / 255
        sample = Sample(layer, unit, images, regions[:, None].astype(np.float32))
        grid = sample.grid()
        factor = -(-SMALLEST // max(size))
        if factor > 1:
            grid = grid.resize((grid.width * factor, grid.height * factor), Image.Resampling.NEAREST)
        file = f"{place}/{unit}.jpg"
        grid.save(folder / file, quality=90, subsampling=0)
        return Task(model, layer, unit, exemplars, f"{url}{file}")

    with ThreadPoolExecutor(os.cpu_count()) as pool, Progress(f"pictures of {layer}", len(units), "units") as progress:
        for start in range(0, len(units), UNITS_AT_ONCE):
            now = units[start : start + UNITS_AT_ONCE]
            rows_of = {unit: order[slice(*np.searchsorted(unit_of[order], [unit, unit + 1]))] for unit in now}
            rows_of = {unit: rows for unit, rows in rows_of.items() if len(rows)}
            ids = sorted({table["image_id"][row].as_py() for rows in rows_of.values() for row in rows.tolist()})
            pngs = read_pngs(storage, meta["probe"], meta["view"], ids)
            for task in pool.map(lambda item: write(*item), [(unit, rows, pngs) for unit, rows in rows_of.items()]):
                tasks.append(task)
                progress.advance()
    return tasks


# -- answers ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """Answers that were imported, and counts of those left out.

    Attributes:
        texts: Columns source, model, layer, unit, annotator, text: what is now in the table ``annotations``.
        rejected: Answers left out because they were rejected, or skipped.
        unqualified: Answers left out because their worker did not pass the qualification test.
        empty: Answers left out because no word of them remained.
        repeated: Second answers of a worker to the same unit, left out.
    """

    texts: pl.DataFrame
    rejected: int
    unqualified: int
    empty: int
    repeated: int


def run_answers(
    storage: Storage,
    files: Sequence[Path],
    source: str,
    *,
    tables: CleaningTables | None = None,
    keep_rejected: bool = False,
    qualified: set[str] | None = None,
) -> Answers:
    """Imports people's answers into the table ``annotations``, cleaned, one layer at a time.

    Give all files of a source at once: what a layer had from it is replaced. Workers' names do not enter the table;
    they are told apart by hashes.

    Args:
        storage: The run directory, which holds the exemplars that were shown.
        files: Answers of either platform (:func:`~milan_ray.annotations.collection.read_answers`).
        source: What the source is to be called.
        tables: What to replace in texts (:mod:`milan_ray.annotations.cleaning`), which are made lower case first.
        keep_rejected: Keep what was rejected, or skipped.
        qualified: Only answers of these workers; None for all.

    Raises:
        MilanError: A file is damaged, holds no answer, or speaks of other exemplars than those that are there.
    """
    checked_name("a source of annotations", source, slashes=True)
    tables = (tables or CleaningTables()).spelled()
    answers: list[Answer] = []
    rejected = 0
    for file in files:
        accepted, refused = collection.read_answers(file, keep_rejected=keep_rejected)
        answers += accepted
        rejected += refused
    unqualified = 0
    if qualified is not None:
        unqualified = sum(answer.worker not in qualified for answer in answers)
        answers = [answer for answer in answers if answer.worker in qualified]
    kept: dict[tuple[str, str, int, str], str] = {}
    dropped: Counter[str] = Counter()
    for answer in answers:
        text = tables.clean(answer.text, answer.worker)
        key = (answer.model, answer.layer, answer.unit, annotator(source, answer.worker))
        if not text:
            dropped["empty"] += 1
        elif key in kept:
            dropped["repeated"] += 1
        else:
            kept[key] = text
    if not kept:
        raise MilanError(f"no answer is left of {', '.join(map(str, files))}: nothing was written.")
    shown: dict[tuple[str, str], set[str]] = defaultdict(set)
    for answer in answers:
        shown[answer.model, answer.layer].add(answer.exemplars)
    layers = sorted({(model, layer) for model, layer, *_ in kept})
    for model, layer in layers:
        exemplar_layers(storage, model, [layer])
        if shown[model, layer] != {storage.config_of(EXEMPLARS, model=model, layer=layer)}:
            raise MilanError(
                f"answers on {model} {layer} speak of other exemplars than those now in {storage.root}: import them "
                "where the tasks were made, before its exemplars are made anew."
            )
    frames = []
    for model, layer in layers:
        rows = sorted((unit, who, text) for (of, at, unit, who), text in kept.items() if (of, at) == (model, layer))
        frames.append(_store(storage, source, model, layer, rows))
    texts = pl.concat(frames)
    say(f"annotations of source {source}: {len(texts)} on {texts.select('model', 'layer', 'unit').n_unique()} units")
    return Answers(texts, rejected, unqualified, dropped["empty"], dropped["repeated"])


def annotator(source: str, worker: str) -> str:
    """A pseudonym of a worker: a hash of the name."""
    return f"worker-{hashlib.sha256(f'{source} {worker}'.encode()).hexdigest()[:8]}"


def _store(storage: Storage, source: str, model: str, layer: str, rows: Sequence[tuple[int, str, str]]) -> pl.DataFrame:
    keys = {"source": source, "model": model, "layer": layer}
    exemplars = storage.config_of(EXEMPLARS, model=model, layer=layer)
    columns = {name: [row[place] for row in rows] for place, name in enumerate(("unit", "annotator", "text"))}
    table = ANNOTATIONS.table(columns, {EXEMPLARS_KEY: exemplars}, **keys)
    stamp = config_hash({"kernel": KERNEL_VERSION, "exemplars": exemplars, "annotations": rows})
    if not storage.is_current(ANNOTATIONS, stamp, **keys):
        storage.write(ANNOTATIONS, table, stamp, **keys)
    return pl.DataFrame(pl.from_arrow(table))


def agreement_report(answers: Answers, score: TextScore, measure: str) -> str:
    """Formats the agreement of annotations, by model and by worker: each is compared with the unit's others."""
    lines = [
        f"left out: {answers.rejected} rejected or skipped, {answers.unqualified} of workers who did not pass the "
        f"test, {answers.empty} without a word, {answers.repeated} repeated"
    ]
    scores = leave_one_out(answers.texts, score)
    if not len(scores):
        return "\n".join([*lines, "no unit has two annotations: agreement cannot be told"])
    per_unit = answers.texts.group_by("model", "layer", "unit").len()["len"]
    lines.append(
        f"{len(per_unit)} units with {per_unit.min()!r} to {per_unit.max()!r} annotations; agreement by {measure}:"
    )
    every = [*mean_agreement(scores, ("model",)).iter_rows(), ("all", *mean_agreement(scores, ()).row(0))]
    for name, units, texts, value, low, high in every:
        lines.append(f"  {name:28} {value:.3f} [{low:.3f}, {high:.3f}] over {units} units, {texts} annotations")
    lines.append("by worker, the least first: whose answers have little to do with the others' is worth a look")
    for name, units, _, value, low, high in mean_agreement(scores, ("annotator",)).sort("agreement").iter_rows():
        lines.append(f"  {name:28} {value:.3f} [{low:.3f}, {high:.3f}] over {units} units")
    return "\n".join(lines)
