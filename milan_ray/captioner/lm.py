"""The language model p(d): how likely a description is for any unit (paper §3.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from milan_ray.captioner.products import Product
from milan_ray.captioner.text import TokenIds

LMState = tuple[Tensor, Tensor]
"""Hidden and cell state of every layer, each (layers, R, hidden)."""


@dataclass(frozen=True)
class LMConfig:
    """Sizes of the language model; defaults are the paper's.

    Attributes:
        words: Number of words in the vocabulary, without special tokens.
        embedding_size: Size of a token's embedding.
        hidden_size: Size of each LSTM layer.
        layers: LSTM layers.
        dropout: Dropout probability between LSTM layers during training.
    """

    words: int
    embedding_size: int = 128
    hidden_size: int = 512
    layers: int = 2
    dropout: float = 0.5

    @property
    def ids(self) -> TokenIds:
        """The vocabulary's token ids."""
        return TokenIds(self.words)


class LanguageModel(nn.Module):
    """Embedding, LSTM, linear, log-softmax; parameters have the reference's names."""

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.ids.total, config.embedding_size, padding_idx=config.ids.pad)
        self.lstm = nn.LSTM(
            config.embedding_size, config.hidden_size, config.layers, dropout=config.dropout, batch_first=True
        )
        self.output = nn.Sequential(nn.Linear(config.hidden_size, config.ids.total), nn.LogSoftmax(dim=-1))

    def forward(self, inputs: Tensor | PackedSequence) -> Tensor:
        """Log-probabilities of every next token.

        Args:
            inputs: Token ids (B, T), beginning with ``<start>``; or N ids of sequences of different lengths, packed.

        Returns:
            (B, T, V): [b, t] is log p(· | inputs[b, :t+1]). Of a packed sequence (N, V), in its order.
        """
        if isinstance(inputs, PackedSequence):
            return self.output(self.lstm(inputs._replace(data=self.embedding(inputs.data)))[0].data)
        return self.output(self.lstm(self.embedding(inputs))[0])

    def step(
        self, tokens: Tensor, state: LMState | None = None, output: Product | None = None
    ) -> tuple[Tensor, LMState]:
        """One step: token ids (R,) and the state before them → log-probabilities (R, V) and the state after.

        Args:
            tokens: Token ids.
            state: The state; None before the first token.
            output: The product of the linear output layer, where many steps share it.
        """
        hidden, state = self.lstm(self.embedding(tokens).unsqueeze(1), state)
        hidden = hidden.squeeze(1)
        return (self.output(hidden) if output is None else F.log_softmax(output(hidden), dim=1)), state

    @torch.no_grad()
    def sequence_logp(self, tokens: Tensor, lengths: Tensor, skip: bool | None = None) -> Tensor:
        """Log p of sequences: Σ_t log p(tokens[t] | tokens[:t]) over t < length, nats (N,).

        Args:
            tokens: Token ids (N, T), without ``<start>``.
            lengths: Number of tokens to score (N,), at most T.
            skip: Whether to compute each distinct prefix once, as beams share most of theirs; the host then waits for
                the device at each token, for their number. None does so on a CPU only.
        """
        if not (tokens.device.type == "cpu" if skip is None else skip):
            return self._sequence_logp_of_all(tokens, lengths)
        total = torch.zeros(len(tokens), device=tokens.device)
        row = torch.zeros(len(tokens), dtype=torch.long, device=tokens.device)
        output = Product.of(self.output)
        log_probs, state = self.step(row.new_tensor([self.config.ids.start]), None, output)
        for t in range(int(lengths.max()) if len(tokens) else 0):
            active = (lengths > t).nonzero().squeeze(1)
            total[active] += log_probs[row[active], tokens[active, t]]
            active = active[lengths[active] > t + 1]
            prefixes, row[active] = torch.unique(
                row[active] * self.config.ids.total + tokens[active, t], return_inverse=True
            )
            parents, last = prefixes // self.config.ids.total, prefixes % self.config.ids.total
            if len(prefixes):
                log_probs, state = self.step(last, (state[0][:, parents], state[1][:, parents]), output)
        return total

    def _sequence_logp_of_all(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """The result of :meth:`sequence_logp` from all tokens of all sequences: no size depends on their values."""
        total = torch.zeros(len(tokens), device=tokens.device)
        last, state = torch.full_like(lengths, self.config.ids.start), None
        for t in range(tokens.shape[1]):
            log_probs, state = self.step(last, state)
            last = tokens[:, t]
            total += log_probs.gather(1, last[:, None])[:, 0].masked_fill(lengths <= t, 0)
        return total
