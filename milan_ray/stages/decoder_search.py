"""Searching how to train a decoder, with Ray Tune: learning rate, sizes, dropout, regulariser, encoder.

encodings + annotations ─► [Tuner: a trial = a training, ASHA stops the worse ones] ─► trials, setting

A trial fits the decoder alone: nothing tried here but the learning rate and the sizes is of use to the language model,
and that keeps its own. It is the very loop of :mod:`milan_ray.stages.training`, so what a trial found, training finds.
"""

from __future__ import annotations

import importlib.util
import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import polars as pl
import torch

from milan_ray.captioner.fit import DECODER, Plan, State, WorkerGroup, epoch_line, fit, new_state
from milan_ray.config import Fingerprint, Resources, canonical, config_hash
from milan_ray.device import resolve_device
from milan_ray.engine import tuner
from milan_ray.engine.run_log import Cost, record_run
from milan_ray.errors import MilanError
from milan_ray.progress import say, watched
from milan_ray.schema import DECODER_TRIALS, ENCODINGS, TRIALS_SETTING
from milan_ray.stages.decoder_space import (
    ASHA,
    EPOCHS,
    OPTUNA,
    PATIENCE,
    RANDOM,
    Choices,
    DecoderSetting,
    DecoderSpace,
    Range,
    read_decoder_setting,
)
from milan_ray.stages.training import MEMORY_LIMIT, annotations_read, stored_state
from milan_ray.stages.training_units import UnitFeatures, write_units
from milan_ray.storage import Storage
from milan_ray.yaml_files import to_yaml

KERNEL_VERSION = "decoder-tuning-1"

STATES, EPOCH_LINES = "states", "epochs"
"""Folders of the trials' states after their last epoch, and of the same for people, in the work of a search."""

METRIC = "best"


@dataclass(frozen=True)
class DecoderTuningJob:
    """What to search.

    Attributes:
        name: Name of the search.
        source: Source of the annotations.
        layers: (model, layer) pairs whose annotated units to train on; each encoder's encodings are there.
        space: What to try.
        memory_limit: Bytes of features that a trial keeps in memory; more are read as they are needed.
    """

    name: str
    source: str
    layers: tuple[tuple[str, str], ...]
    space: DecoderSpace
    memory_limit: int = MEMORY_LIMIT


def run_decoder_tuning(storage: Storage, job: DecoderTuningJob, resources: Resources) -> DecoderSetting:
    """Tries what a space holds unless that is done, and chooses; a killed search goes on where it was.

    Args:
        storage: The run directory, which holds encodings and annotations.
        job: What to search.
        resources: What of the cluster to use: CPUs and GPUs of each trial (fractions allowed), trials at a time. Ray
            must be connected.

    Returns:
        The setting with the highest BLEU on the held-out units.

    Raises:
        MilanError: Encodings or annotations are missing or do not belong together, Optuna is asked for and not
            installed, or trials failed.
    """
    searcher = _searcher_name(job.space)
    fingerprint = _fingerprint(storage, job, searcher)
    keys = {"sweep": job.name}
    folder = str(Path(storage.path(DECODER_TRIALS, **keys)).parent)
    file = storage.uri(f"{folder}/{TRIALS_SETTING}")
    if not storage.why(DECODER_TRIALS, fingerprint, **keys):
        storage.remove_work(fingerprint.hash)
        say(f"tuning of a decoder by {job.name}: up to date, in {storage.uri(folder)}")
        return read_decoder_setting(storage.text(f"{folder}/{TRIALS_SETTING}"), file)
    started = time.monotonic()
    units = _write_units(storage, fingerprint.hash, job)
    budget = job.space.budget
    say(
        f"tuning a decoder by {job.name} on {units} annotated units: {budget.trials} trials of at most "
        f"{budget.epochs} epochs, drawn by {searcher}"
    )
    rows, cost = _try(storage, _Task(storage.root, fingerprint.hash, job, resources), searcher, resources)
    frame = pl.DataFrame({"sweep": [job.name] * len(rows)} | {key: [row[key] for row in rows] for key in rows[0]})
    best = rows[0]
    setting = DecoderSetting(**{field.name: best[field.name] for field in fields(DecoderSetting)})
    about = (
        f"The decoder, chosen by BLEU {best['bleu']:.4g} on the held-out ones of {units} units annotated by "
        f"{job.source}: the best of {len(rows)} trials, so others will be lower"
    )
    storage.put(f"{folder}/{TRIALS_SETTING}", to_yaml(setting, about).encode())
    columns = frame.with_columns((pl.col("trial") == best["trial"]).alias("chosen")).to_dict()
    table = DECODER_TRIALS.table({name: column.to_arrow() for name, column in columns.items()})
    record_run(storage, "tuning", fingerprint.hash, job.name, rows=len(rows), cost=cost)
    storage.write(DECODER_TRIALS, table, fingerprint, **keys)
    storage.remove_work(fingerprint.hash)
    seconds = time.monotonic() - started
    ended = frame["ended"].value_counts(sort=True).rows()
    say(
        f"tuned a decoder in {seconds:.0f} s: BLEU {best['bleu']:.1f} with {_in_words(asdict(setting))}; "
        f"{len(rows)} trials, {frame['epochs'].sum()} epochs, ended by {', '.join(f'{why}: {n}' for why, n in ended)}"
    )
    say(f"train with it: python -m jobs.train --setting {file} …")
    return setting


def _in_words(setting: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name.replace('_', ' ')} {value if isinstance(value, str) else f'{value:.3g}'}"
        for name, value in setting.items()
    )


def _searcher_name(space: DecoderSpace) -> str:
    wanted = space.budget.searcher
    installed = importlib.util.find_spec("optuna") is not None
    if wanted == OPTUNA and not installed:
        raise MilanError("Optuna is not installed; pip install 'milan-ray[optuna]', or give searcher: random.")
    return wanted if wanted in (OPTUNA, RANDOM) else OPTUNA if installed else RANDOM


def why_decoder_tuning(storage: Storage, job: DecoderTuningJob) -> str | None:
    """Why a space would be searched; None when it is done. Errors as :func:`run_decoder_tuning`."""
    return storage.why(DECODER_TRIALS, _fingerprint(storage, job, _searcher_name(job.space)), sweep=job.name)


def _fingerprint(storage: Storage, job: DecoderTuningJob, searcher: str) -> Fingerprint:
    encodings = [
        storage.config_of(ENCODINGS, encoder=encoder, model=model, layer=layer)
        for encoder in job.space.encoders
        for model, layer in job.layers
    ]
    return Fingerprint.of(
        {
            "kernel": KERNEL_VERSION,
            "annotations": annotations_read(storage, job.source, job.layers),
            "encodings": encodings,
            "searcher": searcher,
            **asdict(job.space),
        }
    )


def _work_of(work: str, job: DecoderTuningJob, encoder: str) -> str:
    """Where the units of one encoder lie, in the work of a search; names of encoders may have slashes."""
    return f"{work}/encoder-{job.space.encoders.index(encoder)}"


def _write_units(storage: Storage, work: str, job: DecoderTuningJob) -> int:
    """Writes the annotated units with each encoder's features; returns how many there are.

    Raises:
        MilanError: The encoders have not encoded the same units, so that their scores could not be compared.
    """
    texts = None
    for encoder in job.space.encoders:
        units = write_units(storage, _work_of(work, job, encoder), job.source, encoder, job.layers)
        if texts is not None and units.texts != texts:
            raise MilanError(
                f"{encoder} has encoded other units than {job.space.encoders[0]}: encode all units with both "
                "(without --units)."
            )
        texts = units.texts
    assert texts is not None
    return len(texts)


def _try(storage: Storage, task: _Task, searcher: str, resources: Resources) -> tuple[list[dict[str, Any]], Cost]:
    """Runs all trials, going on where a killed job left off; returns a row for each, the best first, and their cost."""
    budget = task.job.space.budget
    halving = tuner.Halving("epochs", budget.epochs, min(budget.grace, budget.epochs), budget.reduction)
    search = tuner.Search(budget.trials, METRIC, budget.seed, searcher != RANDOM, halving)
    space = {key: _domain(drawn) for key, drawn in task.job.space.space.items()}
    with watched(_progress_said(storage, task)):
        tried, errors = tuner.run_trials(_run_trial, task, storage.uri(f"_work/{task.work}"), space, resources, search)
    if errors:
        reason = str(errors[0]).strip().splitlines()[-1]
        raise MilanError(f"{len(errors)} of {budget.trials} trials failed ({reason}); run it again to go on.")
    rows: list[dict[str, Any]] = []
    cost = Cost()
    for trial in tried:
        metrics = trial.metrics
        of_metrics = {"bleu": metrics[METRIC], "epoch": metrics["best_epoch"], "epochs": metrics["epochs"]}
        cost.add(metrics["time_total_s"])
        rows.append({**asdict(DecoderSetting(**trial.parameters)), **of_metrics, "ended": metrics["ended"] or ASHA})
    # Ray Tune keeps no order over a restart.
    rows.sort(key=lambda row: (-row["bleu"], -row["epochs"], canonical(row)))
    return [{"trial": number, **row} for number, row in enumerate(rows)], cost


def _domain(drawn: Choices | Range) -> Any:
    if isinstance(drawn, Choices):
        return tuner.one_of(drawn.values)
    return tuner.between(drawn.low, drawn.high, drawn.log)


def _progress_said(storage: Storage, task: _Task) -> Callable[[], None]:
    """Says how far trials are, where that is news; Ray Tune's own tables are for its own terminal."""
    said: dict[str, str] = {}

    def look() -> None:
        for path in storage.files(f"_work/{task.work}/{EPOCH_LINES}"):
            line = storage.get(path).decode()
            if said.get(path) != line:
                say(f"  {line}")
                said[path] = line

    return look


# -- inside a trial ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    """What all trials share, as it travels to them."""

    root: str
    work: str
    job: DecoderTuningJob
    resources: Resources


@lru_cache(maxsize=1)
def _units(root: str, work: str, memory_limit: int) -> UnitFeatures:
    """One encoder's units; a process runs one trial after the other."""
    units = UnitFeatures(Storage(root), work)
    if units.nbytes <= memory_limit:
        units.keep()
    return units


def _run_trial(config: dict[str, Any], task: _Task) -> None:
    """Fits a decoder with one setting, reporting every epoch.

    What was fitted so far is in the run directory, by setting: Ray Tune's own snapshots of the search are some seconds
    old when a job is killed, and may not know the trial at all.
    """
    storage, job, setting = Storage(task.root), task.job, DecoderSetting(**config)
    torch.set_num_threads(task.resources.threads)
    units = _units(task.root, _work_of(task.work, job, setting.encoder), job.memory_limit)
    name = config_hash(asdict(setting))
    path = f"_work/{task.work}/{STATES}/{name}.pt"
    state = stored_state(storage, path) or new_state(units.texts)
    begun = len(state["history"])

    def report(state: State) -> None:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        storage.put(path, buffer.getvalue())
        line = f"{_in_words(config)}: {epoch_line(state['history'][-1])}"
        storage.put(f"_work/{task.work}/{EPOCH_LINES}/{name}.txt", line.encode())
        tuner.report(_metrics(state, job))

    plans = {DECODER: setting.plan(Plan(job.space.budget.config))}
    fit(units, plans, state, report, WorkerGroup(resolve_device(task.resources.device)))
    if len(state["history"]) == begun:  # was finished before
        tuner.report(_metrics(state, job))


def _metrics(state: State, job: DecoderTuningJob) -> dict[str, Any]:
    """How far a trial is: the best epoch so far, epochs done, and why it ended if it has."""
    history: Sequence[Mapping[str, Any]] = state["history"]
    best = max(history, key=lambda row: row["validation"])  # the first among equals, as early stopping keeps
    ended = ""
    if DECODER in state["finished"]:
        ended = EPOCHS if len(history) == job.space.budget.epochs else PATIENCE
    return {METRIC: best["validation"], "best_epoch": best["epoch"], "epochs": len(history), "ended": ended}
