"""The attention decoder p(d|E): from a unit's k exemplar features to words (paper §3.1 and A.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from milan_ray.captioner.lm import LanguageModel
from milan_ray.captioner.products import Product
from milan_ray.captioner.text import TokenIds


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of the decoder; defaults are the paper's.

    Attributes:
        words: Number of words in the vocabulary, without special tokens.
        feature_size: Size F of one exemplar's feature.
        embedding_size: Size of a token's embedding.
        hidden_size: Size of the LSTM state.
        attention_hidden_size: Size of the attention's hidden layer; None means min(hidden_size, F).
        dropout: Dropout probability before the output layer during training.
    """

    words: int
    feature_size: int
    embedding_size: int = 128
    hidden_size: int = 512
    attention_hidden_size: int | None = None
    dropout: float = 0.5

    @property
    def ids(self) -> TokenIds:
        """The vocabulary's token ids."""
        return TokenIds(self.words)


class Attention(nn.Module):
    """Additive attention: softmax_k w·tanh(W_q h + W_k f_k)."""

    def __init__(self, query_size: int, key_size: int, hidden_size: int) -> None:
        super().__init__()
        self.query_to_hidden = nn.Linear(query_size, hidden_size)
        self.key_to_hidden = nn.Linear(key_size, hidden_size)
        self.output = nn.Sequential(nn.Linear(hidden_size, 1), nn.Softmax(dim=1))

    def forward(self, query: Tensor, keys: Tensor) -> Tensor:
        """Weights (…, k) of queries (…, hidden) over projected keys (…, k, attention hidden), which may broadcast."""
        hidden = (self.query_to_hidden(query).unsqueeze(-2) + keys).tanh_()
        return self.output(hidden.flatten(0, -3)).view(hidden.shape[:-1])


@dataclass(frozen=True)
class Decoded:
    """Decoded tokens with the decoder's output at every step.

    Attributes:
        tokens: Token ids (B, T).
        scores: Sum of the tokens' log-probabilities over *all* T steps (B,), including those after ``<stop>``.
        log_probs: Log-probabilities of all tokens at every step (B, T, V); with mutual information
            log p(d|E) − λ log p(d).
        attentions: Weights on the k exemplars (B, T, k).
    """

    tokens: Tensor
    scores: Tensor
    log_probs: Tensor
    attentions: Tensor


class Decoder(nn.Module):
    """LSTM with attention over the exemplars; its parameters have the reference's names.

    The LSTM's input is [embedding, gated context], and its weight is split accordingly. The embedding half does not
    depend on the state, so a search projects the whole vocabulary once (:meth:`token_gates`).
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        features, hidden = config.feature_size, config.hidden_size
        self.config = config
        self.init_h = nn.Sequential(nn.Linear(features, hidden), nn.Tanh())
        self.init_c = nn.Sequential(nn.Linear(features, hidden), nn.Tanh())
        self.embedding = nn.Embedding(config.ids.total, config.embedding_size)
        self.attend = Attention(hidden, features, config.attention_hidden_size or min(hidden, features))
        self.feature_gate = nn.Sequential(nn.Linear(hidden, features), nn.Sigmoid())
        self.lstm = nn.LSTMCell(config.embedding_size + features, hidden)
        self.output = nn.Sequential(
            nn.Dropout(config.dropout), nn.Linear(hidden, config.ids.total), nn.LogSoftmax(dim=-1)
        )

    def initial_state(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(h, c), each (B, hidden), from features (B, k, F)."""
        mean = features.mean(dim=1)
        return self.init_h(mean), self.init_c(mean)

    def input_weights(self) -> tuple[Tensor, Tensor]:
        """The LSTM's input weight as (4·hidden, embedding) and (4·hidden, F)."""
        embedding, context = self.lstm.weight_ih.split([self.config.embedding_size, self.config.feature_size], dim=1)
        return embedding, context

    def token_gates(self) -> Tensor:
        """The part of the LSTM's gates that depends on the token, for every token: (V, 4·hidden)."""
        return F.linear(self.embedding.weight, self.input_weights()[0], self.lstm.bias_ih)

    def state_gates(self, h: Tensor, context: Tensor, weight: Tensor) -> Tensor:
        """The part of the LSTM's gates that depends on the state.

        Args:
            h: Hidden state (R, hidden).
            context: Attention-weighted features (R, F).
            weight: The context half of :meth:`input_weights`.

        Returns:
            (R, 4·hidden).
        """
        hidden = F.linear(h, self.lstm.weight_hh, self.lstm.bias_hh)
        return hidden + F.linear(context * self.feature_gate(h), weight)

    @staticmethod
    def cell(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """The LSTM's non-linear part: sum of gates (R, 4·hidden) and cell state (R, hidden) → (h, c)."""
        i, f, g, o = gates.chunk(4, dim=1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c

    def step(
        self, features: Tensor, keys: Tensor, h: Tensor, c: Tensor, token_gates: Tensor, context_weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One decoding step of every unit; returns the new state (h, c) and the attention weights (B, k)."""
        weights = self.attend(h, keys)
        context = torch.bmm(weights.unsqueeze(1), features).squeeze(1)
        h, c = self.cell(self.state_gates(h, context, context_weight) + token_gates, c)
        return h, c, weights

    def forward(self, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Predicts given tokens (teacher forcing): targets[:, t] from targets[:, :t].

        Args:
            features: (B, k, F).
            targets: Token ids (B, T), without ``<start>``.

        Returns:
            Log-probabilities (B, T, V) and attention weights (B, T, k).
        """
        h, c = self.initial_state(features)
        keys = self.attend.key_to_hidden(features)
        token_weight, context_weight = self.input_weights()
        inputs = torch.cat([targets.new_full((len(targets), 1), self.config.ids.start), targets[:, :-1]], dim=1)
        token_gates = F.linear(self.embedding(inputs), token_weight, self.lstm.bias_ih)
        states, attentions = [], []
        for t in range(targets.shape[1]):
            h, c, weights = self.step(features, keys, h, c, token_gates[:, t], context_weight)
            states.append(h)
            attentions.append(weights)
        return self.output(torch.stack(states, dim=1)), torch.stack(attentions, dim=1)


class DecoderProducts:
    """The matrix products of a decoder, which is not in training.

    Attributes:
        query: Hidden state → the attention's hidden layer.
        keys: Feature → the attention's hidden layer.
        gate: Hidden state → the gate of the context, before its sigmoid.
        hidden: Hidden state → its part of the LSTM's gates.
        context: Gated context → its part of the LSTM's gates.
        output: Hidden state → scores of the next token, before the softmax.
        token_gates: Of every token, its part of the LSTM's gates (V, 4·hidden).
    """

    def __init__(self, decoder: Decoder) -> None:
        """Takes the weights as they are now."""
        self.query, self.keys = Product.of(decoder.attend.query_to_hidden), Product.of(decoder.attend.key_to_hidden)
        self.gate, self.output = Product.of(decoder.feature_gate), Product.of(decoder.output)
        self.hidden = Product(decoder.lstm.weight_hh.detach(), decoder.lstm.bias_hh.detach())
        token_weight, context_weight = (weight.detach() for weight in decoder.input_weights())
        self.context = Product(context_weight)
        self.token_gates = Product(token_weight, decoder.lstm.bias_ih.detach())(decoder.embedding.weight.detach())

    def state_gates(self, h: Tensor, context: Tensor) -> Tensor:
        """The part of the LSTM's gates that depends on the state, as :meth:`Decoder.state_gates`: (R, 4·hidden).

        Args:
            h: Hidden state (R, hidden).
            context: Attention-weighted features (R, F); overwritten.
        """
        return self.hidden(h).add_(self.context(context.mul_(self.gate(h).sigmoid_())))


@torch.no_grad()
def decode_forced(
    decoder: Decoder, features: Tensor, targets: Tensor, lm: LanguageModel | None = None, lam: float = 0.2
) -> Decoded:
    """Scores given tokens; with a language model by log p(d|E) − λ log p(d), token by token.

    Args:
        decoder: The decoder.
        features: (B, k, F).
        targets: Token ids (B, T), without ``<start>``.
        lm: The language model; None scores by log p(d|E).
        lam: λ.
    """
    log_probs, attentions = decoder(features, targets)
    if lm is not None:
        start = targets.new_full((len(targets), 1), decoder.config.ids.start)
        log_probs = log_probs - lam * lm(torch.cat([start, targets[:, :-1]], dim=1))
    scores = log_probs.gather(2, targets.unsqueeze(2)).squeeze(2).sum(dim=1)
    return Decoded(targets, scores, log_probs, attentions)


@torch.no_grad()
def decode_stepwise(
    decoder: Decoder,
    features: Tensor,
    length: int = 15,
    lm: LanguageModel | None = None,
    lam: float = 0.2,
    sample: bool = False,
    generator: torch.Generator | None = None,
) -> Decoded:
    """Greedy decoding or ancestral sampling with exactly ``length`` steps, as in the reference.

    Args:
        decoder: The decoder.
        features: (B, k, F).
        length: Number of steps.
        lm: If given, λ log p(next token) is subtracted from every prediction.
        lam: λ.
        sample: Whether to sample from the (renormalised) predictions instead of taking the most likely token.
        generator: Random generator; torch's global one by default.
    """
    h, c = decoder.initial_state(features)
    keys = decoder.attend.key_to_hidden(features)
    token_gates, context_weight = decoder.token_gates(), decoder.input_weights()[1]
    token = torch.full((len(features),), decoder.config.ids.start, device=features.device)
    lm_state = None
    tokens, predictions, attentions = [], [], []
    for _ in range(length):
        h, c, weights = decoder.step(features, keys, h, c, token_gates[token], context_weight)
        log_probs = decoder.output(h)
        if lm is not None:
            lm_log_probs, lm_state = lm.step(token, lm_state)
            log_probs = log_probs - lam * lm_log_probs
        if sample:  # unit by unit, so that a seed gives the same samples as in the reference
            samples = (torch.multinomial(row, 1, generator=generator) for row in log_probs.softmax(dim=1))
            token = torch.cat([token[:0], *samples])
        else:
            token = log_probs.argmax(dim=1)
        tokens.append(token)
        predictions.append(log_probs)
        attentions.append(weights)
    chosen, log_probs = torch.stack(tokens, dim=1), torch.stack(predictions, dim=1)
    scores = log_probs.gather(2, chosen.unsqueeze(2)).squeeze(2).sum(dim=1)
    return Decoded(chosen, scores, log_probs, torch.stack(attentions, dim=1))
