"""Training of decoder and language model: losses, epochs, early stopping (paper A.3).

Plain functions over batches; :mod:`milan_ray.captioner.fit` makes the batches and runs the epochs. Models may be
wrapped in ``DistributedDataParallel``: the functions only call them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from milan_ray.captioner.decoder import Decoder, decode_stepwise
from milan_ray.captioner.text import Indexer
from milan_ray.config import TrainingConfig
from milan_ray.device import to_device

T = TypeVar("T")


class Share(NamedTuple):
    """The share of one worker's part in a batch, times the number of workers; 1 for a whole batch.

    It weights the worker's loss, because workers average their gradients but have different numbers of tokens.

    Attributes:
        tokens: Weight of the mean over tokens.
        captions: Weight of the mean over captions.
    """

    tokens: float
    captions: float


WHOLE = Share(1.0, 1.0)
"""The share of a whole batch."""


class DecoderBatch(NamedTuple):
    """A batch for the decoder: features (B, k, F) and captions as ids (B, T), with ``<stop>`` and padding."""

    features: Tensor
    targets: Tensor
    share: Share = WHOLE


class LMBatch(NamedTuple):
    """A batch for the language model: ``<start>`` w₁…wₙ and w₁…wₙ ``<stop>``, ids (B, T), both padded, on the CPU."""

    inputs: Tensor
    targets: Tensor
    share: Share = WHOLE


def collate_decoder(
    features: Tensor,
    words: Sequence[Sequence[int]],
    indexer: Indexer,
    length: int | None = None,
    share: Share = WHOLE,
) -> DecoderBatch:
    """A decoder batch of features (B, k, F) and captions as word ids.

    Args:
        features: Features of each caption's unit.
        words: Captions.
        indexer: Adds the special tokens.
        length: Words of the longest caption of the whole batch, on which the regulariser depends; by default of these
            captions.
        share: Share of this part in the batch.
    """
    return DecoderBatch(features, torch.tensor(indexer.frame(words, start=False, length=length)), share)


def collate_lm(words: Sequence[Sequence[int]], indexer: Indexer, share: Share = WHOLE) -> LMBatch:
    """A language model batch of captions as word ids, padded to the longest; ``share`` is its share in the batch."""
    inputs, targets = indexer.frame(words, stop=False), indexer.frame(words, start=False)
    return LMBatch(torch.tensor(inputs), torch.tensor(targets), share)


def shuffled_batches(items: Sequence[T], batch_size: int, seed: int, epoch: int) -> Iterator[list[T]]:
    """Batches of all items, in an order that depends only on (seed, epoch)."""
    order = np.random.default_rng((seed, epoch)).permutation(len(items))
    for start in range(0, len(items), batch_size):
        yield [items[i] for i in order[start : start + batch_size]]


def share_of(words: Sequence[Sequence[int]], batch: Sequence[Sequence[int]], workers: int) -> Share:
    """The share of a worker's captions in the whole batch."""

    def tokens(captions: Sequence[Sequence[int]]) -> int:
        return sum(len(caption) + 1 for caption in captions)  # with <stop>

    return Share(workers * tokens(words) / tokens(batch), workers * len(words) / len(batch))


def token_loss(log_probs: Tensor, targets: Tensor, pad: int) -> Tensor:
    """Mean negative log-likelihood per token that is not ``<pad>``, nats.

    Args:
        log_probs: (B, T, V).
        targets: Ids (B, T).
        pad: Id of ``<pad>``.
    """
    return F.nll_loss(log_probs.flatten(0, 1), targets.flatten(), ignore_index=pad)


def attention_regularizer(attentions: Tensor) -> Tensor:
    """Mean over units and exemplars of (1 − Σ_t a)²: the attention on each exemplar should sum to 1 over a caption.

    Args:
        attentions: (B, T, k); t runs over all steps of the batch, including padding, as in the reference.
    """
    return (1 - attentions.sum(dim=1)).square().mean()


def optimizer_for(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """The optimiser of the paper."""
    return torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)


def decoder_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[DecoderBatch],
    pad: int,
    config: TrainingConfig,
) -> float:
    """Trains a decoder for one epoch; returns the mean loss over batches, regulariser included."""

    def loss(batch: DecoderBatch) -> Tensor:
        log_probs, attentions = model(batch.features, batch.targets)
        regularizer = attention_regularizer(attentions.float())
        return (
            batch.share.tokens * token_loss(log_probs.float(), batch.targets, pad)
            + batch.share.captions * config.regularization_weight * regularizer
        )

    return _train(model, optimizer, batches, loss, config.bf16)


def lm_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[LMBatch], pad: int, config: TrainingConfig
) -> float:
    """Trains a language model for one epoch; returns the mean loss over batches."""

    def loss(batch: LMBatch) -> Tensor:
        log_probs, targets = _lm_predictions(model, batch, pad)
        return batch.share.tokens * F.nll_loss(log_probs.float(), targets)

    return _train(model, optimizer, batches, loss, config.bf16)


def _lm_predictions(model: nn.Module, batch: LMBatch, pad: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities (N, V) and targets (N,) of all tokens but padding, which can be 90 % of a batch."""
    # Packed on the host, where the lengths are: on a GPU it would have to be asked for them.
    lengths, device = (batch.targets != pad).sum(dim=1), next(model.parameters()).device
    inputs, targets = (
        pack_padded_sequence(ids, lengths, batch_first=True, enforce_sorted=False)
        for ids in (batch.inputs, batch.targets)
    )
    return model(PackedSequence(to_device(inputs.data, device), inputs.batch_sizes)), to_device(targets.data, device)


def _train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[T],
    loss_of: Callable[[T], Tensor],
    bf16: bool,
) -> float:
    model.train()
    device = next(model.parameters()).device.type
    losses = []
    for batch in batches:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return float(torch.stack(losses).mean()) if losses else float("nan")


@torch.no_grad()
def lm_loss(model: nn.Module, batches: Iterable[LMBatch], pad: int) -> float:
    """Validation loss of a language model: mean over all tokens, nats; exp of it is the perplexity."""
    model.eval()
    losses, tokens = [], 0
    for batch in batches:
        log_probs, targets = _lm_predictions(model, batch, pad)
        losses.append(F.nll_loss(log_probs, targets, reduction="sum"))
        tokens += len(targets)
    return sum(torch.stack(losses).tolist()) / tokens if tokens else float("nan")


@torch.no_grad()
def decoder_loss(model: nn.Module, batches: Iterable[DecoderBatch], pad: int) -> float:
    """Validation loss of a decoder: mean over all tokens, nats, without the regulariser."""
    model.eval()
    losses, tokens = [], 0
    for batch in batches:
        count = int((batch.targets != pad).sum())
        losses.append(token_loss(model(batch.features, batch.targets)[0], batch.targets, pad) * count)
        tokens += count
    return sum(torch.stack(losses).tolist()) / tokens if tokens else float("nan")


def greedy_captions(decoder: Decoder, features: Tensor, indexer: Indexer, length: int = 15) -> list[str]:
    """Greedy captions of features (B, k, F), for validation BLEU; leaves the decoder in eval mode."""
    decoder.eval()
    return [indexer.reconstruct(row) for row in decode_stepwise(decoder, features, length).tokens.tolist()]


@dataclass
class EarlyStopping:
    """Keeps the weights of the best epoch, and tells when to stop.

    Attributes:
        patience: Epochs without improvement that are tolerated; the next one stops training.
        keep_last: Whether to keep the last epoch's weights instead, as the reference does by mistake (a quirk).
        best: The best metric so far; larger is better.
        kept_epoch: The epoch whose weights are kept.
        bad: Epochs since the best one.
        weights: The kept weights, on the CPU.
    """

    patience: int = 4
    keep_last: bool = False
    best: float = -float("inf")
    kept_epoch: int = -1
    bad: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)

    def update(self, epoch: int, metric: float, model: nn.Module) -> bool:
        """Adds an epoch's metric and weights; returns whether to stop.

        Args:
            epoch: The epoch's number.
            metric: BLEU, or a negated loss: larger is better. NaN is never an improvement.
            model: The model after the epoch, not wrapped.
        """
        improved = metric > self.best
        if improved:
            self.best, self.bad = metric, 0
        else:
            self.bad += 1
        if improved or self.keep_last or not self.weights:
            self.kept_epoch = epoch
            self.weights = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
        return self.bad > self.patience

    def restore(self, model: nn.Module) -> None:
        """Loads the kept weights into the model."""
        model.load_state_dict(self.weights)

    def state(self) -> dict[str, Any]:
        """The state as plain numbers and tensors; ``EarlyStopping(**state)`` restores it."""
        return dict(vars(self))
