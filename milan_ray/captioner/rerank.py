"""Re-ranking of beams by weighted pointwise mutual information: log p(d|E) − λ log p(d) (paper eq. 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from milan_ray.captioner.beam import Beams
from milan_ray.captioner.lm import LanguageModel
from milan_ray.captioner.quirks import NO_QUIRKS, Quirks
from milan_ray.captioner.text import breaks_off

Values = TypeVar("Values", np.ndarray, Tensor)

CHOICE_VERSION = 2
"""Version of how a description is chosen among candidates and written; 1 is the reference's."""


def rescore(logp_d_given_e: Values, logp_d: Values, lam: float) -> Values:
    """Log p(d|E) − λ log p(d), nats, for log-probabilities of equal shapes."""
    return logp_d_given_e - lam * logp_d


def contrast(scores: np.ndarray, contrasted: np.ndarray, mu: float) -> np.ndarray:
    """Scores less μ log p(d|C), nats, for arrays of one shape; NaN, where there are no contrasts, subtracts nothing."""
    return np.asarray(scores - mu * np.nan_to_num(contrasted, nan=0.0))


def complete(texts: Sequence[str], finished: np.ndarray) -> np.ndarray:
    """Whether a unit's candidates are whole descriptions: they reached ``<stop>``, and do not break off; bool (N,)."""
    whole: np.ndarray = finished & ~np.fromiter(map(breaks_off, texts), bool, len(texts))
    return whole


def choice_order(scores: np.ndarray, texts: Sequence[str], finished: np.ndarray) -> np.ndarray:
    """Sorts a unit's candidates: complete ones first, then by descending score; ties keep their order.

    Re-ranking prefers what the language model finds unlikely, and a sentence that breaks off is that: without this
    rule, "The top of the" wins over "The top of the heads".

    Args:
        scores: Scores (N,).
        texts: Texts (N).
        finished: Whether each reached ``<stop>``, bool (N,).

    Returns:
        Places of the candidates, best first (N,).
    """
    return np.lexsort((-scores, ~complete(texts, finished)))


def counted_length(tokens: Tensor, stop: int, steps: Tensor, quirks: Quirks = NO_QUIRKS) -> Tensor:
    """The number of tokens of each sequence that log p(d) includes: up to the first ``<stop>``, or all without one.

    Args:
        tokens: Token ids (..., L).
        stop: Id of ``<stop>``.
        steps: Length of each sequence, with padding; broadcasts with tokens' leading axes.
        quirks: With ``lm_counts_past_stop``, one token more where the sequence has one.

    Returns:
        Lengths (...).
    """
    before_stop = ((tokens == stop).cumsum(dim=-1) == 0).sum(dim=-1)
    return torch.minimum(before_stop + (2 if quirks.lm_counts_past_stop else 1), steps.expand_as(before_stop))


def beam_logp(lm: LanguageModel, beams: Beams, quirks: Quirks = NO_QUIRKS) -> Tensor:
    """Log p(d) of every beam, nats: (B, beam)."""
    steps = beams.steps
    if quirks.batch_dependent_length:
        steps = torch.full_like(steps, beams.tokens.shape[2])
    lengths = counted_length(beams.tokens, lm.config.ids.stop, steps.unsqueeze(1), quirks)
    return lm.sequence_logp(beams.tokens.flatten(0, 1), lengths.flatten()).view_as(beams.scores)
