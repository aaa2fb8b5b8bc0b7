"""Fitting a captioner to annotated units: first p(d), then p(d|E), each until it stops improving (paper A.3).

One loop for everybody: it reports every epoch together with all that is needed to go on from there, and asks a
:class:`WorkerGroup` for the little that differs between a process of its own, a Ray Train worker and a Ray Tune trial.

Both parts learn from the same units and are measured on the same held-out ones. The reference holds out *captions* from
the language model, by the numbers of the decoder's held-out units, so it learns most of what the decoder
is measured on.
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
from milan_ray.config import TrainingConfig
from milan_ray.errors import MilanError
from milan_ray.scoring.text import bleu_order, bleu_statistics, bleu_values

LM, DECODER = PARTS = ("lm", "decoder")
"""The two models of a captioner, in the order they are fitted."""

Caption = tuple[int, list[int]]
"""An annotation: its unit's row, and its word ids."""

State = dict[str, Any]
"""All that is needed to go on after an epoch, as plain numbers, texts and tensors: ``history`` (a row per epoch),
``finished`` (part → weights to keep), ``kept`` (part → their epoch), ``current`` (the part under way), ``indexer``."""

Report = Callable[[State], None]
"""Takes in the state after an epoch; the epoch's row is the last of its history."""

Item = TypeVar("Item")
Batch = TypeVar("Batch")
Collated = TypeVar("Collated", training.LMBatch, training.DecoderBatch)


class Units(Protocol):
    """Annotated units by number."""

    @property
    def texts(self) -> list[list[str]]:
        """The annotations of each unit."""

    @property
    def size(self) -> int:
        """Size F of an exemplar's feature."""

    def take(self, rows: Sequence[int]) -> Tensor:
        """Features of some units: float32 (len(rows), k, F)."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model; defaults are the paper's.

    Attributes:
        embedding: Token embeddings.
        hidden: LSTM states.
        dropout: Dropout while training.
    """

    embedding: int = 128
    hidden: int = 512
    dropout: float = 0.5


@dataclass(frozen=True)
class Plan:
    """How one of the two models is fitted.

    Attributes:
        config: Optimisation; hold-out and seed are the same for both.
        sizes: Sizes of the model.
    """

    config: TrainingConfig = field(default_factory=TrainingConfig)
    sizes: Sizes = field(default_factory=Sizes)

    def model(self, part: str, words: int, feature_size: int) -> nn.Module:
        """Builds the model of a part for a vocabulary of so many words and features of size F."""
        sizes = self.sizes
        if part == LM:
            return LanguageModel(LMConfig(words, sizes.embedding, sizes.hidden, dropout=sizes.dropout))
        return Decoder(DecoderConfig(words, feature_size, sizes.embedding, sizes.hidden, dropout=sizes.dropout))


class WorkerGroup:
    """The workers that fit a model together; this one works alone.

    Attributes:
        rank: This worker's number.
        workers: How many there are.
        device: Where this one computes.
    """

    def __init__(self, device: torch.device | str = "cpu", rank: int = 0, workers: int = 1) -> None:
        self.device, self.rank, self.workers = torch.device(device), rank, workers

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model on its device, its gradients averaged over all workers."""
        return model.to(self.device)

    def mean(self, *metrics: float) -> list[float]:
        """The mean over all workers, so that all of them stop after the same epoch."""
        return list(metrics)


def new_state(texts: Iterable[Sequence[str]]) -> State:
    """The state before the first epoch; the vocabulary is that of all units."""
    indexer = Indexer(Vocabulary.build(texts))
    return {"history": [], "finished": {}, "kept": {}, "current": None, "indexer": indexer.state()}


def fit(units: Units, plans: Mapping[str, Plan], state: State, report: Report, team: WorkerGroup | None = None) -> None:
    """Fits models, going on from where a state is; returns when each has stopped improving on the held-out units.

    Args:
        units: The annotated units.
        plans: Part → how to fit it; only the parts in it are fitted, in its order.
        state: From :func:`new_state`, or one that was reported; changed in place.
        report: Called after every epoch, by every worker.
        team: Who works on it; one's own process when left out.
    """
    fitting = _Fitting(units, Indexer.from_state(state["indexer"]), team or WorkerGroup())
    for part in plans:
        if part not in state["finished"]:
            fitting.run(part, plans[part], state, report)


def fitted(state: State, part: str, plan: Plan, feature_size: int) -> nn.Module:
    """A finished part's model, with the weights to keep."""
    model = plan.model(part, len(Indexer.from_state(state["indexer"]).vocabulary), feature_size)
    model.load_state_dict(state["finished"][part])
    return model


def split_units(units: int, config: TrainingConfig) -> tuple[list[int], list[int]]:
    """Rows (held out, to train on), each ascending; depends on the number of units and the seed alone.

    Raises:
        MilanError: None is left to train on.
    """
    order = np.random.default_rng(config.seed).permutation(units).tolist()
    held = max(1, int(config.hold_out * units))
    if held >= units:
        raise MilanError(
            f"of {units} annotated units {held} would be held out to stop early, which leaves none to train on: lower "
            "--hold-out, or annotate more."
        )
    return sorted(order[:held]), sorted(order[held:])


class _Fitting:
    """Epochs over some units."""

    def __init__(self, units: Units, indexer: Indexer, team: WorkerGroup) -> None:
        self.units, self.indexer, self.team = units, indexer, team
        self.pad, self.order = indexer.ids.pad, bleu_order(units.texts)
        self.words = [[indexer.words(indexer.tokenizer(text)) for text in texts] for texts in units.texts]

    def run(self, part: str, plan: Plan, state: State, report: Report) -> None:
        """Fits one part."""
        config, team = plan.config, self.team
        held_out, train = split_units(len(self.units.texts), config)
        torch.manual_seed(config.seed + PARTS.index(part))
        model = team.wrap(plan.model(part, len(self.indexer.vocabulary), self.units.size))
        bare = _bare(model)
        optimizer = training.optimizer_for(model, config)
        stopping = EarlyStopping(config.patience, config.keep_last_weights)
        first = 0
        current = state["current"]
        if current is not None and current["part"] == part:
            bare.load_state_dict(current["model"])
            optimizer.load_state_dict(current["optimizer"])
            stopping = EarlyStopping(**current["stopping"])
            first = current["epoch"] + 1
        captions, judged = self._captions(train), self._captions(held_out)
        for epoch in range(first, config.max_epochs):
            # Dropout: the same after a resume.
            torch.manual_seed(1_000_003 * config.seed + 1_009 * team.rank + epoch)
            sample = ""
            if part == LM:
                loss = self._lm_epoch(model, optimizer, captions, config, epoch)
                validation = self._lm_loss(bare, judged, config.lm_batch_size)
            else:
                loss = self._decoder_epoch(model, optimizer, captions, config, epoch)
                validation, sample = self._bleu(bare, held_out, config.decoder_batch_size)
            loss, validation = team.mean(loss, validation)
            stop = stopping.update(epoch, -validation if part == LM else validation, bare)
            row = {"part": part, "epoch": epoch, "train_loss": loss, "validation": validation, "sample": sample}
            state["history"].append(row)
            last = stop or epoch + 1 == config.max_epochs
            if last:
                state["finished"][part] = stopping.weights
                state["kept"][part] = stopping.kept_epoch
                state["current"] = None
            else:
                state["current"] = {
                    "part": part,
                    "epoch": epoch,
                    "model": bare.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "stopping": stopping.state(),
                }
            report(state)
            if last:
                return

    def _captions(self, rows: Sequence[int]) -> list[Caption]:
        """Every annotation of some units."""
        return [(row, words) for row in rows for words in self.words[row]]

    def _part(self, batch: Sequence[Caption]) -> tuple[Sequence[int], Sequence[list[int]], training.Share]:
        """This worker's part of a batch: rows, words, their weight; who gets none has a caption that weighs nothing."""
        mine = batch[self.team.rank :: self.team.workers]
        whole, own = ([words for _, words in captions] for captions in (batch, mine))
        rows, words = zip(*(mine or batch[:1]), strict=True)
        return rows, words, training.share_of(own, whole, self.team.workers)

    def _lm_epoch(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        captions: Sequence[Caption],
        config: TrainingConfig,
        epoch: int,
    ) -> float:
        def load(batch: list[Caption]) -> training.LMBatch:
            _, words, share = self._part(batch)
            return self._on_device(training.collate_lm(words, self.indexer, share))

        batches = training.shuffled_batches(captions, config.lm_batch_size, config.seed, epoch)
        return training.lm_epoch(model, optimizer, _ahead(load, batches), self.pad, config)

    def _lm_loss(self, model: nn.Module, captions: Sequence[Caption], batch_size: int) -> float:
        held = [words for _, words in captions]
        chunks = (training.collate_lm(chunk, self.indexer) for chunk in _chunks(held, batch_size))
        return training.lm_loss(model, map(self._on_device, chunks), self.pad)

    def _decoder_epoch(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        captions: Sequence[Caption],
        config: TrainingConfig,
        epoch: int,
    ) -> float:
        def load(batch: list[Caption]) -> training.DecoderBatch:
            rows, words, share = self._part(batch)
            longest = max(len(words) for _, words in batch)
            features = self.units.take(rows)
            return self._on_device(training.collate_decoder(features, words, self.indexer, longest, share))

        batches = training.shuffled_batches(captions, config.decoder_batch_size, config.seed, epoch)
        return training.decoder_epoch(model, optimizer, _ahead(load, batches), self.pad, config)

    def _bleu(self, model: nn.Module, rows: Sequence[int], batch_size: int) -> tuple[float, str]:
        """BLEU of greedy captions, and one of them."""
        assert isinstance(model, Decoder)
        captions = [
            caption
            for features in _ahead(self.units.take, _chunks(rows, batch_size))
            for caption in training.greedy_captions(model, features.to(self.team.device), self.indexer)
        ]
        statistics = bleu_statistics(captions, [self.units.texts[row] for row in rows])
        return float(bleu_values(statistics.sum(axis=0, keepdims=True), self.order)[0]), captions[0]

    def _on_device(self, batch: Collated) -> Collated:
        inputs, targets, share = batch
        return type(batch)(inputs.to(self.team.device), targets.to(self.team.device), share)


def _chunks(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    return (items[start : start + size] for start in range(0, len(items), size))


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


def _bare(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def epoch_line(row: Mapping[str, Any]) -> str:
    """One epoch of the history, for people."""
    done = f"epoch {row['epoch'] + 1}, loss {row['train_loss']:.2f}"
    if row["part"] == LM:
        return f"language model, {done}, held-out perplexity {np.exp(row['validation']):.1f}"
    return f"decoder, {done}, held-out BLEU {row['validation']:.1f}, says {row['sample']!r}"
