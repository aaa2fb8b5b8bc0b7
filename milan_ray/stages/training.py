"""Training captioners: first p(d), then p(d|E), on annotated units.

encodings + annotations ─► units (Parquet) ─► [Ray Train or a task: p(d), p(d|E)] ─► captioner, training table
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from milan_ray.captioner.captioner import Captioner
from milan_ray.captioner.decoder import Decoder
from milan_ray.captioner.fit import DECODER, LM, FitConfig, Sizes, State, epoch_line, fit, fitted, new_state
from milan_ray.captioner.lm import LanguageModel
from milan_ray.captioner.text import Indexer
from milan_ray.config import BLEU, Fingerprint, TrainingConfig
from milan_ray.engine import trainer
from milan_ray.engine.run_log import Cost, record_run
from milan_ray.engine.stage import Known, Output, Stage
from milan_ray.engine.tasks import run_parallel
from milan_ray.engine.trainer import Scaling, train_on_workers
from milan_ray.errors import MilanError, reason
from milan_ray.names import checked_name
from milan_ray.progress import Progress, say, watched
from milan_ray.schema import ENCODINGS, EXEMPLARS, TRAINING
from milan_ray.stages.captioners import EncoderRef, has_captioner, load_captioner, save_captioner
from milan_ray.stages.decoder_space import DecoderSetting
from milan_ray.stages.training_units import UnitFeatures, annotations_config, write_units
from milan_ray.storage import WORK, Storage

KERNEL_VERSION = "training-2"

STATE = "state.pt"

EPOCH = "epoch.txt"
"""Work file with a readable line on the last epoch."""

MEMORY_LIMIT = 2 * 2**30
"""Bytes of features that a worker keeps in memory; beyond it, it reads them from Parquet batch by batch."""

FEW_EXEMPLARS = 2**16
"""Most exemplars of a captioner that one worker on CPUs trains in a plain Ray task: for so few, starting Ray Train and
writing its checkpoints takes longer than the training. Both train to the same weights."""

SAVE_INTERVAL = 10.0
"""Seconds between stored states of a training in a plain task: the most that a killed task loses."""


@dataclass(frozen=True)
class TrainingJob:
    """A captioner's training data and hyperparameters.

    Attributes:
        name: Name of the captioner in the run directory.
        source: Source of the annotations.
        layers: (model, layer) pairs whose annotated units to train on.
        encoder: Encoder of their encodings.
        config: Hyperparameters.
        sizes: Sizes of the models.
        workers: Data-parallel workers.
        cpus: CPUs of each worker.
        gpus: GPUs of each worker.
        threads: Torch threads of each worker.
        memory_limit: Bytes of features that a worker keeps in memory; beyond it, it reads them batch by batch.
        decoder: The decoder's setting from tuning (:mod:`milan_ray.stages.decoder_search`); the language model uses
            ``config`` and ``sizes``. None uses these for both.
        units: The units to train on, for each layer; empty for all annotated ones.
        keep_encoder: Whether to store the encoder's weights with the captioner; if not, they are loaded from the
            encoder's own file.
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
    def scaling(self) -> Scaling:
        """Number and resources of its workers."""
        return Scaling(self.workers, self.cpus, self.gpus)

    @property
    def encodings(self) -> list[dict[str, str]]:
        """The partition of each layer's encodings."""
        return [{"encoder": self.encoder.name, "model": model, "layer": layer} for model, layer in self.layers]

    @property
    def plans(self) -> dict[str, FitConfig]:
        """Part → how to train it."""
        plan = FitConfig(self.config, self.sizes)
        return {LM: plan, DECODER: self.decoder.plan(plan) if self.decoder else plan}


class Training(Stage):
    """A captioner, trained with Ray Train, or in a plain Ray task where it has few exemplars.

    Args:
        job: Training data and hyperparameters.
    """

    table, name = TRAINING, "training"

    def __init__(self, job: TrainingJob) -> None:
        self._job, self.title = job, f"training of {job.name}"

    def outputs(self, known: Known) -> Iterator[Output]:
        """The captioner, by encodings and annotations."""
        encodings = [known.config(ENCODINGS, **keys) for keys in self._job.encodings]
        yield Output({"decoder": self._job.name}, training_fingerprint(known.storage, self._job, encodings))

    def why(self, storage: Storage, output: Output) -> str | None:
        """Why the captioner has to be trained: it or its training history is missing, stale or damaged."""
        if due := super().why(storage, output):
            return due
        if not has_captioner(storage, self._job.name):
            return "captioner missing"
        try:
            load_captioner(storage, self._job.name)
        except MilanError as error:
            say(f"{error}: it is trained again", level="warning")
            return "captioner damaged"
        return None

    def due(self, storage: Storage) -> Fingerprint | None:
        """The captioner's fingerprint if it has to be trained; None if it is up to date."""
        (output,) = self.outputs(Known(storage))
        if self.why(storage, output):
            return output.fingerprint
        storage.remove_work(output.fingerprint.hash)
        say(f"{self.title}: up to date")
        return None

    def run(self, storage: Storage) -> bool:
        """Trains the captioner unless it is up to date.

        Args:
            storage: The run directory, which holds encodings and annotations.

        Returns:
            Whether it was trained.

        Raises:
            MilanError: Annotations or encodings are missing, or the workers do not fit the cluster.
        """
        fingerprint, job = self.due(storage), self._job
        if fingerprint is None:
            return False
        work = fingerprint.hash
        job.scaling.capacity()
        units = write_units(storage, work, job.source, job.encoder.name, job.layers, job.units)
        where = "in memory" if units.nbytes <= job.memory_limit else "read as needed"
        say(
            f"training {job.name} on {len(units)} annotated units of {len({model for model, _ in job.layers})} models "
            f"({units.nbytes / 2**20:.0f} MiB of features, {where})"
        )
        started = time.monotonic()
        epoch = f"{WORK}/{work}/{EPOCH}"
        with watched(line_logger(storage, lambda: [epoch] if storage.exists(epoch) else [], f"{job.name}: ")):
            if _is_small(storage, job):
                ((_, (trained, line)),) = run_parallel(partial(_train_in_task, storage), [(job, fingerprint)], job.cpus)
                if not trained:
                    raise MilanError(line)
            else:
                arguments = {"job": job, "storage": storage, "work": work}
                state = train_on_workers(_train_worker, arguments, job.scaling, job.name, storage.uri(f"{WORK}/{work}"))
                line = _publish(storage, job, fingerprint, state, units, started)
        say(line)
        return True


def run_trainings(storage: Storage, jobs: Sequence[TrainingJob]) -> None:
    """Trains several captioners, as many at a time as fit the cluster; the others continue when one fails.

    Args:
        storage: The run directory, which holds encodings and annotations.
        jobs: The trainings; all with the same number and resources of workers.

    Raises:
        MilanError: Trainings failed; the message has the reason of each.
    """
    if len(jobs) == 1:
        Training(jobs[0]).run(storage)
        return
    concurrent = min(len(jobs), jobs[0].scaling.capacity())
    started = time.monotonic()
    say(f"training {len(jobs)} captioners, {concurrent} at a time")
    small = [job for job in jobs if _is_small(storage, job)]
    small.sort(key=lambda job: -_exemplars(storage, job))  # largest first, so that all tasks end at about the same time
    failures = _train_in_tasks(storage, small)
    failures |= _train_on_ray_train(storage, [job for job in jobs if job not in small], concurrent)
    if failures:
        reasons = " ".join(f"{name}: {error}" for name, error in failures.items())
        raise MilanError(f"{len(failures)} of {len(jobs)} trainings failed. {reasons}")
    say(f"trained {len(jobs)} captioners in {time.monotonic() - started:.0f} s")


def _exemplars(storage: Storage, job: TrainingJob) -> int:
    """The number of encoded exemplars of all units of a training's layers."""
    return sum(storage.count(ENCODINGS, **keys) for keys in job.encodings)


def _is_small(storage: Storage, job: TrainingJob) -> bool:
    """Whether a plain task trains it sooner than Ray Train."""
    return job.workers == 1 and not job.gpus and _exemplars(storage, job) <= FEW_EXEMPLARS


def _train_on_ray_train(storage: Storage, jobs: Sequence[TrainingJob], concurrent: int) -> dict[str, str]:
    """Trains large captioners, at most ``concurrent`` at a time; returns name → error of those that failed."""
    failures: dict[str, str] = {}
    pool = ThreadPoolExecutor(concurrent)
    try:
        running = {job.name: pool.submit(Training(job).run, storage) for job in jobs}
        for name, future in running.items():
            try:
                future.result()
            except MilanError as error:
                failures[name] = str(error)
                say(f"training of {name} failed: {error}")
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # when interrupted, Ray ends what runs
    return failures


def _train_in_tasks(storage: Storage, jobs: Sequence[TrainingJob]) -> dict[str, str]:
    """Trains captioners in plain tasks, to the same weights; returns name → error of those that failed."""
    failures: dict[str, str] = {}
    tasks = []
    for job in jobs:
        try:
            fingerprint = Training(job).due(storage)
        except MilanError as error:
            failures[job.name] = str(error)
            say(f"training of {job.name} failed: {error}")
            continue
        if fingerprint is not None:
            tasks.append((job, fingerprint))
    if not tasks:
        return failures
    with Progress("captioners", len(tasks), "captioners") as progress:
        for index, (trained, line) in run_parallel(partial(_train_in_task, storage), tasks, tasks[0][0].cpus):
            name = tasks[index][0].name
            if not trained:
                failures[name] = line
            say(line if trained else f"training of {name} failed: {line}")
            progress.advance()
    return failures


def store_state(storage: Storage, path: str, state: State) -> None:
    """Stores a training state as a work file."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    storage.put(path, buffer.getvalue())


def stored_state(storage: Storage, path: str) -> State | None:
    """The stored state of an interrupted training; None where there is none, or it is damaged."""
    if not storage.exists(path):
        return None
    try:
        state = torch.load(io.BytesIO(storage.get(path)), weights_only=True)
        return state if state["history"] is not None else None
    except MilanError:
        raise
    except Exception as error:  # whatever a damaged file may raise inside the reader
        say(f"{storage.uri(path)} is damaged ({reason(error)}): training starts from the first epoch", level="warning")
        return None


def _publish(
    storage: Storage, job: TrainingJob, fingerprint: Fingerprint, state: State, units: UnitFeatures, started: float
) -> str:
    """Writes a trained captioner and its training history; returns a log line."""
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
            **{key: [row[key] for row in history] for key in ("part", "epoch", "train_loss", "validation", "sample")},
            "kept": [kept[row["part"]] == row["epoch"] for row in history],
        },
        decoder=job.name,
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


def line_logger(storage: Storage, paths: Callable[[], Iterable[str]], prefix: str = "") -> Callable[[], None]:
    """Returns a function that logs work files whose line is new; workers' own output does not reach the driver.

    Args:
        storage: The run directory.
        paths: Lists the files.
        prefix: Put before each line.
    """
    logged: dict[str, str] = {}

    def look() -> None:
        for path in paths():
            line = storage.get(path).decode()
            if logged.get(path) != line:
                say(f"  {prefix}{line}")
                logged[path] = line

    return look


def training_fingerprint(storage: Storage, job: TrainingJob, encodings: Sequence[str]) -> Fingerprint:
    """The fingerprint of a captioner.

    Args:
        storage: The run directory, which holds exemplars and annotations.
        job: Training data and hyperparameters.
        encodings: Configuration hash of each layer's encodings.

    Raises:
        MilanError: Annotations are missing, or describe other exemplars than those stored.
    """
    annotations = annotations_read(storage, job.source, job.layers)
    # With the name: two captioners of the same inputs may be trained at the same time, each in its own work folder.
    inputs = {"name": job.name, "annotations": annotations, "encodings": list(encodings)}
    tuned = {"decoder": asdict(job.decoder)} if job.decoder else {}
    chosen = {"units": job.units} if job.units else {}
    config = asdict(job.config)
    if job.config.stop_by == BLEU:
        del config["stop_by"]  # captioners that were trained before there was a choice stay current
    return Fingerprint.of({"kernel": KERNEL_VERSION, **inputs, **config, **asdict(job.sizes), **tuned, **chosen})


def annotations_read(storage: Storage, source: str, layers: Sequence[tuple[str, str]]) -> list[tuple[str, str, str]]:
    """Model, layer and configuration hash of the annotations to train on.

    Raises:
        MilanError: Annotations are missing, or describe other exemplars than those stored.
    """
    annotations = []
    for model, layer in layers:
        exemplars = storage.config_of(EXEMPLARS, model=model, layer=layer)
        annotations.append((model, layer, annotations_config(storage, source, model, layer, exemplars)))
    return annotations


# -- inside a training worker -------------------------------------------------------------------------------------


def _train_worker(arguments: dict[str, Any]) -> None:
    """Trains both models inside a Ray Train worker; every epoch is a checkpoint."""
    job: TrainingJob = arguments["job"]
    storage: Storage = arguments["storage"]
    torch.set_num_threads(job.threads)
    units = UnitFeatures(storage, arguments["work"])
    units.keep(job.memory_limit)
    state = trainer.reported_state() or new_state(units.texts)
    group = trainer.RayWorkerGroup()

    def report(state: State) -> None:
        row = state["history"][-1]
        if group.rank == 0:
            storage.put(f"{WORK}/{arguments['work']}/{EPOCH}", epoch_line(row).encode())
        metrics = {key: row[key] for key in ("part", "epoch", "train_loss", "validation")}
        trainer.report(metrics, state if group.rank == 0 else None)

    fit(units, job.plans, state, report, group)


def _train_in_task(storage: Storage, task: tuple[TrainingJob, Fingerprint]) -> tuple[bool, str]:
    """Trains a captioner; returns (True, a log line) or (False, the error).

    The state is stored every :data:`SAVE_INTERVAL` seconds; a task that is run again continues from it.
    """
    job, fingerprint = task
    work = fingerprint.hash
    path = f"{WORK}/{work}/{STATE}"
    started = saved = time.monotonic()
    torch.set_num_threads(job.threads)

    def report(state: State) -> None:
        nonlocal saved
        storage.put(f"{WORK}/{work}/{EPOCH}", epoch_line(state["history"][-1]).encode())
        if time.monotonic() - saved >= SAVE_INTERVAL:
            store_state(storage, path, state)
            saved = time.monotonic()

    try:
        units = write_units(storage, work, job.source, job.encoder.name, job.layers, job.units)
        units.keep(job.memory_limit)
        state = stored_state(storage, path) or new_state(units.texts)
        fit(units, job.plans, state, report)
        return True, _publish(storage, job, fingerprint, state, units, started)
    except Exception as error:  # returned, so that other trainings continue; the driver raises it at the end
        return False, str(error) if isinstance(error, MilanError) else f"{type(error).__name__}: {error}"


def _captioner(job: TrainingJob, state: State, feature_size: int) -> Captioner:
    """The captioner of a finished training."""
    lm, decoder = (fitted(state, part, plan, feature_size) for part, plan in job.plans.items())
    assert isinstance(lm, LanguageModel) and isinstance(decoder, Decoder)
    weights = job.encoder.load().backbone.state_dict() if job.keep_encoder else None
    return Captioner(Indexer.from_state(state["indexer"]), decoder, lm, job.encoder.name, weights)
