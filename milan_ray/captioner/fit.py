"""Training loop of a captioner: first p(d), then p(d|E), each with early stopping (paper A.3).

The loop is the same in a plain process, a Ray Train worker and a Ray Tune trial; a :class:`WorkerGroup` holds the
differences. After every epoch it reports a state from which training can continue.

Both models are trained on the same units and validated on the same held-out units. The reference instead holds out
*captions* from the language model, by the indices of the decoder's held-out units, so its language model is trained on
most captions that the decoder is validated on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from milan_ray.captioner import training
from milan_ray.captioner.decoder import Decoder, DecoderConfig
from milan_ray.captioner.lm import LanguageModel, LMConfig
from milan_ray.captioner.text import Indexer, Vocabulary
from milan_ray.captioner.training import EarlyStopping
from milan_ray.config import LOSS, TrainingConfig
from milan_ray.device import to_device
from milan_ray.errors import MilanError
from milan_ray.scoring.text import bleu_order, bleu_statistics, bleu_values

LM, DECODER = PARTS = ("lm", "decoder")
"""The two models of a captioner, in training order."""

Caption = tuple[int, list[int]]
"""An annotation: its unit's index, and its word ids."""

State = dict[str, Any]
"""Training state after an epoch, as plain numbers, texts and tensors: ``history`` (a row per epoch), ``finished``
(part → weights to keep), ``kept`` (part → their epoch), ``current`` (the part in training), ``indexer``."""

Report = Callable[[State], None]
"""Receives the state after an epoch; the last row of its history is the epoch's."""

Item = TypeVar("Item")
Batch = TypeVar("Batch")


class Units(Protocol):
    """Annotated units, by index."""

    @property
    def texts(self) -> list[list[str]]:
        """The annotations of each unit."""

    @property
    def size(self) -> int:
        """Size F of an exemplar's feature."""

    def take(self, rows: Sequence[int]) -> Tensor:
        """Features of the units at these indices: float32 (len(rows), k, F)."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model; defaults are the paper's.

    Attributes:
        embedding: Size of a token's embedding.
        hidden: Size of an LSTM state.
        dropout: Dropout probability during training.
    """

    embedding: int = 128
    hidden: int = 512
    dropout: float = 0.5


@dataclass(frozen=True)
class FitConfig:
    """How to train one of the two models.

    Attributes:
        config: Hyperparameters; hold-out share and seed are the same for both models.
        sizes: Sizes of the model.
    """

    config: TrainingConfig = field(default_factory=TrainingConfig)
    sizes: Sizes = field(default_factory=Sizes)

    def model(self, part: str, words: int, feature_size: int) -> nn.Module:
        """Builds the language model or decoder for a number of words and features of size F."""
        sizes = self.sizes
        if part == LM:
            return LanguageModel(LMConfig(words, sizes.embedding, sizes.hidden, dropout=sizes.dropout))
        return Decoder(DecoderConfig(words, feature_size, sizes.embedding, sizes.hidden, dropout=sizes.dropout))


class WorkerGroup:
    """The data-parallel workers of a training, as seen by one of them; this class is a group of one.

    Attributes:
        rank: Index of this worker.
        workers: Number of workers.
        device: Device of this worker.
    """

    def __init__(self, device: torch.device | str = "cpu", rank: int = 0, workers: int = 1) -> None:
        self.device, self.rank, self.workers = torch.device(device), rank, workers

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model on this worker's device; its gradients are averaged over the workers."""
        return model.to(self.device)

    def mean(self, *metrics: float) -> list[float]:
        """Metrics averaged over the workers, so that all stop after the same epoch."""
        return list(metrics)


def new_state(texts: Iterable[Sequence[str]]) -> State:
    """The state before the first epoch; its vocabulary is built from all annotations."""
    indexer = Indexer(Vocabulary.build(texts))
    return {"history": [], "finished": {}, "kept": {}, "current": None, "indexer": indexer.state()}


def fit(
    units: Units, plans: Mapping[str, FitConfig], state: State, report: Report, group: WorkerGroup | None = None
) -> None:
    """Trains models from a state until each stops improving on the held-out units.

    Args:
        units: The annotated units.
        plans: Part → how to train it; only these parts are trained, in this order.
        state: From :func:`new_state`, or one that was reported; changed in place.
        report: Called after every epoch, by every worker.
        group: The workers; this process alone when left out.
    """
    fitting = _Fitting(units, Indexer.from_state(state["indexer"]), group or WorkerGroup())
    for part in plans:
        if part not in state["finished"]:
            fitting.run(part, plans[part], state, report)


def fitted(state: State, part: str, plan: FitConfig, feature_size: int) -> nn.Module:
    """The model of a finished part, with the weights that early stopping kept."""
    model = plan.model(part, len(Indexer.from_state(state["indexer"]).vocabulary), feature_size)
    model.load_state_dict(state["finished"][part])
    return model


def split_units(units: int, config: TrainingConfig) -> tuple[list[int], list[int]]:
    """Indices of units (held out, to train on), ascending; a function of the number of units and the seed.

    Raises:
        MilanError: No unit is left to train on.
    """
    order = np.random.default_rng(config.seed).permutation(units).tolist()
    held_out = max(1, int(config.hold_out * units))
    if held_out >= units:
        raise MilanError(
            f"of {units} annotated units {held_out} would be held out to stop early, which leaves none to train on: "
            "lower --hold-out, or annotate more."
        )
    return sorted(order[:held_out]), sorted(order[held_out:])


class _Fitting:
    """The training loop over some units."""

    def __init__(self, units: Units, indexer: Indexer, group: WorkerGroup) -> None:
        self.units, self.indexer, self.group = units, indexer, group
        self.pad, self.order = indexer.ids.pad, bleu_order(units.texts)
        self.words = [[indexer.words(indexer.tokenizer(text)) for text in texts] for texts in units.texts]

    def run(self, part: str, plan: FitConfig, state: State, report: Report) -> None:
        """Trains one model; changes the state in place and reports it after every epoch."""
        config, group = plan.config, self.group
        held_out, train = split_units(len(self.units.texts), config)
        torch.manual_seed(config.seed + PARTS.index(part))
        model = group.wrap(plan.model(part, len(self.indexer.vocabulary), self.units.size))
        bare = _unwrapped(model)
        optimizer = training.optimizer_for(model, config)
        stopping = EarlyStopping(config.patience, config.keep_last_weights)
        first = 0
        current = state["current"]
        if current is not None and current["part"] == part:
            bare.load_state_dict(current["model"])
            optimizer.load_state_dict(current["optimizer"])
            stopping = EarlyStopping(**current["stopping"])
            first = current["epoch"] + 1
        captions, validation_captions = self._captions(train), self._captions(held_out)
        batch_size = config.lm_batch_size if part == LM else config.decoder_batch_size
        for epoch in range(first, config.max_epochs):
            # Seeded by epoch, so that dropout is the same after a resume.
            torch.manual_seed(1_000_003 * config.seed + 1_009 * group.rank + epoch)
            sample = ""
            batches = training.shuffled_batches(captions, batch_size, config.seed, epoch)
            if part == LM:
                lm_batches = _prefetched(self._lm_batch, batches)
                loss = training.lm_epoch(model, optimizer, lm_batches, self.pad, config)
                validation = self._lm_loss(bare, validation_captions, batch_size)
                score = -validation
            else:
                decoder_batches = _prefetched(self._decoder_batch, batches)
                loss = training.decoder_epoch(model, optimizer, decoder_batches, self.pad, config)
                validation, sample = self._bleu(bare, held_out, batch_size)
                by_loss = config.stop_by == LOSS
                score = -self._decoder_loss(bare, validation_captions, batch_size) if by_loss else validation
            loss, validation, score = group.mean(loss, validation, score)
            stop = stopping.update(epoch, score, bare)
            row = {"part": part, "epoch": epoch, "train_loss": loss, "validation": validation, "sample": sample}
            if part == DECODER and config.stop_by == LOSS:
                row["validation_loss"] = -score
            state["history"].append(row)
            last = stop or epoch + 1 == config.max_epochs
            if last:
                state["finished"][part] = stopping.weights
                state["kept"][part] = stopping.kept_epoch
                state["current"] = None
            else:
                weights = {"model": bare.state_dict(), "optimizer": optimizer.state_dict()}
                state["current"] = {"part": part, "epoch": epoch, **weights, "stopping": stopping.state()}
            report(state)
            if last:
                return

    def _captions(self, rows: Sequence[int]) -> list[Caption]:
        """All annotations of some units."""
        return [(row, words) for row in rows for words in self.words[row]]

    def _part(self, batch: Sequence[Caption]) -> tuple[Sequence[int], Sequence[list[int]], training.Share]:
        """This worker's part of a batch: unit indices, words and weight.

        Workers without captions process the batch's first one with weight 0.
        """
        captions = batch[self.group.rank :: self.group.workers]
        batch_words, own_words = ([words for _, words in some] for some in (batch, captions))
        rows, words = zip(*(captions or batch[:1]), strict=True)
        return rows, words, training.share_of(own_words, batch_words, self.group.workers)

    def _lm_batch(self, batch: Sequence[Caption]) -> training.LMBatch:
        """This worker's part of a batch for the language model."""
        _, words, share = self._part(batch)
        return training.collate_lm(words, self.indexer, share)

    def _decoder_batch(self, batch: Sequence[Caption]) -> training.DecoderBatch:
        """This worker's part of a batch for the decoder, as long as the whole batch's longest caption."""
        rows, words, share = self._part(batch)
        longest = max(len(words) for _, words in batch)
        features, targets, _ = training.collate_decoder(self.units.take(rows), words, self.indexer, longest, share)
        device = self.group.device
        return training.DecoderBatch(to_device(features, device), to_device(targets, device), share)

    def _lm_loss(self, model: nn.Module, captions: Sequence[Caption], batch_size: int) -> float:
        words = [words for _, words in captions]
        chunks = (training.collate_lm(chunk, self.indexer) for chunk in _chunks(words, batch_size))
        return training.lm_loss(model, chunks, self.pad)

    def _decoder_loss(self, model: nn.Module, captions: Sequence[Caption], batch_size: int) -> float:
        """Loss per token of some captions, each whole batch on this worker."""
        device = self.group.device

        def load(chunk: Sequence[Caption]) -> training.DecoderBatch:
            batch = training.collate_decoder(
                self.units.take([row for row, _ in chunk]), [words for _, words in chunk], self.indexer
            )
            return training.DecoderBatch(to_device(batch.features, device), to_device(batch.targets, device))

        return training.decoder_loss(model, _prefetched(load, _chunks(captions, batch_size)), self.pad)

    def _bleu(self, model: nn.Module, rows: Sequence[int], batch_size: int) -> tuple[float, str]:
        """BLEU of greedy captions of some units, and the first caption."""
        assert isinstance(model, Decoder)
        captions = [
            caption
            for features in _prefetched(self.units.take, _chunks(rows, batch_size))
            for caption in training.greedy_captions(model, to_device(features, self.group.device), self.indexer)
        ]
        statistics = bleu_statistics(captions, [self.units.texts[row] for row in rows])
        return float(bleu_values(statistics.sum(axis=0, keepdims=True), self.order)[0]), captions[0]


def _chunks(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _prefetched(load: Callable[[Item], Batch], items: Iterable[Item]) -> Iterator[Batch]:
    """Loads each item in a thread while the caller uses the item before."""
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for item in items:
            loading = pool.submit(load, item)
            if waiting is not None:
                yield waiting.result()
            waiting = loading
        if waiting is not None:
            yield waiting.result()


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model without the wrapper of data-parallel training."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def epoch_line(row: Mapping[str, Any]) -> str:
    """A readable line on an epoch of the history."""
    done = f"epoch {row['epoch'] + 1}, loss {row['train_loss']:.2f}"
    if row["part"] == LM:
        return f"language model, {done}, held-out perplexity {np.exp(row['validation']):.1f}"
    loss = f", held-out loss {row['validation_loss']:.2f}" if "validation_loss" in row else ""
    return f"decoder, {done}{loss}, held-out BLEU {row['validation']:.1f}, says {row['sample']!r}"
