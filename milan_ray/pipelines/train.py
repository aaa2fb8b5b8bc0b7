"""Training captioners with Ray Train (DESIGN §6): first p(d), then p(d|E), on annotated units.

encodings + annotations ─► units (Parquet) ─► [TorchTrainer: language model, decoder] ─► captioner, training table
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import torch
from torch import nn

from milan_ray.captioner.captioner import Captioner
from milan_ray.captioner.decoder import Decoder
from milan_ray.captioner.fit import DECODER, LM, Plan, Sizes, State, Team, epoch_line, fit, fitted, new_state
from milan_ray.captioner.lm import LanguageModel
from milan_ray.captioner.text import Indexer
from milan_ray.config import Recipe, TrainingConfig
from milan_ray.errors import MilanError
from milan_ray.experiments.decoder_search import DecoderSetting
from milan_ray.pipelines.captioners import EncoderRequest, has_captioner, save_captioner
from milan_ray.pipelines.cluster import start
from milan_ray.pipelines.records import record_run
from milan_ray.pipelines.training_units import UnitFeatures, write_units
from milan_ray.progress import say, watched
from milan_ray.schema import ANNOTATIONS, ENCODINGS, EXEMPLARS, TRAINING
from milan_ray.storage import Storage

KERNEL_VERSION = "training-2"

STATE = "state.pt"

EPOCH = "epoch.txt"
"""Work file that says, for people, which epoch is done."""

MEMORY_LIMIT = 2 * 2**30
"""Bytes of features that a worker keeps in memory; more are read from Parquet as they are needed."""


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
        decoder: What tuning chose for the decoder (:mod:`milan_ray.pipelines.tune_decoder`); the language model keeps
            ``config`` and ``sizes``. None fits both alike.
    """

    name: str
    source: str
    layers: tuple[tuple[str, str], ...]
    encoder: EncoderRequest
    config: TrainingConfig = field(default_factory=TrainingConfig)
    sizes: Sizes = field(default_factory=Sizes)
    workers: int = 1
    cpus: float = 1
    gpus: float = 0
    threads: int = 1
    memory_limit: int = MEMORY_LIMIT
    decoder: DecoderSetting | None = None

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
    together = min(len(jobs), _room(jobs[0]))
    started = time.monotonic()
    say(f"training {len(jobs)} captioners, {together} at a time")
    failures = {}
    pool = ThreadPoolExecutor(together)
    try:
        running = {job.name: pool.submit(run_training, storage, job) for job in jobs}
        for name, future in running.items():
            try:
                future.result()
            except MilanError as error:
                failures[name] = error
                say(f"training of {name} failed: {error}")
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # when interrupted, Ray ends what runs
    if failures:
        reasons = " ".join(f"{name}: {error}" for name, error in failures.items())
        raise MilanError(f"{len(failures)} of {len(jobs)} trainings failed. {reasons}")
    say(f"{len(jobs)} captioners are there, after {time.monotonic() - started:.0f} s")


def _room(job: TrainingJob) -> int:
    """How many such trainings the cluster has room for at a time.

    Raises:
        MilanError: Not one.
    """
    start()
    total = ray.cluster_resources()
    room = int(total.get("CPU", 0) / (job.workers * job.cpus))
    if job.gpus:
        room = min(room, int(total.get("GPU", 0) / (job.workers * job.gpus)))
    if room < 1:
        raise MilanError(
            f"{job.workers} training workers of {job.cpus:g} CPUs and {job.gpus:g} GPUs do not fit the cluster "
            f"({total.get('CPU', 0):g} CPUs, {total.get('GPU', 0):g} GPUs); lower --workers or --cpus-per-actor."
        )
    return room


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
    encodings = {
        (model, layer): storage.config_of(ENCODINGS, encoder=job.encoder.name, model=model, layer=layer)
        for model, layer in job.layers
    }
    recipe = training_recipe(storage, job, encodings)
    config = recipe.hash
    if not storage.why(TRAINING, recipe, decoder=job.name) and has_captioner(storage, job.name):
        say(f"training of {job.name}: up to date")
        return False
    _room(job)
    units = write_units(storage, config, job.source, job.encoder.name, job.layers)
    where = "in memory" if units.nbytes <= job.memory_limit else "read as needed"
    say(
        f"training {job.name} on {len(units)} annotated units of {len({model for model, _ in job.layers})} models "
        f"({units.nbytes / 2**20:.0f} MiB of features, {where})"
    )
    started = time.monotonic()
    trainer = ray.train.torch.TorchTrainer(
        _train_worker,
        train_loop_config={"job": job, "storage": storage, "work": config},
        scaling_config=ray.train.ScalingConfig(
            num_workers=job.workers,
            use_gpu=job.gpus > 0,
            resources_per_worker={"CPU": job.cpus, **({"GPU": job.gpus} if job.gpus else {})},
        ),
        run_config=ray.train.RunConfig(
            name="train",
            storage_path=storage.uri(f"_work/{config}"),
            failure_config=ray.train.FailureConfig(max_failures=3),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
        ),
    )
    with watched(_epochs_said(storage, config, job.name)):
        try:
            result = trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise MilanError(
                f"training of {job.name} failed ({_reason(error)}); run it again to go on from its last epoch."
            ) from error
    if result.checkpoint is None:
        raise MilanError(f"training of {job.name} ended without a checkpoint; run it again with --debug.")
    with result.checkpoint.as_directory() as folder:
        state = torch.load(Path(folder) / STATE, weights_only=True)
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
    storage.write(TRAINING, table, recipe, decoder=job.name)
    seconds = time.monotonic() - started
    record_run(storage, "training", config, job.name, rows=len(history), images=0, seconds=seconds)
    storage.remove_work(config)
    best = {row["part"]: row["validation"] for row in history if kept[row["part"]] == row["epoch"]}
    say(
        f"trained {job.name} in {seconds:.0f} s: perplexity {np.exp(best['lm']):.1f}, "
        f"validation BLEU {best['decoder']:.1f}"
    )
    return True


def _reason(error: ray.train.TrainingFailedError) -> str:
    """What went wrong, in a line."""
    failures = list(getattr(error, "worker_failures", {}).values())
    return str(failures[0] if failures else error).strip().splitlines()[-1]


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


def training_recipe(storage: Storage, job: TrainingJob, encodings: Mapping[tuple[str, str], str]) -> Recipe:
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
    return Recipe.of({"kernel": KERNEL_VERSION, **inputs, **asdict(job.config), **asdict(job.sizes), **tuned})


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


class _RayTeam(Team):
    """The workers of a TorchTrainer."""

    def __init__(self) -> None:
        context = ray.train.get_context()
        super().__init__(ray.train.torch.get_device(), context.get_world_rank(), context.get_world_size())

    def wrap(self, model: nn.Module) -> nn.Module:
        return ray.train.torch.prepare_model(model)

    def mean(self, *metrics: float) -> list[float]:
        values = torch.tensor(metrics, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(values)
        return (values / self.workers).tolist()


def _train_worker(arguments: dict[str, Any]) -> None:
    """Fits both models, every epoch a checkpoint of Ray Train's."""
    job: TrainingJob = arguments["job"]
    storage: Storage = arguments["storage"]
    torch.set_num_threads(job.threads)
    units = UnitFeatures(storage, arguments["work"])
    if units.nbytes <= job.memory_limit:
        units.keep()
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        state = new_state(units.texts)
    else:
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder) / STATE, weights_only=True)
    team = _RayTeam()

    def report(state: State) -> None:
        row = state["history"][-1]
        metrics = {key: row[key] for key in ("part", "epoch", "train_loss", "validation")}
        if team.rank > 0:
            ray.train.report(metrics)
            return
        with tempfile.TemporaryDirectory() as folder:
            torch.save(state, Path(folder) / STATE)
            storage.put(f"_work/{arguments['work']}/{EPOCH}", epoch_line(row).encode())
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))

    fit(units, job.plans, state, report, team)


def _captioner(job: TrainingJob, state: State, feature_size: int) -> Captioner:
    """The captioner of a finished training, with its encoder's weights."""
    lm, decoder = (fitted(state, part, plan, feature_size) for part, plan in job.plans.items())
    assert isinstance(lm, LanguageModel) and isinstance(decoder, Decoder)
    encoder = job.encoder.load()
    return Captioner(Indexer.from_state(state["indexer"]), decoder, lm, job.encoder.name, encoder.backbone.state_dict())
