"""Training captioners with Ray Train: first p(d), then p(d|E), on annotated units.

encodings + annotations ─► units (Parquet) ─► [Ray Train: language model, decoder] ─► captioner, training table
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from milan_ray.captioner.captioner import Captioner
from milan_ray.captioner.decoder import Decoder
from milan_ray.captioner.fit import DECODER, LM, Plan, Sizes, State, epoch_line, fit, fitted, new_state
from milan_ray.captioner.lm import LanguageModel
from milan_ray.captioner.text import Indexer
from milan_ray.config import Fingerprint, TrainingConfig
from milan_ray.engine import trainer
from milan_ray.engine.run_log import Cost, record_run
from milan_ray.engine.stage import Known, Output, Stage
from milan_ray.engine.tasks import run_parallel
from milan_ray.engine.trainer import Workers, train_on_workers
from milan_ray.errors import MilanError, reason
from milan_ray.names import checked_name
from milan_ray.progress import Progress, say, watched
from milan_ray.schema import ANNOTATIONS, ENCODINGS, EXEMPLARS, TRAINING
from milan_ray.stages.captioners import EncoderRef, has_captioner, load_captioner, save_captioner
from milan_ray.stages.decoder_space import DecoderSetting
from milan_ray.stages.training_units import UnitFeatures, write_units
from milan_ray.storage import WORK, Storage

KERNEL_VERSION = "training-2"

STATE = "state.pt"

EPOCH = "epoch.txt"
"""Work file that says, for people, which epoch is done."""

MEMORY_LIMIT = 2 * 2**30
"""Bytes of features that a worker keeps in memory; more are read from Parquet as they are needed."""

FEW_EXEMPLARS = 2**16
"""Of several captioners, one with no more exemplars is trained in a plain task: Ray Train's worker and its checkpoints
of every epoch take longer than the training."""

SAVE_INTERVAL = 10.0
"""Seconds of training that a killed task may lose."""


@dataclass(frozen=True)
class TrainingJob:
    """What to train a captioner on, and how.

    Attributes:
        name: Name of the captioner in the run directory.
        source: Source of the annotations.
        layers: (model, layer) pairs whose annotated units to train on.
        encoder: Encoder of their encodings.
        config: Optimisation.
        sizes: Sizes of the models.
        workers: Data-parallel workers.
        cpus: CPUs of each worker.
        gpus: GPUs of each worker.
        threads: Torch threads of each worker.
        memory_limit: Bytes of features that a worker keeps in memory; more are read as they are needed.
        decoder: What tuning chose for the decoder (:mod:`milan_ray.stages.decoder_search`); the language model keeps
            ``config`` and ``sizes``. None fits both alike.
        units: Of each layer, the units to train on; empty for all that are annotated.
        keep_encoder: Whether the captioner brings its encoder's weights, or leaves them where the encoder finds them.
    """

    name: str
    source: str
    layers: tuple[tuple[str, str], ...]
    encoder: EncoderRef
    config: TrainingConfig = field(default_factory=TrainingConfig)
    sizes: Sizes = field(default_factory=Sizes)
    workers: int = 1
    cpus: float = 1
    gpus: float = 0
    threads: int = 1
    memory_limit: int = MEMORY_LIMIT
    decoder: DecoderSetting | None = None
    units: tuple[tuple[int, ...], ...] = ()
    keep_encoder: bool = True

    def __post_init__(self) -> None:
        checked_name("a captioner", self.name)

    @property
    def team(self) -> Workers:
        """The workers that train it."""
        return Workers(self.workers, self.cpus, self.gpus)

    @property
    def plans(self) -> dict[str, Plan]:
        """How each of the two models is fitted."""
        plan = Plan(self.config, self.sizes)
        return {LM: plan, DECODER: self.decoder.plan(plan) if self.decoder else plan}


def run_trainings(storage: Storage, jobs: Sequence[TrainingJob]) -> None:
    """Trains several captioners, as many side by side as the cluster has room for; one's failure stops no other.

    Args:
        storage: The run directory, which holds encodings and annotations.
        jobs: What to train; all with the same workers.

    Raises:
        MilanError: Trainings failed; says which, and why.
    """
    if len(jobs) == 1:
        run_training(storage, jobs[0])
        return
    together = min(len(jobs), jobs[0].team.room())
    started = time.monotonic()
    say(f"training {len(jobs)} captioners, {together} at a time")
    sizes = {job.name: _exemplars(storage, job) for job in jobs}
    little = [job for job in jobs if job.workers == 1 and not job.gpus and sizes[job.name] <= FEW_EXEMPLARS]
    little.sort(key=lambda job: -sizes[job.name])  # so that all are done at about the same time
    failures = _train_little(storage, little)
    failures |= _train_side_by_side(storage, [job for job in jobs if job not in little], together)
    if failures:
        reasons = " ".join(f"{name}: {error}" for name, error in failures.items())
        raise MilanError(f"{len(failures)} of {len(jobs)} trainings failed. {reasons}")
    say(f"{len(jobs)} captioners are there, after {time.monotonic() - started:.0f} s")


def _exemplars(storage: Storage, job: TrainingJob) -> int:
    """Exemplars of a training's layers."""
    return sum(
        storage.count(ENCODINGS, encoder=job.encoder.name, model=model, layer=layer) for model, layer in job.layers
    )


def _train_side_by_side(storage: Storage, jobs: Sequence[TrainingJob], together: int) -> dict[str, str]:
    """Trains captioners with Ray Train, so many at a time; returns what went wrong, by name."""
    if not jobs:
        return {}
    failures: dict[str, str] = {}
    pool = ThreadPoolExecutor(together)
    try:
        running = {job.name: pool.submit(run_training, storage, job) for job in jobs}
        for name, future in running.items():
            try:
                future.result()
            except MilanError as error:
                failures[name] = str(error)
                say(f"training of {name} failed: {error}")
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # when interrupted, Ray ends what runs
    return failures


def _train_little(storage: Storage, jobs: Sequence[TrainingJob]) -> dict[str, str]:
    """Trains captioners in plain tasks, to the same weights; returns what went wrong, by name."""
    failures: dict[str, str] = {}
    tasks = []
    for job in jobs:
        try:
            fingerprint = _due(storage, job)
        except MilanError as error:
            failures[job.name] = str(error)
            say(f"training of {job.name} failed: {error}")
            continue
        if fingerprint is not None:
            tasks.append(_Little(storage, job, fingerprint))
    if not tasks:
        return failures
    with Progress("captioners", len(tasks), "captioners") as progress:
        for index, (trained, said) in run_parallel(_train_here, tasks, tasks[0].job.cpus):
            name = tasks[index].job.name
            if not trained:
                failures[name] = said
            say(said if trained else f"training of {name} failed: {said}")
            progress.advance()
    return failures


def run_training(storage: Storage, job: TrainingJob) -> bool:
    """Trains a captioner unless it is there already, made from the same things.

    Args:
        storage: The run directory, which holds encodings and annotations.
        job: What to train, and how.

    Returns:
        Whether anything was trained.

    Raises:
        MilanError: Annotations or encodings are missing.
    """
    fingerprint = _due(storage, job)
    if fingerprint is None:
        return False
    config = fingerprint.hash
    job.team.room()
    units = write_units(storage, config, job.source, job.encoder.name, job.layers, job.units)
    where = "in memory" if units.nbytes <= job.memory_limit else "read as needed"
    say(
        f"training {job.name} on {len(units)} annotated units of {len({model for model, _ in job.layers})} models "
        f"({units.nbytes / 2**20:.0f} MiB of features, {where})"
    )
    started = time.monotonic()
    with watched(_epochs_said(storage, config, job.name)):
        arguments = {"job": job, "storage": storage, "work": config}
        state = train_on_workers(_train_worker, arguments, job.team, job.name, storage.uri(f"_work/{config}"))
    say(_publish(storage, job, fingerprint, state, units, started))
    return True


class Training(Stage):
    """A captioner; :func:`run_training` trains it.

    Args:
        job: What to train, and how.
    """

    table, name = TRAINING, "training"

    def __init__(self, job: TrainingJob) -> None:
        self._job, self.title = job, f"training of {job.name}"

    def outputs(self, known: Known) -> Iterator[Output]:
        """The captioner, by its encodings and annotations."""
        encodings = {
            (model, layer): known.config(ENCODINGS, encoder=self._job.encoder.name, model=model, layer=layer)
            for model, layer in self._job.layers
        }
        yield Output({"decoder": self._job.name}, training_fingerprint(known.storage, self._job, encodings))

    def why(self, storage: Storage, output: Output) -> str | None:
        """Why it has to be trained: its history or itself is missing, stale or damaged."""
        if due := super().why(storage, output):
            return due
        if not has_captioner(storage, self._job.name):
            return "captioner missing"
        try:
            load_captioner(storage, self._job.name)
        except MilanError as error:
            say(f"{error}: it is trained anew", level="warning")
            return "captioner damaged"
        return None


def _due(storage: Storage, job: TrainingJob) -> Fingerprint | None:
    """What decides a captioner that has to be trained; None for one that is there."""
    stage = Training(job)
    (output,) = stage.outputs(Known(storage))
    if stage.why(storage, output):
        return output.fingerprint
    storage.remove_work(output.fingerprint.hash)
    say(f"training of {job.name}: up to date")
    return None


def stored_state(storage: Storage, path: str) -> State | None:
    """How far a training had come that was cut short; None where it has to begin anew."""
    if not storage.exists(path):
        return None
    try:
        state = torch.load(io.BytesIO(storage.get(path)), weights_only=True)
        return state if state["history"] is not None else None
    except MilanError:
        raise
    except Exception as error:  # whatever a damaged file may raise inside the reader
        say(f"{storage.uri(path)} is damaged ({reason(error)}): the training begins anew", level="warning")
        return None


def _publish(
    storage: Storage, job: TrainingJob, fingerprint: Fingerprint, state: State, units: UnitFeatures, started: float
) -> str:
    """Writes a finished captioner and its history; returns a line on them."""
    captioner = _captioner(job, state, units.size)
    models = ", ".join(sorted({model for model, _ in job.layers}))
    about = (
        f"Captioner {job.name}: trained on the annotations {job.source!r} of {len(units)} units of {models}; "
        f"it knows {len(captioner.indexer.vocabulary)} words, and no others."
    )
    save_captioner(storage, job.name, captioner, about)
    history = state["history"]
    kept = {part: state["kept"][part] for part in (LM, DECODER)}
    table = TRAINING.table(
        {
            "decoder": [job.name] * len(history),
            **{key: [row[key] for row in history] for key in ("part", "epoch", "train_loss", "validation", "sample")},
            "kept": [kept[row["part"]] == row["epoch"] for row in history],
        }
    )
    seconds = time.monotonic() - started
    cost = Cost(seconds * job.workers, seconds * job.workers)  # of all workers
    record_run(storage, "training", fingerprint.hash, job.name, rows=len(history), cost=cost)
    storage.write(TRAINING, table, fingerprint, decoder=job.name)
    storage.remove_work(fingerprint.hash)
    best = {row["part"]: row["validation"] for row in history if kept[row["part"]] == row["epoch"]}
    return (
        f"trained {job.name} in {seconds:.0f} s: perplexity {np.exp(best['lm']):.1f}, "
        f"validation BLEU {best['decoder']:.1f}"
    )


def _epochs_said(storage: Storage, work: str, name: str) -> Callable[[], None]:
    """Says how far training is, where that is news; Ray Train itself reports to its own controller only."""
    said = ""

    def look() -> None:
        nonlocal said
        path = f"_work/{work}/{EPOCH}"
        line = storage.get(path).decode() if storage.exists(path) else ""
        if line != said:
            say(f"  {name}: {line}")
            said = line

    return look


def training_fingerprint(storage: Storage, job: TrainingJob, encodings: Mapping[tuple[str, str], str]) -> Fingerprint:
    """What decides a captioner.

    Args:
        storage: The run directory, which holds exemplars and annotations.
        job: What to train, and how.
        encodings: (model, layer) → configuration hash of the encodings.

    Raises:
        MilanError: Annotations are missing, or speak of other exemplars.
    """
    annotations = annotations_read(storage, job.source, job.layers)
    # The name too: captioners of two names made from the same things may be in the making at the same time.
    inputs = {"name": job.name, "annotations": annotations, "encodings": [encodings[pair] for pair in job.layers]}
    tuned = {"decoder": asdict(job.decoder)} if job.decoder else {}
    chosen = {"units": job.units} if job.units else {}
    return Fingerprint.of(
        {"kernel": KERNEL_VERSION, **inputs, **asdict(job.config), **asdict(job.sizes), **tuned, **chosen}
    )


def annotations_read(storage: Storage, source: str, layers: Sequence[tuple[str, str]]) -> list[tuple[str, str, str]]:
    """Model, layer and configuration hash of the annotations to train on.

    Raises:
        MilanError: Annotations are missing, or speak of other exemplars.
    """
    found = []
    for model, layer in layers:
        of_people = {"source": source, "model": model, "layer": layer}
        exemplars = storage.config_of(EXEMPLARS, model=model, layer=layer)
        if storage.exemplars_of(ANNOTATIONS, **of_people) not in (None, exemplars):
            raise MilanError(
                f"the annotations {source!r} of {model} {layer} speak of other exemplars than those now in "
                f"{storage.root}; annotate again, or restore the exemplars."
            )
        found.append((model, layer, storage.config_of(ANNOTATIONS, **of_people)))
    return found


# -- inside a training worker -------------------------------------------------------------------------------------


def _train_worker(arguments: dict[str, Any]) -> None:
    """Fits both models, every epoch a checkpoint of Ray Train's."""
    job: TrainingJob = arguments["job"]
    storage: Storage = arguments["storage"]
    torch.set_num_threads(job.threads)
    units = UnitFeatures(storage, arguments["work"])
    if units.nbytes <= job.memory_limit:
        units.keep()
    state = trainer.reported_state() or new_state(units.texts)
    team = trainer.TrainWorkerGroup()

    def report(state: State) -> None:
        row = state["history"][-1]
        if team.rank == 0:
            storage.put(f"_work/{arguments['work']}/{EPOCH}", epoch_line(row).encode())
        metrics = {key: row[key] for key in ("part", "epoch", "train_loss", "validation")}
        trainer.report(metrics, state if team.rank == 0 else None)

    fit(units, job.plans, state, report, team)


@dataclass(frozen=True)
class _Little:
    """A captioner to train in a task."""

    storage: Storage
    job: TrainingJob
    fingerprint: Fingerprint


def _train_here(task: _Little) -> tuple[bool, str]:
    """Trains a captioner in this process; returns whether it could, and a line on it or the reason.

    What was fitted lies in the run directory now and then, so that a task that is run again goes on from there.
    """
    storage, job, work = task.storage, task.job, task.fingerprint.hash
    path = f"{WORK}/{work}/{STATE}"
    started = saved = time.monotonic()
    torch.set_num_threads(job.threads)

    def report(state: State) -> None:
        nonlocal saved
        if time.monotonic() - saved >= SAVE_INTERVAL:
            buffer = io.BytesIO()
            torch.save(state, buffer)
            storage.put(path, buffer.getvalue())
            saved = time.monotonic()

    try:
        units = write_units(storage, work, job.source, job.encoder.name, job.layers, job.units)
        if units.nbytes <= job.memory_limit:
            units.keep()
        state = stored_state(storage, path) or new_state(units.texts)
        fit(units, job.plans, state, report)
        return True, _publish(storage, job, task.fingerprint, state, units, started)
    except Exception as error:  # stops no other; the driver says it, and fails with it at the end
        return False, str(error) if isinstance(error, MilanError) else f"{type(error).__name__}: {error}"


def _captioner(job: TrainingJob, state: State, feature_size: int) -> Captioner:
    """The captioner of a finished training, with its encoder's weights."""
    lm, decoder = (fitted(state, part, plan, feature_size) for part, plan in job.plans.items())
    assert isinstance(lm, LanguageModel) and isinstance(decoder, Decoder)
    weights = job.encoder.load().backbone.state_dict() if job.keep_encoder else None
    return Captioner(Indexer.from_state(state["indexer"]), decoder, lm, job.encoder.name, weights)
