"""Training captioners with Ray Train (DESIGN §6): first p(d), then p(d|E), on annotated units.

encodings + annotations ─► units (Parquet) ─► [TorchTrainer: language model, decoder] ─► captioner, training table

Both parts learn from the same units and are measured on the same held-out ones. The reference holds out *captions* from
the language model, by the numbers of the decoder's held-out units (REFERENCE §4), so it learns most of what the decoder
is measured on.
"""

from __future__ import annotations

import contextlib
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import ray.train
import ray.train.torch
import torch
from torch import nn

from milan_ray.captioner import training
from milan_ray.captioner.captioner import Captioner
from milan_ray.captioner.decoder import Decoder, DecoderConfig
from milan_ray.captioner.lm import LanguageModel, LMConfig
from milan_ray.captioner.text import Indexer, Vocabulary
from milan_ray.captioner.training import EarlyStopping
from milan_ray.config import Recipe, TrainingConfig
from milan_ray.errors import MilanError
from milan_ray.pipelines.captioners import EncoderRequest, has_captioner, save_captioner
from milan_ray.pipelines.records import record_run
from milan_ray.pipelines.training_units import UnitFeatures, write_units
from milan_ray.progress import LINE_INTERVAL, say
from milan_ray.schema import ANNOTATIONS, ENCODINGS, EXEMPLARS, TRAINING
from milan_ray.scoring.text import bleu_order, bleu_statistics, bleu_values
from milan_ray.storage import Storage

KERNEL_VERSION = "training-2"

STATE = "state.pt"

EPOCH = "epoch.txt"
"""Work file that says, for people, which epoch is done."""

MEMORY_LIMIT = 2 * 2**30
"""Bytes of features that a worker keeps in memory; more are read from Parquet as they are needed."""

Caption = tuple[int, list[int]]
"""An annotation: its unit's row, and its word ids."""

Item = TypeVar("Item")
Batch = TypeVar("Batch")
Collated = TypeVar("Collated", training.LMBatch, training.DecoderBatch)


@dataclass(frozen=True)
class Sizes:
    """Sizes of the captioner; defaults are the paper's.

    Attributes:
        embedding: Token embeddings of both models.
        hidden: LSTM states of both models.
        dropout: Dropout of both models while training.
    """

    embedding: int = 128
    hidden: int = 512
    dropout: float = 0.5


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


def _room(job: TrainingJob) -> int:
    """How many such trainings the cluster has room for at a time.

    Raises:
        MilanError: Not one.
    """
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
    with _watched(storage, config, job.name):
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
    kept = {part: state["kept"][part] for part in ("lm", "decoder")}
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


@contextlib.contextmanager
def _watched(storage: Storage, work: str, name: str) -> Iterator[None]:
    """Says now and then how far training is; Ray Train itself reports to its own controller only."""
    stop = threading.Event()

    def watch() -> None:
        said = ""
        while not stop.wait(LINE_INTERVAL):
            path = f"_work/{work}/{EPOCH}"
            line = storage.get(path).decode() if storage.exists(path) else ""
            if line != said:
                say(f"  {name}: {line}")
                said = line

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def training_recipe(storage: Storage, job: TrainingJob, encodings: Mapping[tuple[str, str], str]) -> Recipe:
    """What decides a captioner.

    Args:
        storage: The run directory, which holds exemplars and annotations.
        job: What to train, and how.
        encodings: (model, layer) → configuration hash of the encodings.

    Raises:
        MilanError: Annotations are missing, or speak of other exemplars.
    """
    annotations = []
    for model, layer in job.layers:
        of_people = {"source": job.source, "model": model, "layer": layer}
        exemplars = storage.config_of(EXEMPLARS, model=model, layer=layer)
        if storage.exemplars_of(ANNOTATIONS, **of_people) not in (None, exemplars):
            raise MilanError(
                f"the annotations {job.source!r} of {model} {layer} speak of other exemplars than those now in "
                f"{storage.root}; annotate again, or restore the exemplars."
            )
        annotations.append((model, layer, storage.config_of(ANNOTATIONS, **of_people)))
    # The name too: captioners of two names made from the same things may be in the making at the same time.
    inputs = {"name": job.name, "annotations": annotations, "encodings": [encodings[pair] for pair in job.layers]}
    return Recipe.of({"kernel": KERNEL_VERSION, **inputs, **asdict(job.config), **asdict(job.sizes)})


# -- inside a training worker -------------------------------------------------------------------------------------


class _State:
    """What a checkpoint holds: both parts' progress, and the weights to keep of the parts that are finished."""

    def __init__(self, indexer: Indexer, storage: Storage, work: str) -> None:
        self._storage, self._work = storage, work
        self.values: dict[str, Any] = {"history": [], "finished": {}, "kept": {}, "current": None}
        self.values["indexer"] = indexer.state()
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is not None:
            with checkpoint.as_directory() as folder:
                self.values = torch.load(Path(folder) / STATE, weights_only=True)

    def report(self) -> None:
        """Reports the newest epoch to Ray Train, with a checkpoint to resume from."""
        row = self.values["history"][-1]
        metrics = {key: row[key] for key in ("part", "epoch", "train_loss", "validation")}
        with tempfile.TemporaryDirectory() as folder:
            if ray.train.get_context().get_world_rank() == 0:
                torch.save(self.values, Path(folder) / STATE)
                self._storage.put(f"_work/{self._work}/{EPOCH}", _line(row).encode())
                ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))
            else:
                ray.train.report(metrics)


def _line(row: dict[str, Any]) -> str:
    """One epoch, for people."""
    done = f"epoch {row['epoch'] + 1}, loss {row['train_loss']:.2f}"
    if row["part"] == "lm":
        return f"language model, {done}, held-out perplexity {np.exp(row['validation']):.1f}"
    return f"decoder, {done}, held-out BLEU {row['validation']:.1f}, says {row['sample']!r}"


def _train_worker(arguments: dict[str, Any]) -> None:
    """Trains the language model, then the decoder, each until it stops improving on the held-out units."""
    job: TrainingJob = arguments["job"]
    config = job.config
    torch.set_num_threads(job.threads)
    units = UnitFeatures(arguments["storage"], arguments["work"])
    if units.nbytes <= job.memory_limit:
        units.keep()
    indexer = Indexer(Vocabulary.build(units.texts))
    held_out, train = split_units(len(units), config)
    references = [units.texts[row] for row in held_out]
    train_captions, held_out_captions = _captions(units, train, indexer), _captions(units, held_out, indexer)
    state = _State(indexer, arguments["storage"], arguments["work"])
    device = ray.train.torch.get_device()
    pad, order = indexer.ids.pad, bleu_order(units.texts)
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()

    def lm_batch(batch: list[Caption]) -> training.LMBatch:
        whole = [words for _, words in batch]
        mine = whole[rank::workers]
        share = training.share_of(mine, whole, workers)
        return _on(device, training.collate_lm(mine or whole[:1], indexer, share))

    def decoder_batch(batch: list[Caption]) -> training.DecoderBatch:
        whole = [words for _, words in batch]
        mine = batch[rank::workers]
        share = training.share_of([words for _, words in mine], whole, workers)
        rows, words = zip(*(mine or batch[:1]), strict=True)
        longest = max(map(len, whole))
        return _on(device, training.collate_decoder(units.take(rows), words, indexer, longest, share))

    def lm_step(model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int) -> tuple[float, float, str]:
        batches = training.shuffled_batches(train_captions, config.lm_batch_size, config.seed, epoch)
        loss = training.lm_epoch(model, optimizer, _ahead(lm_batch, batches), pad, config)
        held = [words for _, words in held_out_captions]
        chunks = (training.collate_lm(chunk, indexer) for chunk in _chunks(held, config.lm_batch_size))
        return loss, training.lm_loss(_bare(model), (_on(device, chunk) for chunk in chunks), pad), ""

    def decoder_step(model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int) -> tuple[float, float, str]:
        batches = training.shuffled_batches(train_captions, config.decoder_batch_size, config.seed, epoch)
        loss = training.decoder_epoch(model, optimizer, _ahead(decoder_batch, batches), pad, config)
        bare = _bare(model)
        assert isinstance(bare, Decoder)
        captions = [
            caption
            for features in _ahead(units.take, _chunks(held_out, config.decoder_batch_size))
            for caption in training.greedy_captions(bare, features.to(device), indexer)
        ]
        statistics = bleu_statistics(captions, references)
        return loss, float(bleu_values(statistics.sum(axis=0, keepdims=True), order)[0]), captions[0]

    lm_config, decoder_config = _model_configs(job, len(indexer.vocabulary), units.size)
    torch.manual_seed(config.seed)
    _run_part("lm", LanguageModel(lm_config), lm_step, False, state, config)
    torch.manual_seed(config.seed + 1)
    _run_part("decoder", Decoder(decoder_config), decoder_step, True, state, config)


def split_units(units: int, config: TrainingConfig) -> tuple[list[int], list[int]]:
    """Rows (held out, to train on), each ascending; depends on the number of units and the seed alone."""
    order = np.random.default_rng(config.seed).permutation(units).tolist()
    held = max(1, int(config.hold_out * units))
    return sorted(order[:held]), sorted(order[held:])


def _captions(units: UnitFeatures, rows: Sequence[int], indexer: Indexer) -> list[Caption]:
    """Every annotation of some units."""
    return [(row, indexer.words(indexer.tokenizer(text))) for row in rows for text in units.texts[row]]


def _chunks(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _on(device: torch.device, batch: Collated) -> Collated:
    inputs, targets, share = batch
    return type(batch)(inputs.to(device), targets.to(device), share)


def _ahead(load: Callable[[Item], Batch], items: Iterable[Item]) -> Iterator[Batch]:
    """Loads every item while the one before is used."""
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for item in items:
            loading = pool.submit(load, item)
            if waiting is not None:
                yield waiting.result()
            waiting = loading
        if waiting is not None:
            yield waiting.result()


Step = Callable[[nn.Module, torch.optim.Optimizer, int], tuple[float, float, str]]


def _run_part(part: str, model: nn.Module, step: Step, larger: bool, state: _State, config: TrainingConfig) -> None:
    """Trains one part, going on from the checkpoint where there is one."""
    if part in state.values["finished"]:
        return
    rank = ray.train.get_context().get_world_rank()
    wrapped = ray.train.torch.prepare_model(model)
    optimizer = training.optimizer_for(wrapped, config)
    stopping = EarlyStopping(config.patience, config.keep_last_weights)
    first = 0
    current = state.values["current"]
    if current is not None and current["part"] == part:
        _bare(wrapped).load_state_dict(current["model"])
        optimizer.load_state_dict(current["optimizer"])
        stopping = EarlyStopping(**current["stopping"])
        first = current["epoch"] + 1
    for epoch in range(first, config.max_epochs):
        torch.manual_seed(1_000_003 * config.seed + 1_009 * rank + epoch)  # dropout: the same after a resume
        loss, validation, sample = step(wrapped, optimizer, epoch)
        loss, validation = _agreed(loss, validation)
        stop = stopping.update(epoch, validation if larger else -validation, _bare(wrapped))
        row = {"part": part, "epoch": epoch, "train_loss": loss, "validation": validation, "sample": sample}
        state.values["history"].append(row)
        last = stop or epoch + 1 == config.max_epochs
        if last:
            state.values["finished"][part] = stopping.weights
            state.values["kept"][part] = stopping.kept_epoch
            state.values["current"] = None
        else:
            state.values["current"] = {
                "part": part,
                "epoch": epoch,
                "model": _bare(wrapped).state_dict(),
                "optimizer": optimizer.state_dict(),
                "stopping": stopping.state(),
            }
        state.report()
        if last:
            return


def _agreed(*metrics: float) -> list[float]:
    """The mean over all workers, so that all of them stop after the same epoch."""
    values = torch.tensor(metrics, dtype=torch.float64, device=ray.train.torch.get_device())
    torch.distributed.all_reduce(values)
    return (values / torch.distributed.get_world_size()).tolist()


def _bare(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def _model_configs(job: TrainingJob, words: int, feature_size: int) -> tuple[LMConfig, DecoderConfig]:
    sizes = job.sizes
    return (
        LMConfig(words, sizes.embedding, sizes.hidden, dropout=sizes.dropout),
        DecoderConfig(words, feature_size, sizes.embedding, sizes.hidden, dropout=sizes.dropout),
    )


def _captioner(job: TrainingJob, state: dict[str, Any], feature_size: int) -> Captioner:
    """The captioner of a finished training, with its encoder's weights."""
    indexer = Indexer.from_state(state["indexer"])
    lm_config, decoder_config = _model_configs(job, len(indexer.vocabulary), feature_size)
    lm, decoder = LanguageModel(lm_config), Decoder(decoder_config)
    lm.load_state_dict(state["finished"]["lm"])
    decoder.load_state_dict(state["finished"]["decoder"])
    encoder = job.encoder.load()
    return Captioner(indexer, decoder, lm, job.encoder.name, encoder.backbone.state_dict())
