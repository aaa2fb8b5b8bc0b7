"""Captioners trained on some annotated networks, judged on others (paper §4, Tables 3 and 6).

encodings + annotations ─► splits ─► [a training each] ─► captioners ─► held-out descriptions ─► scores, table, figure
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import polars as pl
import pyarrow as pa
import torch
from spacy.language import Language

from milan_ray.annotations.splits import Split
from milan_ray.captioner.captioner import best_descriptions
from milan_ray.config import Resources
from milan_ray.device import resolve_device
from milan_ray.engine.cluster import gpus_each
from milan_ray.engine.planner import Plan
from milan_ray.engine.stage import Output, due
from milan_ray.engine.tasks import run_parallel
from milan_ray.errors import MilanError
from milan_ray.labelers.milan import LIKELIHOOD, MILAN
from milan_ray.progress import Progress, say
from milan_ray.report.figures import store_figure
from milan_ray.schema import ANNOTATIONS, ENCODINGS, GENERALIZATION, HELD_OUT, SCORES, SPLITS, TRAINING
from milan_ray.scoring.bootstrap import Interval
from milan_ray.scoring.evaluation import CONSTANT, NEAREST, best_constant, nearest_copy, score_table
from milan_ray.scoring.text import BertScore, normalize
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
from milan_ray.studies.generalization.statistics import Unit

FEW_UNITS = 256
"""Held-out units of no more are described, and scored, by the driver: workers take longer to start."""


def run_generalization(
    storage: Storage, job: GeneralizationJob, nlp: Language, language: str, resources: Resources
) -> pl.DataFrame:
    """Trains a captioner per split and trial, lets it describe the held-out units, and scores that; what is missing.

    Args:
        storage: The run directory, which holds annotations and encodings of all models.
        job: What to find out.
        nlp: Tells words and parts of speech of the descriptions.
        language: Its name: printed, and part of what decides the result.
        resources: What of the cluster to use; Ray must be connected.

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
    rows = [storage.read(GENERALIZATION, experiment=job.name, split=split.name) for split in job.splits]
    frame = pl.DataFrame(pl.from_arrow(pa.concat_tables(table.replace_schema_metadata() for table in rows)))
    _publish(storage, job, frame)
    say(f"{job.name}: done in {time.monotonic() - started:.0f} s")
    return frame


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
    """A model's units that have annotations with words, and as many exemplars as the others of their layer."""
    found = []
    for layer in job.layers[model]:
        said = storage.read(ANNOTATIONS, ["unit", "text"], source=job.source, model=model, layer=layer).to_pylist()
        worded = {row["unit"] for row in said if normalize(row["text"])}
        encoded = storage.read(ENCODINGS, ["unit"], encoder=job.encoder.name, model=model, layer=layer)
        units, counts = np.unique(encoded["unit"].to_numpy(), return_counts=True)
        whole = units[counts == counts.max()].tolist() if len(units) else []
        found += [(model, layer, unit) for unit in whole if unit in worded]
    return found


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
    of_layers: dict[tuple[str, str], list[int]] = {layer: [] for layer in layers}
    for model, layer, unit in train:
        of_layers[model, layer].append(unit)
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
        units=tuple(map(tuple, of_layers.values())) if split.within else (),
        keep_encoder=False,
    )
    return Trial(split, number, train, test, training)


# -- what captioners say ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Saying:
    """Held-out units to describe."""

    storage: Storage
    job: GeneralizationJob
    trial: Trial
    output: Output
    threads: int
    device: str


def _describe(storage: Storage, job: GeneralizationJob, trials: Sequence[Trial], resources: Resources) -> None:
    tasks = [
        _Saying(storage, job, trial, output, resources.threads, resources.device)
        for trial in trials
        for output in due(HeldOut(job, trial), storage)
    ]
    if not tasks:
        say(f"{job.name}: held-out descriptions are all up to date")
        return
    here = sum(len(task.trial.test) for task in tasks) <= FEW_UNITS
    gpus = 0 if here else gpus_each(resources)
    with Progress("held-out descriptions", len(tasks), "captioners") as progress:
        for _ in run_parallel(_say_all, tasks, resources.cpus_per_actor, gpus, here):
            progress.advance()


def _say_all(task: _Saying) -> None:
    """Writes a captioner's descriptions of held-out units, and two baselines: one text for all, the nearest unit's."""
    torch.set_num_threads(task.threads)
    storage, trial = task.storage, task.trial
    captioner = load_captioner(storage, trial.training.name).to(str(resolve_device(task.device)))
    lam = captioner.lam if task.job.config.lam is None else task.job.config.lam
    texts: dict[str, list[str]] = {MILAN: [], LIKELIHOOD: []}
    means = []
    quirks, beam = task.job.config.quirks, task.job.config.beam_size
    step = units_per_search(quirks)
    for features in _features(storage, task.job, trial.test):
        means.append(features.mean(axis=1))
        for start in range(0, len(features), step):
            candidates = captioner.candidates(features[start : start + step], beam, quirks=quirks)
            for system, weight in ((MILAN, lam), (LIKELIHOOD, 0.0)):
                texts[system] += [best.text for (best,) in best_descriptions(candidates, weight)]
    captions = _references(storage, task.job, trial.train)
    known = np.concatenate([features.mean(axis=1) for features in _features(storage, task.job, trial.train)])
    texts[CONSTANT] = [best_constant(list(captions.values()))] * len(trial.test)
    texts[NEAREST] = nearest_copy(known, [captions[unit][0] for unit in trial.train], np.concatenate(means))
    rows = len(trial.test) * len(texts)
    columns = {
        **{key: [value] * rows for key, value in task.output.keys.items()},
        "system": [system for system in texts for _ in trial.test],
        **{
            key: [unit[place] for unit in trial.test] * len(texts)
            for place, key in enumerate(("model", "layer", "unit"))
        },
        "description": [text for of_system in texts.values() for text in of_system],
    }
    storage.write(HELD_OUT, HELD_OUT.table(columns), task.output.fingerprint, **task.output.keys)


def _features(storage: Storage, job: GeneralizationJob, units: Sequence[Unit]) -> Iterator[np.ndarray]:
    """Features of units, layer by layer and in order: float32 (units of the layer, k, F)."""
    layers: dict[tuple[str, str], list[int]] = {}
    for model, layer, unit in units:
        layers.setdefault((model, layer), []).append(unit)
    for (model, layer), numbers in layers.items():
        columns = ["unit", "rank", "feature"]
        found = unit_features(storage.read(ENCODINGS, columns, encoder=job.encoder.name, model=model, layer=layer))
        yield np.stack([found[number] for number in numbers])


def _references(storage: Storage, job: GeneralizationJob, units: Sequence[Unit]) -> dict[Unit, list[str]]:
    """The annotations of units, those with words."""
    found: dict[Unit, list[str]] = {unit: [] for unit in units}
    for model, layer in dict.fromkeys((model, layer) for model, layer, _ in units):
        table = storage.read(ANNOTATIONS, source=job.source, model=model, layer=layer)
        for row in table.sort_by([("unit", "ascending"), ("annotator", "ascending")]).to_pylist():
            if (model, layer, row["unit"]) in found and normalize(row["text"]):
                found[model, layer, row["unit"]].append(row["text"])
    return found


# -- how well ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scoring:
    """A split to score."""

    storage: Storage
    job: GeneralizationJob
    output: Output
    units: list[Unit]
    threads: int


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
        units = {unit for trial in trials if trial.split.name == output.keys["split"] for unit in trial.test}
        tasks.append(_Scoring(storage, job, output, sorted(units), resources.threads))
    if not tasks:
        say(f"{job.name}: scores are all up to date")
        return
    splits = {split.name: split for split in job.splits}
    here = sum(len(task.units) for task in tasks) <= FEW_UNITS
    gpus = 0 if here else gpus_each(resources)
    with Progress("scores", len(tasks), "splits") as progress:
        for index, scored in run_parallel(_score_split, tasks, resources.cpus_per_actor, gpus, here):
            output = tasks[index].output
            split = splits[output.keys["split"]]
            texts = generalization.text_rows(held_out(storage, job, split.name), nlp, language)
            names = {**output.keys, "kind": split.kind, "train": split.train, "test": split.test}
            rows = pl.concat([scored, texts]).with_columns(pl.lit(value).alias(key) for key, value in names.items())
            table = GENERALIZATION.table({name: rows[name].to_list() for name in GENERALIZATION.schema.names})
            storage.write(GENERALIZATION, table, output.fingerprint, **output.keys)
            progress.advance()


def _score_split(task: _Scoring) -> pl.DataFrame:
    torch.set_num_threads(task.threads)
    split = task.output.keys["split"]
    bert = _bert_score(task.job.bert_score) if task.job.bert_score else None
    references = _references(task.storage, task.job, task.units)
    return generalization.score_split(split, held_out(task.storage, task.job, split), references, bert)


@lru_cache(maxsize=1)
def _bert_score(folder: str) -> BertScore:
    """One per process, which scores one split after the other."""
    return BertScore(folder)


def held_out(storage: Storage, job: GeneralizationJob, split: str) -> pl.DataFrame:
    """Descriptions by the captioners of all trials of a split: rows of schema HELD_OUT, the trial as a number."""
    tables = [
        storage.read(HELD_OUT, experiment=job.name, split=split, trial=str(trial)).replace_schema_metadata()
        for trial in range(job.config.trials)
    ]
    return pl.DataFrame(pl.from_arrow(pa.concat_tables(tables))).with_columns(pl.col("trial").cast(pl.Int32))


def references_of(storage: Storage, job: GeneralizationJob, said: pl.DataFrame) -> dict[Unit, list[str]]:
    """The annotations of all units in a table of what captioners say."""
    return _references(storage, job, list(said.select("model", "layer", "unit").unique().sort(pl.all()).iter_rows()))


def _publish(storage: Storage, job: GeneralizationJob, rows: pl.DataFrame) -> None:
    """Writes the table of scores that the report shows, and the figure."""
    table = generalization.table_3(rows)
    metric = generalization.main_metric(rows)
    note = "MILAN on the held-out units, against all annotations of the unit; table generalization has the other rows"
    columns = ("train", "test", metric, "low", "high", "units")
    scores = score_table(
        job.name,
        [
            (f"{train} → {test}", metric, Interval(value, low, high), units, note)
            for train, test, value, low, high, units in table.select(columns).iter_rows()
        ],
    )
    for output in due(ScoreTable(job), storage):
        store_figure(storage, SCORES, plot_generalization(rows), **output.keys)
        storage.write(SCORES, scores, output.fingerprint, **output.keys)  # last: it says that all is done
