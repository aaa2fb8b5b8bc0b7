"""Training decoder and language model: losses, epochs, early stopping (paper A.3; REFERENCE §4, §5.2).

Plain functions over batches; who streams the batches and on how many machines is the pipeline's business. Models may
be wrapped in ``DistributedDataParallel``: they are only ever called, never looked into.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from milan_ray.captioner.decoder import Decoder, decode_stepwise
from milan_ray.captioner.text import Indexer
from milan_ray.config import TrainingConfig

T = TypeVar("T")


class DecoderBatch(NamedTuple):
    """One batch for the decoder: exemplar features (B, k, F) and the caption's ids (B, T), stopped and padded."""

    features: Tensor
    targets: Tensor


class LMBatch(NamedTuple):
    """One batch for the language model: ``<start>`` w₁…wₙ and w₁…wₙ ``<stop>``, ids (B, T), both padded."""

    inputs: Tensor
    targets: Tensor


def collate_decoder(features: Tensor, words: Sequence[Sequence[int]], indexer: Indexer) -> DecoderBatch:
    """A decoder batch of features (B, k, F) and captions as word ids; as long as its own longest caption."""
    return DecoderBatch(features, torch.tensor(indexer.frame(words, start=False)))


def collate_lm(words: Sequence[Sequence[int]], indexer: Indexer) -> LMBatch:
    """A language model batch of captions as word ids; as long as its own longest caption."""
    inputs, targets = indexer.frame(words, stop=False), indexer.frame(words, start=False)
    return LMBatch(torch.tensor(inputs), torch.tensor(targets))


def shuffled_batches(items: Sequence[T], batch_size: int, seed: int, epoch: int) -> Iterator[list[T]]:
    """All items once, in an order that depends on (seed, epoch) alone."""
    order = np.random.default_rng((seed, epoch)).permutation(len(items))
    for start in range(0, len(items), batch_size):
        yield [items[i] for i in order[start : start + batch_size]]


def token_loss(log_probs: Tensor, targets: Tensor, pad: int) -> Tensor:
    """Mean negative log-likelihood per token that is not ``<pad>``, nats.

    Args:
        log_probs: (B, T, V).
        targets: Ids (B, T).
        pad: Id of ``<pad>``.
    """
    return F.nll_loss(log_probs.flatten(0, 1), targets.flatten(), ignore_index=pad)


def attention_regularizer(attentions: Tensor) -> Tensor:
    """Mean over units and exemplars of (1 − Σ_t a)²: over a caption, every exemplar should be looked at once.

    Args:
        attentions: (B, T, k); t runs over all steps of the batch, padding included, as in the reference.
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
        log_probs, attentions = model(*batch)
        return token_loss(log_probs, batch.targets, pad) + config.regularization_weight * attention_regularizer(
            attentions
        )

    return _train(model, optimizer, batches, loss)


def lm_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[LMBatch], pad: int) -> float:
    """Trains a language model for one epoch; returns the mean loss over batches."""
    return _train(model, optimizer, batches, lambda batch: token_loss(model(batch.inputs), batch.targets, pad))


def _train(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[T], loss_of: Callable[[T], Tensor]
) -> float:
    model.train()
    losses = []
    for batch in batches:
        loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return float(torch.stack(losses).mean()) if losses else float("nan")


@torch.no_grad()
def decoder_loss(model: nn.Module, batches: Iterable[DecoderBatch], pad: int) -> float:
    """Validation loss of a decoder: mean token loss over batches, without the regulariser."""
    model.eval()
    losses = [token_loss(model(*batch)[0], batch.targets, pad) for batch in batches]
    return float(torch.stack(losses).mean()) if losses else float("nan")


@torch.no_grad()
def lm_loss(model: nn.Module, batches: Iterable[LMBatch], pad: int) -> float:
    """Validation loss of a language model: mean token loss over batches."""
    model.eval()
    losses = [token_loss(model(batch.inputs), batch.targets, pad) for batch in batches]
    return float(torch.stack(losses).mean()) if losses else float("nan")


def greedy_captions(decoder: Decoder, features: Tensor, indexer: Indexer, length: int = 15) -> list[str]:
    """Greedy captions from features (B, k, F), for BLEU on the validation units; leaves the decoder in eval mode."""
    decoder.eval()
    return [indexer.reconstruct(row) for row in decode_stepwise(decoder, features, length).tokens.tolist()]


@dataclass
class EarlyStopping:
    """Remembers the best epoch, with its weights, and says when to stop.

    Attributes:
        patience: Epochs without improvement that are forgiven; the next one stops training.
        keep_last: Keep the last epoch's weights instead, as the reference does by mistake (a quirk).
        best: The best metric so far; larger is better.
        best_epoch: The epoch it was reached in.
        bad: Epochs since.
        weights: The weights to keep, on the CPU.
    """

    patience: int = 4
    keep_last: bool = False
    best: float = -float("inf")
    best_epoch: int = -1
    bad: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)

    def update(self, epoch: int, metric: float, model: nn.Module) -> bool:
        """Takes in one epoch's metric (larger is better) and weights; returns whether to stop.

        Args:
            epoch: The epoch's number.
            metric: BLEU, or a negated loss. NaN never counts as an improvement.
            model: The model as it is now, not wrapped.
        """
        improved = metric > self.best
        if improved:
            self.best, self.best_epoch, self.bad = metric, epoch, 0
        else:
            self.bad += 1
        if improved or self.keep_last or not self.weights:
            self.weights = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
        return self.bad > self.patience

    def restore(self, model: nn.Module) -> None:
        """Puts the kept weights into the model."""
        model.load_state_dict(self.weights)

    def state(self) -> dict[str, Any]:
        """Everything needed to resume: plain numbers and tensors; ``EarlyStopping(**state)`` is the way back."""
        return dict(vars(self))
