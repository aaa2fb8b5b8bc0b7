"""Captioners trained on some annotated networks, judged on others (paper §4, Tables 3 and 6).

encodings + annotations ─► splits ─► [a training each] ─► captioners ─► held-out descriptions ─► scores, table, figure
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby

import numpy as np
import polars as pl
import torch
from spacy.language import Language

from milan_ray.annotations.splits import Split
from milan_ray.captioner.captioner import best_descriptions
from milan_ray.config import Resources
from milan_ray.engine.cluster import gpus_each
from milan_ray.engine.planner import Plan
from milan_ray.engine.stage import Output, due
from milan_ray.errors import MilanError
from milan_ray.labelers.milan import LIKELIHOOD, MILAN
from milan_ray.progress import say
from milan_ray.report.figures import store_figure
from milan_ray.schema import ENCODINGS, GENERALIZATION, HELD_OUT, SCORES, SPLITS, TRAINING
from milan_ray.scoring.bootstrap import Interval
from milan_ray.scoring.evaluation import CONSTANT, NEAREST, best_constant, nearest_copy, score_table
from milan_ray.scoring.text import BertScore
from milan_ray.stages.captioners import load_captioner
from milan_ray.stages.descriptions import units_per_search
from milan_ray.stages.encodings import Encodings, unit_features
from milan_ray.stages.training import Training, TrainingJob, run_trainings
from milan_ray.storage import Storage
from milan_ray.studies.generalization import statistics as generalization
from milan_ray.studies.generalization.job import (
    GeneralizationJob,
    HeldOut,
    ScoreTable,
    Splits,
    SplitScores,
    Trial,
)
from milan_ray.studies.generalization.plot import plot_generalization
from milan_ray.studies.tables import Unit, read_annotations, read_frame, write_frame
from milan_ray.studies.tasks import run_tasks, worker_device

FEW_UNITS = 256
"""Up to this number of held-out units, the driver describes and scores them, because workers take longer to start."""


def run_generalization(
    storage: Storage, job: GeneralizationJob, nlp: Language, language: str, resources: Resources
) -> pl.DataFrame:
    """Trains a captioner per split and trial, describes the held-out units with it, and scores the descriptions.

    Makes only what is missing or stale.

    Args:
        storage: The run directory, which holds annotations and encodings of all models.
        job: The experiment.
        nlp: The spaCy pipeline that reads the descriptions.
        language: Its name: printed, and part of the fingerprint.
        resources: The part of the cluster to use; Ray must be connected.

    Returns:
        Rows of schema GENERALIZATION of all splits.

    Raises:
        MilanError: Annotations or encodings are missing, a split has no unit on one side, or trainings failed.
    """
    started = time.monotonic()
    trials = find_trials(storage, job, resources)
    units = {unit for trial in trials for unit in (*trial.train, *trial.test)}
    say(
        f"{job.name}: {len(job.splits)} splits, {job.config.trials} trials each, {len(units)} annotated units of "
        f"{len(job.models)} models"
    )
    gpus = gpus_each(resources)
    run_trainings(storage, [replace(trial.training, gpus=gpus) for trial in trials])
    Splits(job.name, trials).run(storage)
    _describe(storage, job, trials, resources)
    _score(storage, job, trials, nlp, language, resources)
    rows = pl.concat(read_frame(storage, GENERALIZATION, experiment=job.name, split=split.name) for split in job.splits)
    _publish(storage, job, rows)
    say(f"{job.name}: done in {time.monotonic() - started:.0f} s")
    return rows


def plan_generalization(storage: Storage, job: GeneralizationJob, language: str, resources: Resources) -> Plan:
    """The dry run of encoding the annotated layers and of :func:`run_generalization`.

    Raises:
        MilanError: Exemplars or annotations are missing or do not belong together, or a split has too few units.
    """
    plan = Plan.of(storage, [Encodings(job.layers, job.encoder)])
    tables = (SPLITS, TRAINING, HELD_OUT, GENERALIZATION, SCORES)
    waiting = [plan.waits(table.name, (job.name,), ENCODINGS.name) for table in tables]  # which say what units count
    if not any(waiting):
        trials = find_trials(storage, job, resources)
        plan.stages(storage, [Splits(job.name, trials)])
        for trial in trials:
            plan.stages(storage, [Training(trial.training), HeldOut(job, trial)])
        plan.stages(storage, [SplitScores(job, language), ScoreTable(job)])
    return plan


def _annotated(storage: Storage, job: GeneralizationJob, model: str) -> list[Unit]:
    """A model's units that have annotations with words, and as many exemplars as the other units of their layer."""
    units: list[Unit] = []
    for layer in job.layers[model]:
        annotated = read_annotations(storage, job.source, [(model, layer)])
        encoded = storage.read(ENCODINGS, ["unit"], encoder=job.encoder.name, model=model, layer=layer)
        numbers, exemplars = np.unique(encoded["unit"].to_numpy(), return_counts=True)
        complete = numbers[exemplars == exemplars.max(initial=0)].tolist()
        units += [(model, layer, unit) for unit in complete if (model, layer, unit) in annotated]
    return units


def find_trials(storage: Storage, job: GeneralizationJob, resources: Resources) -> list[Trial]:
    """All captioners of an experiment, trained or not; arguments and errors as of :func:`run_generalization`."""
    annotated = {model: _annotated(storage, job, model) for model in job.models}
    return [
        _trial(split, number, job, annotated, resources) for split in job.splits for number in range(job.config.trials)
    ]


def _trial(
    split: Split,
    number: int,
    job: GeneralizationJob,
    annotated: Mapping[str, Sequence[Unit]],
    resources: Resources,
) -> Trial:
    config = job.config
    optimisation = config.within if split.within else config.training
    train, test = generalization.divided(split, annotated, config.share, optimisation.seed, number)
    if len(train) < 2 or not test:
        raise MilanError(
            f"split {split.name}: {len(train)} annotated units to train on and {len(test)} to judge by are too few; "
            "annotate more, or leave it out with --split."
        )
    layers = job.pairs(split.train_models)
    units = tuple(tuple(unit for *layer, unit in train if tuple(layer) == pair) for pair in layers)
    training = TrainingJob(
        f"{job.name}-{split.name}-{number}",
        job.source,
        layers,
        job.encoder,
        replace(optimisation, seed=optimisation.seed + number),
        config.sizes,
        job.workers,
        resources.cpus_per_actor,
        threads=resources.threads,
        memory_limit=job.memory_limit,
        units=units if split.within else (),
        keep_encoder=False,
    )
    return Trial(split, number, train, test, training)


# -- descriptions by the captioners -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    """A captioner whose held-out units are described, or all captioners of a split that is scored."""

    storage: Storage
    job: GeneralizationJob
    output: Output
    trials: tuple[Trial, ...]
    resources: Resources

    @property
    def units(self) -> list[Unit]:
        """The distinct held-out units."""
        return sorted({unit for trial in self.trials for unit in trial.test})


def _describe(storage: Storage, job: GeneralizationJob, trials: Sequence[Trial], resources: Resources) -> None:
    tasks = [
        _Task(storage, job, output, (trial,), resources)
        for trial in trials
        for output in due(HeldOut(job, trial), storage)
    ]
    if not tasks:
        say(f"{job.name}: held-out descriptions are all up to date")
        return
    few = sum(len(task.units) for task in tasks) <= FEW_UNITS
    for _ in run_tasks(_describe_units, tasks, resources, "held-out descriptions", "captioners", in_driver=few):
        pass


def _describe_units(task: _Task) -> None:
    """Writes a captioner's descriptions of held-out units, and two baselines: one text for all, the nearest unit's."""
    device = worker_device(task.resources)
    storage, job, (trial,) = task.storage, task.job, task.trials
    captioner = load_captioner(storage, trial.training.name).to(str(device))
    lam = captioner.lam if job.config.lam is None else job.config.lam
    texts: dict[str, list[str]] = {MILAN: [], LIKELIHOOD: []}
    means = []
    quirks, step = job.config.quirks, units_per_search(job.config.quirks)
    for features in _features(storage, job, trial.test):
        means.append(features.mean(axis=1))
        for start in range(0, len(features), step):
            candidates = captioner.candidates(features[start : start + step], job.config.beam_size, quirks=quirks)
            for system, weight in ((MILAN, lam), (LIKELIHOOD, 0.0)):
                texts[system] += [best.text for (best,) in best_descriptions(candidates, weight, quirks=quirks)]
    captions = references_of(storage, job, trial.train)
    train_means = np.concatenate([features.mean(axis=1) for features in _features(storage, job, trial.train)])
    texts[CONSTANT] = [best_constant(list(captions.values()))] * len(trial.test)
    texts[NEAREST] = nearest_copy(train_means, [captions[unit][0] for unit in trial.train], np.concatenate(means))
    rows = [
        (system, *unit, text)
        for system, descriptions in texts.items()
        for unit, text in zip(trial.test, descriptions, strict=True)
    ]
    frame = pl.DataFrame(rows, ["system", "model", "layer", "unit", "description"], orient="row")
    write_frame(storage, HELD_OUT, frame, task.output.fingerprint, **task.output.keys)


def _features(storage: Storage, job: GeneralizationJob, units: Sequence[Unit]) -> Iterator[np.ndarray]:
    """Features of units, which come layer by layer: float32 (units of the layer, k, F)."""
    columns = ["unit", "rank", "feature"]
    for (model, layer), members in groupby(units, key=lambda unit: unit[:2]):
        features = unit_features(storage.read(ENCODINGS, columns, encoder=job.encoder.name, model=model, layer=layer))
        yield np.stack([features[unit] for _, _, unit in members])


def references_of(storage: Storage, job: GeneralizationJob, units: Sequence[Unit]) -> dict[Unit, list[str]]:
    """The annotations of units, except those without words."""
    layers = dict.fromkeys((model, layer) for model, layer, _ in units)
    annotations = read_annotations(storage, job.source, layers, by_annotator=True)
    return {unit: annotations.get(unit, []) for unit in units}


# -- scores -----------------------------------------------------------------------------------------------------------


def _score(
    storage: Storage,
    job: GeneralizationJob,
    trials: Sequence[Trial],
    nlp: Language,
    language: str,
    resources: Resources,
) -> None:
    tasks = []
    for output in due(SplitScores(job, language), storage):
        of_split = tuple(trial for trial in trials if trial.split.name == output.keys["split"])
        tasks.append(_Task(storage, job, output, of_split, resources))
    if not tasks:
        say(f"{job.name}: scores are all up to date")
        return
    few = sum(len(task.units) for task in tasks) <= FEW_UNITS
    for index, scored in run_tasks(_score_split, tasks, resources, "scores", "splits", in_driver=few):
        output, split = tasks[index].output, tasks[index].trials[0].split
        texts = generalization.text_rows(held_out(storage, job, split.name), nlp, language)
        about = {"kind": split.kind, "train": split.train, "test": split.test}
        rows = pl.concat([scored, texts]).with_columns(pl.lit(value).alias(key) for key, value in about.items())
        write_frame(storage, GENERALIZATION, rows, output.fingerprint, **output.keys)


def _score_split(task: _Task) -> pl.DataFrame:
    torch.set_num_threads(task.resources.threads)
    split = task.output.keys["split"]
    bert = _bert_score(task.job.bert_score) if task.job.bert_score else None
    references = references_of(task.storage, task.job, task.units)
    return generalization.score_split(split, held_out(task.storage, task.job, split), references, bert)


@lru_cache(maxsize=1)
def _bert_score(folder: str) -> BertScore:
    """One per process, which scores one split after the other."""
    return BertScore(folder)


def held_out(storage: Storage, job: GeneralizationJob, split: str) -> pl.DataFrame:
    """Descriptions by the captioners of all trials of a split: rows of schema HELD_OUT, the trial as a number."""
    tables = (
        read_frame(storage, HELD_OUT, experiment=job.name, split=split, trial=str(trial))
        for trial in range(job.config.trials)
    )
    return pl.concat(tables).with_columns(pl.col("trial").cast(pl.Int32))


def _publish(storage: Storage, job: GeneralizationJob, rows: pl.DataFrame) -> None:
    """Writes the table of scores that the report shows, and the figure."""
    metric = generalization.main_metric(rows)
    note = "MILAN on the held-out units, against all annotations of the unit; table generalization has the other rows"
    columns = ("train", "test", metric, "low", "high", "units")
    scores = [
        (f"{train} → {test}", metric, Interval(value, low, high), units, note)
        for train, test, value, low, high, units in generalization.table_3(rows).select(columns).iter_rows()
    ]
    for output in due(ScoreTable(job), storage):
        store_figure(storage, SCORES, plot_generalization(rows), **output.keys)
        # The table is written last: it marks the result as complete.
        storage.write(SCORES, score_table(job.name, scores), output.fingerprint, **output.keys)
