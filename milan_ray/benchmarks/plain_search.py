"""Beam search and re-ranking as the reference does them, for comparison only.

Nothing is shared between beams or steps: every beam has a copy of the features, attention keys are projected again at
every step, finished beams continue to run, and the language model reads every beam from the start.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from milan_ray.captioner.decoder import Decoder
from milan_ray.captioner.lm import LanguageModel


@dataclass(frozen=True)
class PlainBeams:
    """Results of the search for B units, the most likely first.

    Attributes:
        tokens: Token ids (B, beam, L), ``<stop>`` after the first ``<stop>``.
        logp_d_given_e: (B, beam), nats.
        logp_d: log p(d) through ``<stop>`` (B, beam), nats.
    """

    tokens: Tensor
    logp_d_given_e: Tensor
    logp_d: Tensor


@torch.no_grad()
def plain_rerank(
    decoder: Decoder, lm: LanguageModel, features: Tensor, beam_size: int = 50, length: int = 15
) -> PlainBeams:
    """Runs a beam search for features (B, k, F) and scores each beam by the language model."""
    stop, units = decoder.config.ids.stop, len(features)
    h, c = decoder.initial_state(features)
    last = torch.full((units,), decoder.config.ids.start, device=features.device)
    log_probs, h, c = _step(decoder, features, last, h, c)
    scores, last = log_probs.topk(beam_size)
    tokens = last.unsqueeze(2)
    features, h, c = (state.repeat_interleave(beam_size, dim=0) for state in (features, h, c))
    for _ in range(length - 1):
        if (last == stop).all():
            break
        log_probs, h, c = _step(decoder, features, last.flatten(), h, c)
        log_probs = log_probs.view(units, beam_size, -1)
        finished = torch.full_like(log_probs[0, 0], torch.finfo(log_probs.dtype).min)
        finished[stop] = 0
        log_probs = torch.where((last == stop).unsqueeze(2), finished, log_probs)
        best, choices = log_probs.topk(beam_size)
        scores, chosen = (scores.unsqueeze(2) + best).flatten(1).topk(beam_size)
        last = choices.flatten(1).gather(1, chosen)
        parent = chosen // beam_size
        rows = (parent + beam_size * torch.arange(units, device=parent.device).unsqueeze(1)).flatten()
        features, h, c = features[rows], h[rows], c[rows]
        tokens = torch.cat([tokens.flatten(0, 1)[rows].view(units, beam_size, -1), last.unsqueeze(2)], dim=2)
    return PlainBeams(tokens, scores, _logp(lm, tokens.flatten(0, 1)).view(units, beam_size))


def _step(decoder: Decoder, features: Tensor, token: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns log-probabilities (R, V) and state after one more token of R beams, from features (R, k, F)."""
    weights = decoder.attend(h, decoder.attend.key_to_hidden(features))
    context = (weights.unsqueeze(2) * features).sum(dim=1) * decoder.feature_gate(h)
    h, c = decoder.lstm(torch.cat([decoder.embedding(token), context], dim=1), (h, c))
    return decoder.output(h), h, c


def _logp(lm: LanguageModel, tokens: Tensor) -> Tensor:
    """Computes log p(d) of N sequences (N, L), up to and including the first ``<stop>``: (N,)."""
    inputs = F.pad(tokens, (1, 0), value=lm.config.ids.start)
    log_probs = lm(inputs[:, :-1]).gather(2, tokens.unsqueeze(2)).squeeze(2)
    stopped = (inputs[:, :-1] == lm.config.ids.stop).cumsum(dim=1) > 0
    return log_probs.masked_fill(stopped, 0).sum(dim=1)
