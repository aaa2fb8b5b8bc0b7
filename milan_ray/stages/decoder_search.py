"""Tuning of decoder training with Ray Tune: learning rate, sizes, dropout, regulariser, encoder.

encodings + annotations ─► [Tuner: a trial = a training, ASHA stops the worse ones] ─► trials, setting

A trial trains only the decoder; the language model has its own learning rate and sizes, and no use for the rest. Trials
and :mod:`milan_ray.stages.training` share one training loop, so training with the chosen setting gives the decoder of
the chosen trial.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import polars as pl
import torch

from milan_ray.captioner.fit import DECODER, FitConfig, State, WorkerGroup, epoch_line, fit, new_state
from milan_ray.config import Fingerprint, Resources, canonical, config_hash
from milan_ray.device import resolve_device
from milan_ray.engine import tuner
from milan_ray.engine.run_log import Cost, record_run
from milan_ray.engine.stage import Known, Output, Stage
from milan_ray.errors import MilanError
from milan_ray.progress import say, watched
from milan_ray.schema import DECODER_TRIALS, ENCODINGS, TRIALS_SETTING
from milan_ray.stages.decoder_space import (
    ASHA,
    AUTO,
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
from milan_ray.stages.training import MEMORY_LIMIT, annotations_read, line_logger, store_state, stored_state
from milan_ray.stages.training_units import UnitFeatures, write_units
from milan_ray.storage import WORK, Storage
from milan_ray.yaml_files import to_yaml

KERNEL_VERSION = "decoder-tuning-1"

STATES, EPOCH_LINES = "states", "epochs"
"""Folders in the work of a search: the trials' states after their last epoch, and a readable line for each."""

METRIC = "best"


@dataclass(frozen=True)
class DecoderTuningJob:
    """The search space, and the units to train on.

    Attributes:
        name: Name of the search.
        source: Source of the annotations.
        layers: (model, layer) pairs whose annotated units to train on, with encodings of each encoder.
        space: The settings to try.
        memory_limit: Bytes of features that a trial keeps in memory; beyond it, it reads them batch by batch.
    """

    name: str
    source: str
    layers: tuple[tuple[str, str], ...]
    space: DecoderSpace
    memory_limit: int = MEMORY_LIMIT


class DecoderTuning(Stage):
    """Chooses how to train a decoder: trainings with many settings, scored on held-out units.

    Args:
        job: The search space, and the units to train on.
    """

    table, name = DECODER_TRIALS, "tuning"

    def __init__(self, job: DecoderTuningJob) -> None:
        self._job, self.title = job, f"tuning of a decoder by {job.name}"

    def outputs(self, known: Known) -> Iterator[Output]:
        """The trials, by encodings and annotations.

        Raises:
            MilanError: Encodings or annotations are missing or do not belong together, or Optuna is asked for and not
                installed.
        """
        reason = "encodings are missing or changed" if known.pending(ENCODINGS) else None
        yield Output({"sweep": self._job.name}, _fingerprint(known, self._job), reason=reason)

    def why(self, storage: Storage, output: Output) -> str | None:
        """Why the trials have to be run, after their number."""
        reason, budget = super().why(storage, output), self._job.space.budget
        return reason and f"{budget.trials} trials of at most {budget.epochs} epochs: {reason}"

    def run(self, storage: Storage, resources: Resources) -> DecoderSetting:
        """Runs all trials unless they are stored, and chooses a setting; a killed search continues where it was.

        Args:
            storage: The run directory, which holds encodings and annotations.
            resources: What of the cluster to use: CPUs and GPUs of each trial (fractions allowed), trials at a time.
                Ray must be connected.

        Returns:
            The setting with the highest BLEU on the held-out units.

        Raises:
            MilanError: As :meth:`outputs`, or trials failed.
        """
        (output,) = self.outputs(Known(storage))
        folder = str(Path(storage.path(DECODER_TRIALS, **output.keys)).parent)
        if self.why(storage, output):
            return _tune(storage, self._job, output, f"{folder}/{TRIALS_SETTING}", resources)
        storage.remove_work(output.fingerprint.hash)
        say(f"{self.title}: up to date, in {storage.uri(folder)}")
        file = f"{folder}/{TRIALS_SETTING}"
        return read_decoder_setting(storage.text(file), storage.uri(file))


def _tune(storage: Storage, job: DecoderTuningJob, output: Output, file: str, resources: Resources) -> DecoderSetting:
    """Runs all trials, chooses a setting, and writes trials and setting."""
    started, work, budget = time.monotonic(), output.fingerprint.hash, job.space.budget
    units = _write_units(storage, work, job)
    searcher = _searcher_name(job.space)
    say(
        f"tuning a decoder by {job.name} on {units} annotated units: {budget.trials} trials of at most "
        f"{budget.epochs} epochs, drawn by {searcher}"
    )
    rows, cost = _run_trials(storage, _Task(storage.root, work, job, resources), searcher)
    best = rows[0]
    setting = DecoderSetting(**{field.name: best[field.name] for field in fields(DecoderSetting)})
    about = (
        f"The decoder, chosen by BLEU {best['bleu']:.4g} on the held-out ones of {units} units annotated by "
        f"{job.source}: the best of {len(rows)} trials, so others will be lower"
    )
    storage.put(file, to_yaml(setting, about).encode())
    frame = pl.DataFrame({key: [row[key] for row in rows] for key in best})
    frame = frame.with_columns(sweep=pl.lit(job.name), chosen=pl.col("trial") == best["trial"])
    table = DECODER_TRIALS.table({column.name: column.to_arrow() for column in frame})
    record_run(storage, "tuning", work, job.name, rows=len(rows), cost=cost)
    storage.write(DECODER_TRIALS, table, output.fingerprint, **output.keys)
    storage.remove_work(work)
    seconds = time.monotonic() - started
    ended = frame["ended"].value_counts(sort=True).rows()
    say(
        f"tuned a decoder in {seconds:.0f} s: BLEU {best['bleu']:.1f} with {_setting_line(asdict(setting))}; "
        f"{len(rows)} trials, {frame['epochs'].sum()} epochs, ended by {', '.join(f'{why}: {n}' for why, n in ended)}"
    )
    say(f"train with it: python -m jobs.train --setting {storage.uri(file)} …")
    return setting


def _setting_line(setting: Mapping[str, Any]) -> str:
    """The setting for log lines: "learning rate 0.001, hidden 512, …"."""
    return ", ".join(
        f"{name.replace('_', ' ')} {value if isinstance(value, str) else f'{value:.3g}'}"
        for name, value in setting.items()
    )


def _searcher_name(space: DecoderSpace) -> str:
    """The search algorithm that "auto" stands for.

    Raises:
        MilanError: Optuna is asked for and not installed.
    """
    installed = importlib.util.find_spec("optuna") is not None
    if space.budget.searcher == OPTUNA and not installed:
        raise MilanError("Optuna is not installed; pip install 'milan-ray[optuna]', or give searcher: random.")
    if space.budget.searcher == AUTO:
        return OPTUNA if installed else RANDOM
    return space.budget.searcher


def _fingerprint(known: Known, job: DecoderTuningJob) -> Fingerprint:
    encodings = [
        known.config(ENCODINGS, encoder=encoder, model=model, layer=layer)
        for encoder in job.space.encoders
        for model, layer in job.layers
    ]
    return Fingerprint.of(
        {
            "kernel": KERNEL_VERSION,
            "annotations": annotations_read(known.storage, job.source, job.layers),
            "encodings": encodings,
            "searcher": _searcher_name(job.space),
            **asdict(job.space),
        }
    )


def _work_of(work: str, job: DecoderTuningJob, encoder: str) -> str:
    """The work folder of an encoder's units: by number, because encoders' names may contain slashes."""
    return f"{work}/encoder-{job.space.encoders.index(encoder)}"


def _write_units(storage: Storage, work: str, job: DecoderTuningJob) -> int:
    """Writes the annotated units with the features of each encoder; returns the number of units.

    Raises:
        MilanError: The encoders have encoded different units, so their scores would not be comparable.
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


def _run_trials(storage: Storage, task: _Task, searcher: str) -> tuple[list[dict[str, Any]], Cost]:
    """Runs all trials, or continues a killed search; returns a row per trial, best first, and their cost."""
    budget = task.job.space.budget
    halving = "epochs", budget.epochs, min(budget.grace, budget.epochs), budget.reduction
    search = tuner.Search(budget.trials, METRIC, budget.seed, searcher != RANDOM, *halving)
    space = {key: _distribution(values) for key, values in task.job.space.space.items()}
    with watched(line_logger(storage, lambda: storage.files(f"{WORK}/{task.work}/{EPOCH_LINES}"))):
        uri = storage.uri(f"{WORK}/{task.work}")
        trials, errors = tuner.run_trials(_run_trial, task, uri, space, task.resources, search)
    if errors:
        reason = str(errors[0]).strip().splitlines()[-1]
        raise MilanError(f"{len(errors)} of {budget.trials} trials failed ({reason}); run it again to go on.")
    rows: list[dict[str, Any]] = []
    cost = Cost()
    for trial in trials:
        metrics = trial.metrics
        scores = {"bleu": metrics[METRIC], "epoch": metrics["best_epoch"], "epochs": metrics["epochs"]}
        cost.add(metrics["time_total_s"])
        rows.append({**asdict(DecoderSetting(**trial.parameters)), **scores, "ended": metrics["ended"] or ASHA})
    # Sorted, because after a restart Ray Tune returns the trials in another order.
    rows.sort(key=lambda row: (-row["bleu"], -row["epochs"], canonical(row)))
    return [{"trial": number, **row} for number, row in enumerate(rows)], cost


def _distribution(values: Choices | Range) -> Any:
    """The distribution for Ray Tune."""
    if isinstance(values, Choices):
        return tuner.choice(values.values)
    return tuner.uniform(values.low, values.high, values.log)


# -- inside a trial ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    """The arguments that all trials share."""

    root: str
    work: str
    job: DecoderTuningJob
    resources: Resources


@lru_cache(maxsize=1)
def _units(root: str, work: str, memory_limit: int) -> UnitFeatures:
    """The units with one encoder's features, cached because a process runs several trials."""
    units = UnitFeatures(Storage(root), work)
    units.keep(memory_limit)
    return units


def _run_trial(config: dict[str, Any], task: _Task) -> None:
    """Trains a decoder with one setting and reports every epoch.

    The state after each epoch is stored in the run directory, by setting. Ray Tune's own snapshots are not enough: they
    are some seconds old when a job is killed and may lack the trial.
    """
    storage, job, setting = Storage(task.root), task.job, DecoderSetting(**config)
    torch.set_num_threads(task.resources.threads)
    units = _units(task.root, _work_of(task.work, job, setting.encoder), job.memory_limit)
    name = config_hash(asdict(setting))
    path = f"{WORK}/{task.work}/{STATES}/{name}.pt"
    state = stored_state(storage, path) or new_state(units.texts)
    epochs = len(state["history"])

    def report(state: State) -> None:
        store_state(storage, path, state)
        line = f"{_setting_line(config)}: {epoch_line(state['history'][-1])}"
        storage.put(f"{WORK}/{task.work}/{EPOCH_LINES}/{name}.txt", line.encode())
        tuner.report(_metrics(state, job))

    plans = {DECODER: setting.plan(FitConfig(job.space.budget.config))}
    fit(units, plans, state, report, WorkerGroup(resolve_device(task.resources.device)))
    if len(state["history"]) == epochs:  # a killed search had finished this trial
        tuner.report(_metrics(state, job))


def _metrics(state: State, job: DecoderTuningJob) -> dict[str, Any]:
    """A trial's metrics for Ray Tune: the best epoch so far, the number of epochs, and why it ended."""
    history: Sequence[Mapping[str, Any]] = state["history"]
    best = max(history, key=lambda row: row["validation"])  # ties go to the first epoch, as in early stopping
    ended = ""
    if DECODER in state["finished"]:
        ended = EPOCHS if len(history) == job.space.budget.epochs else PATIENCE
    return {METRIC: best["validation"], "best_epoch": best["epoch"], "epochs": len(history), "ended": ended}
