"""Training captioners with Ray Train (DESIGN §6): first p(d), then p(d|E), on annotated units.

encodings + annotations ─► units (Parquet) ─► [TorchTrainer: language model, decoder] ─► captioner, training table
"""

from __future__ import annotations

import contextlib
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import ray.data
import ray.train
import ray.train.torch
import torch
from torch import nn

from milan_ray.captioner import training
from milan_ray.captioner.captioner import Captioner
from milan_ray.captioner.decoder import Decoder, DecoderConfig
from milan_ray.captioner.lm import LanguageModel, LMConfig
from milan_ray.captioner.text import Indexer, Tokenizer, Vocabulary
from milan_ray.captioner.training import EarlyStopping
from milan_ray.config import TrainingConfig, config_hash
from milan_ray.errors import MilanError
from milan_ray.pipelines.captioners import EncoderRequest, has_captioner, save_captioner
from milan_ray.pipelines.encodings import unit_features
from milan_ray.pipelines.records import record_run
from milan_ray.progress import LINE_INTERVAL, say
from milan_ray.schema import ANNOTATIONS, ENCODINGS, TRAINING
from milan_ray.scoring.text import bleu_order, bleu_statistics, bleu_values
from milan_ray.storage import Storage, to_parquet

KERNEL_VERSION = "training-1"

STATE = "state.pt"

EPOCH = "epoch.txt"
"""Work file that says, for people, which epoch is done."""

T = TypeVar("T")


@dataclass(frozen=True)
class Sizes:
    """Sizes of the captioner; defaults are the paper's.

    Attributes:
        embedding: Token embeddings of both models.
        hidden: LSTM states of both models.
    """

    embedding: int = 128
    hidden: int = 512


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
        cpus: CPUs of each worker; leave one of the cluster's free for reading.
        gpus: GPUs of each worker.
        threads: Torch threads of each worker.
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
    config = _hash(storage, job)
    if storage.is_current(TRAINING, config, decoder=job.name) and has_captioner(storage, job.name):
        say(f"training of {job.name}: up to date")
        return False
    free = ray.cluster_resources().get("CPU", 0) - job.workers * job.cpus
    if free < 1:
        raise MilanError(
            f"training with {job.workers} workers of {job.cpus:g} CPUs leaves {free:g} CPUs of the cluster free, and "
            "reading needs one; lower --workers or --cpus-per-actor."
        )
    units, k, size = _write_units(storage, job, config)
    say(f"training {job.name} on {units} annotated units of {len({model for model, _ in job.layers})} models")
    started = time.monotonic()
    trainer = ray.train.torch.TorchTrainer(
        _train_worker,
        train_loop_config={"job": job, "exemplars": k, "feature_size": size, "storage": storage, "work": config},
        scaling_config=ray.train.ScalingConfig(
            num_workers=job.workers,
            use_gpu=job.gpus > 0,
            resources_per_worker={"CPU": job.cpus, **({"GPU": job.gpus} if job.gpus else {})},
        ),
        datasets={"units": ray.data.read_parquet(storage.uri(f"_work/{config}/units"))},
        # Every worker keeps all units: each takes its share of every batch, so that any number of workers sees the
        # same batches.
        dataset_config=ray.train.DataConfig(datasets_to_split=[]),
        run_config=ray.train.RunConfig(
            name="train",
            storage_path=storage.uri(f"_work/{config}"),
            failure_config=ray.train.FailureConfig(max_failures=3),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
        ),
    )
    with _watched(storage, config):
        result = trainer.fit()
    if result.checkpoint is None:
        raise MilanError(f"training of {job.name} ended without a checkpoint; run it again with --debug.")
    with result.checkpoint.as_directory() as folder:
        state = torch.load(Path(folder) / STATE, weights_only=True)
    captioner = _captioner(job, state, size)
    models = ", ".join(sorted({model for model, _ in job.layers}))
    about = (
        f"Captioner {job.name}: trained on the annotations {job.source!r} of {units} units of {models}; "
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
    storage.write(TRAINING, table, config, decoder=job.name)
    seconds = time.monotonic() - started
    record_run(storage, "training", config, models, rows=len(history), images=0, seconds=seconds)
    storage.remove_work(config)
    best = {row["part"]: row["validation"] for row in history if kept[row["part"]] == row["epoch"]}
    say(
        f"trained {job.name} in {seconds:.0f} s: perplexity {np.exp(best['lm']):.1f}, "
        f"validation BLEU {best['decoder']:.1f}"
    )
    return True


@contextlib.contextmanager
def _watched(storage: Storage, work: str) -> Iterator[None]:
    """Says now and then how far training is; Ray Train itself reports to its own controller only."""
    stop = threading.Event()

    def watch() -> None:
        said = ""
        while not stop.wait(LINE_INTERVAL):
            path = f"_work/{work}/{EPOCH}"
            line = storage.get(path).decode() if storage.exists(path) else ""
            if line != said:
                say(f"  training: {line}")
                said = line

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _hash(storage: Storage, job: TrainingJob) -> str:
    inputs = []
    for model, layer in job.layers:
        of_people = {"source": job.source, "model": model, "layer": layer}
        of_encoder = {"encoder": job.encoder.name, "model": model, "layer": layer}
        if storage.exemplars_of(ANNOTATIONS, **of_people) not in (None, storage.exemplars_of(ENCODINGS, **of_encoder)):
            raise MilanError(
                f"the annotations {job.source!r} of {model} {layer} speak of other exemplars than those now in "
                f"{storage.root}; annotate again, or restore the exemplars."
            )
        inputs.append(
            (model, layer, storage.config_of(ANNOTATIONS, **of_people), storage.config_of(ENCODINGS, **of_encoder))
        )
    return config_hash(
        {"kernel": KERNEL_VERSION, "inputs": inputs, "config": asdict(job.config), "sizes": asdict(job.sizes)}
    )


def _write_units(storage: Storage, job: TrainingJob, config: str) -> tuple[int, int, int]:
    """One Parquet file per layer: a row per annotated unit; returns (units, exemplars per unit, feature size)."""
    shapes: set[tuple[int, int]] = set()
    total = 0
    for number, (model, layer) in enumerate(job.layers):
        features = unit_features(storage.read(ENCODINGS, encoder=job.encoder.name, model=model, layer=layer))
        texts: dict[int, list[str]] = {}
        annotations = storage.read(ANNOTATIONS, source=job.source, model=model, layer=layer)
        for row in annotations.sort_by([("unit", "ascending"), ("annotator", "ascending")]).to_pylist():
            texts.setdefault(row["unit"], []).append(row["text"])
        most = max((len(rows) for rows in features.values()), default=0)
        # A unit with fewer exemplars than the others is dead or broken: nothing to learn from.
        units = [unit for unit in sorted(texts) if len(features.get(unit, ())) == most > 0]
        if not units:
            continue
        shapes.add(features[units[0]].shape)
        k, size = features[units[0]].shape
        table = pa.table(
            {
                "key": [f"{number:04d}/{unit:06d}" for unit in units],
                "feature": pa.FixedSizeListArray.from_arrays(
                    pa.array(np.concatenate([features[unit].ravel() for unit in units])), k * size
                ),
                "texts": pa.array([texts[unit] for unit in units], pa.list_(pa.string())),
            }
        )
        storage.put(f"_work/{config}/units/{number:04d}.parquet", to_parquet(table, {}))
        total += len(units)
    if not shapes:
        raise MilanError(f"no annotated units among {len(job.layers)} layers in {storage.root}.")
    if len(shapes) > 1:
        raise MilanError(f"units have different numbers of exemplars or feature sizes: {sorted(shapes)}.")
    ((k, size),) = shapes
    return total, k, size


# -- inside a training worker -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Units:
    """All annotated units, in a fixed order.

    Attributes:
        features: float32 (n, k, F).
        texts: The annotations of each.
        words: Their word ids.
        train: Rows to train on.
        validation: Rows held out.
    """

    features: torch.Tensor
    texts: list[list[str]]
    words: list[list[list[int]]]
    train: list[int]
    validation: list[int]

    def captions(self, rows: Sequence[int]) -> list[tuple[int, list[int]]]:
        """(unit row, word ids) of every annotation of some units."""
        return [(row, words) for row in rows for words in self.words[row]]


def _read_units(k: int, size: int, hold_out: float, seed: int) -> tuple[_Units, Indexer]:
    shard = ray.train.get_dataset_shard("units")
    parts = list(shard.iter_batches(batch_size=256, batch_format="pyarrow"))
    table = pa.concat_tables(parts).sort_by("key").combine_chunks()
    features = table["feature"].combine_chunks().flatten().to_numpy().reshape(len(table), k, size)
    texts = table["texts"].to_pylist()
    tokenizer = Tokenizer()
    indexer = Indexer(Vocabulary.build(texts, tokenizer))
    words = [[indexer.words(tokenizer(text)) for text in unit] for unit in texts]
    order = np.random.default_rng(seed).permutation(len(table)).tolist()
    held = max(1, int(hold_out * len(table)))
    units = _Units(torch.from_numpy(np.array(features)), texts, words, sorted(order[held:]), sorted(order[:held]))
    return units, indexer


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
                name = {"lm": "language model", "decoder": "decoder"}[row["part"]]
                line = f"{name}, epoch {row['epoch'] + 1}, loss {row['train_loss']:.2f}"
                self._storage.put(f"_work/{self._work}/{EPOCH}", line.encode())
                ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))
            else:
                ray.train.report(metrics)


def _train_worker(arguments: dict[str, Any]) -> None:
    """Trains the language model, then the decoder, each until it stops improving on the held-out units."""
    job: TrainingJob = arguments["job"]
    config = job.config
    torch.set_num_threads(job.threads)
    units, indexer = _read_units(arguments["exemplars"], arguments["feature_size"], config.hold_out, config.seed)
    state = _State(indexer, arguments["storage"], arguments["work"])
    device = ray.train.torch.get_device()
    pad = indexer.ids.pad
    order = bleu_order(units.texts)
    train, held_out = units.captions(units.train), units.captions(units.validation)

    def lm_batch(items: list[tuple[int, list[int]]]) -> training.LMBatch:
        inputs, targets = training.collate_lm([words for _, words in items], indexer)
        return training.LMBatch(inputs.to(device), targets.to(device))

    def decoder_batch(items: list[tuple[int, list[int]]]) -> training.DecoderBatch:
        features = units.features[[row for row, _ in items]]
        batch = training.collate_decoder(features, [words for _, words in items], indexer)
        return training.DecoderBatch(batch.features.to(device), batch.targets.to(device))

    def lm_step(model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int) -> tuple[float, float, str]:
        batches = _shared(train, config.lm_batch_size, config.seed, epoch)
        loss = training.lm_epoch(model, optimizer, map(lm_batch, batches), pad)
        chunks = (held_out[i : i + config.lm_batch_size] for i in range(0, len(held_out), config.lm_batch_size))
        return loss, training.lm_loss(_bare(model), map(lm_batch, chunks), pad), ""

    def decoder_step(model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int) -> tuple[float, float, str]:
        batches = _shared(train, config.decoder_batch_size, config.seed, epoch)
        loss = training.decoder_epoch(model, optimizer, map(decoder_batch, batches), pad, config)
        features = units.features[units.validation].to(device)
        bare = _bare(model)
        assert isinstance(bare, Decoder)
        captions = training.greedy_captions(bare, features, indexer)
        statistics = bleu_statistics(captions, [units.texts[row] for row in units.validation])
        return loss, float(bleu_values(statistics.sum(axis=0, keepdims=True), order)[0]), captions[0]

    torch.manual_seed(config.seed)
    lm_config, decoder_config = _model_configs(job, len(indexer.vocabulary), arguments["feature_size"])
    _run_part("lm", LanguageModel(lm_config), lm_step, False, state, config)
    torch.manual_seed(config.seed + 1)
    _run_part("decoder", Decoder(decoder_config), decoder_step, True, state, config)


Step = Callable[[nn.Module, torch.optim.Optimizer, int], tuple[float, float, str]]


def _run_part(part: str, model: nn.Module, step: Step, larger: bool, state: _State, config: TrainingConfig) -> None:
    """Trains one part, going on from the checkpoint where there is one."""
    if part in state.values["finished"]:
        return
    wrapped = ray.train.torch.prepare_model(model)
    optimizer = training.optimizer_for(wrapped, config)
    stopping = EarlyStopping(config.patience)
    first = 0
    current = state.values["current"]
    if current is not None and current["part"] == part:
        _bare(wrapped).load_state_dict(current["model"])
        optimizer.load_state_dict(current["optimizer"])
        stopping = EarlyStopping(**current["stopping"])
        first = current["epoch"] + 1
    for epoch in range(first, config.max_epochs):
        torch.manual_seed(1_000_003 * config.seed + epoch)  # dropout: the same after a resume
        loss, validation, sample = step(wrapped, optimizer, epoch)
        stop = stopping.update(epoch, validation if larger else -validation, _bare(wrapped))
        row = {"part": part, "epoch": epoch, "train_loss": loss, "validation": validation, "sample": sample}
        state.values["history"].append(row)
        last = stop or epoch + 1 == config.max_epochs
        if last:
            state.values["finished"][part] = stopping.weights
            state.values["kept"][part] = stopping.best_epoch
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


def _shared(items: Sequence[T], batch_size: int, seed: int, epoch: int) -> Iterator[list[T]]:
    """This worker's share of every batch; a batch too small for all workers is left out by all."""
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    for batch in training.shuffled_batches(items, batch_size, seed, epoch):
        if len(batch) >= workers:
            yield batch[rank::workers]


def _bare(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def _model_configs(job: TrainingJob, words: int, feature_size: int) -> tuple[LMConfig, DecoderConfig]:
    sizes = {"embedding_size": job.sizes.embedding, "hidden_size": job.sizes.hidden}
    return LMConfig(words, **sizes), DecoderConfig(words, feature_size, **sizes)


def _captioner(job: TrainingJob, state: dict[str, Any], feature_size: int) -> Captioner:
    """The captioner of a finished training, with its encoder's weights."""
    indexer = Indexer.from_state(state["indexer"])
    lm_config, decoder_config = _model_configs(job, len(indexer.vocabulary), feature_size)
    lm, decoder = LanguageModel(lm_config), Decoder(decoder_config)
    lm.load_state_dict(state["finished"]["lm"])
    decoder.load_state_dict(state["finished"]["decoder"])
    encoder = job.encoder.load()
    return Captioner(indexer, decoder, lm, job.encoder.name, encoder.backbone.state_dict())
