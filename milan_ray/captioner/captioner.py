"""The captioner: vocabulary, decoder and language model, from exemplar features to descriptions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from milan_ray.captioner.beam import Beams, beam_search
from milan_ray.captioner.decoder import Decoder, decode_forced, decode_stepwise
from milan_ray.captioner.encoder import PyramidEncoder, get_encoder
from milan_ray.captioner.lm import LanguageModel
from milan_ray.captioner.quirks import NO_QUIRKS, Quirks
from milan_ray.captioner.rerank import beam_logp, choice_order, counted_length, rescore
from milan_ray.captioner.text import Indexer, readable
from milan_ray.device import resolve_device, to_device
from milan_ray.errors import MilanError, unknown_name

STRATEGIES = ("greedy", "sample", "beam", "rerank")


@dataclass(frozen=True)
class Candidates:
    """The descriptions that a beam search finds for B units, the most likely first.

    Attributes:
        tokens: Token ids of every beam, [unit][beam], including ``<stop>`` when finished.
        finished: Whether the beam reached ``<stop>``, bool (B, beam).
        logp_d_given_e: The score of the search, nats, float32 (B, beam), descending: log p(d|E), or with mutual
            information in the search log p(d|E) − λ log p(d).
        logp_d: log p(d), nats, float32 (B, beam); None without a language model.
        texts: The descriptions, [unit][beam], as the reference joins their tokens.
    """

    tokens: list[list[list[int]]]
    finished: np.ndarray
    logp_d_given_e: np.ndarray
    logp_d: np.ndarray | None
    texts: list[list[str]]

    def scores(self, lam: float) -> np.ndarray:
        """Log p(d|E) − λ log p(d), float32 (B, beam); log p(d|E) alone when λ is 0.

        Raises:
            MilanError: λ is not 0 and there is no log p(d).
        """
        if lam == 0:
            return self.logp_d_given_e
        if self.logp_d is None:
            raise MilanError(f"re-ranking with λ = {lam} needs a language model and this captioner has none; use λ = 0")
        return rescore(self.logp_d_given_e, self.logp_d, lam)

    def likelihood(self, mi_lam: float | None) -> np.ndarray:
        """Log p(d|E), float32 (B, beam), of a search with mutual information and this λ, or without it (None)."""
        if mi_lam is None or self.logp_d is None:
            return self.logp_d_given_e
        return self.logp_d_given_e + mi_lam * self.logp_d

    def order(self, lam: float) -> np.ndarray:
        """Beam indices by descending score, (B, beam); ties stay in beam order."""
        return np.argsort(-self.scores(lam), axis=1, kind="stable")


@dataclass(frozen=True)
class Description:
    """One description of one unit.

    Attributes:
        text: The description.
        score: log p(d|E) − λ log p(d), nats.
        logp_d_given_e: log p(d|E), nats.
        logp_d: log p(d), nats; None without a language model.
    """

    text: str
    score: float
    logp_d_given_e: float
    logp_d: float | None


@dataclass(frozen=True)
class Decoding:
    """The descriptions of B units by one strategy, with intermediate results.

    Attributes:
        texts: One description per unit.
        tokens: Its token ids (B, T).
        scores: Its score (B,), nats: for "rerank" log p(d|E) − λ log p(d), otherwise the sum of its tokens'
            log-probabilities (including those after ``<stop>``, except with a beam search).
        log_probs: Log-probabilities of all tokens at every step (B, T, V); None with a beam search.
        attentions: Weights on the k exemplars (B, T, k); None with a beam search.
        beams: All beams with their search scores; None without a beam search.
        beam_texts: Their descriptions, [unit][beam]; None without a beam search.
    """

    texts: list[str]
    tokens: Tensor
    scores: Tensor
    log_probs: Tensor | None = None
    attentions: Tensor | None = None
    beams: Beams | None = None
    beam_texts: list[list[str]] | None = None


@dataclass(frozen=True, eq=False)
class Captioner:
    """A trained captioner.

    Attributes:
        indexer: The vocabulary.
        decoder: p(d|E).
        lm: p(d), over the same vocabulary; None for a captioner that only ranks by p(d|E).
        encoder_name: Registered name of the encoder whose features the decoder was trained on.
        encoder_state: The weights of the encoder's backbone, if stored with the captioner.
        length: Maximum tokens of a description, ``<stop>`` included.
        beam_size: Beams per unit.
        lam: λ.
        strategy: Default strategy of :meth:`decode`; None means "rerank" with a language model and "beam" without.
            :meth:`describe` always re-ranks the candidates of a beam search.
    """

    indexer: Indexer
    decoder: Decoder
    lm: LanguageModel | None
    encoder_name: str
    encoder_state: Mapping[str, Tensor] | None = None
    length: int = 15
    beam_size: int = 50
    lam: float = 0.2
    strategy: str | None = None

    def __post_init__(self) -> None:
        words = {"vocabulary": len(self.indexer.vocabulary), "decoder": self.decoder.config.words}
        if self.lm is not None:
            words["language model"] = self.lm.config.words
        if len(set(words.values())) > 1:
            raise MilanError(f"the captioner's parts have different vocabularies (words: {words}); train them together")
        positive = all(isinstance(number, int) and number > 0 for number in (self.length, self.beam_size))
        if not (positive and isinstance(self.lam, (int, float)) and math.isfinite(self.lam)):
            raise MilanError(
                f"a captioner needs a length and a beam of at least 1 and a finite λ, not length {self.length!r}, "
                f"beam {self.beam_size!r}, λ {self.lam!r}"
            )
        if self.strategy is not None and self.strategy not in STRATEGIES:
            raise unknown_name("strategy", str(self.strategy), STRATEGIES)
        self.decoder.eval()
        if self.lm is not None:
            self.lm.eval()

    def to(self, device: str = "auto") -> Captioner:
        """Moves decoder and language model in place; ``auto`` is CUDA where it is available."""
        resolved = resolve_device(device)
        self.decoder.to(resolved)
        if self.lm is not None:
            self.lm.to(resolved)
        return self

    def encoder(self) -> PyramidEncoder:
        """The image encoder of this captioner's features, on the CPU.

        Raises:
            MilanError: The encoder is not registered, or its weights are neither stored with the captioner nor found.
        """
        return get_encoder(self.encoder_name).load(self.encoder_state)

    def _features(self, features: Tensor | np.ndarray) -> Tensor:
        """Features (B, k, F), checked, on the decoder's device and in its type."""
        weight = self.decoder.embedding.weight
        features = torch.as_tensor(features).to(weight.dtype)
        size = self.decoder.config.feature_size
        if features.ndim != 3 or features.shape[2] != size:
            raise MilanError(
                f"the decoder takes features of shape (units, exemplars, {size}) and got {tuple(features.shape)}; "
                f"encode with {self.encoder_name!r}, the encoder it was trained on"
            )
        if not torch.isfinite(features).all():
            invalid = (~torch.isfinite(features)).flatten(1).any(1).nonzero().flatten().tolist()
            raise MilanError(f"features of unit rows {invalid[:8]} hold NaN or infinity; encode them again")
        return to_device(features, weight.device)  # only now: on a GPU, the host would have to wait for the check

    def candidates(
        self,
        features: Tensor | np.ndarray,
        beam_size: int | None = None,
        length: int | None = None,
        mi_lam: float | None = None,
        quirks: Quirks = NO_QUIRKS,
    ) -> Candidates:
        """Searches descriptions of units and computes log p(d|E) and log p(d) of each.

        Args:
            features: Exemplar features (B, k, F).
            beam_size: Beams per unit; the captioner's own by default.
            length: Maximum tokens; the captioner's own by default.
            mi_lam: λ of a search by log p(d|E) − λ log p(d); None searches by log p(d|E).
            quirks: Defects of the reference to reproduce.

        Raises:
            MilanError: Features do not fit the decoder, or the vocabulary is smaller than the beam.
        """
        if mi_lam is not None and self.lm is None:
            raise MilanError("searching with mutual information needs a language model and this captioner has none")
        beams = beam_search(
            self.decoder,
            self._features(features),
            self.beam_size if beam_size is None else beam_size,
            self.length if length is None else length,
            self.lm if mi_lam is not None else None,
            mi_lam or 0.0,
        )
        stop = self.indexer.ids.stop
        lengths = counted_length(beams.tokens, stop, torch.full_like(beams.steps, beams.tokens.shape[2]).unsqueeze(1))
        tokens = [
            [row[:n] for row, n in zip(rows, counts, strict=True)]
            for rows, counts in zip(beams.tokens.tolist(), lengths.tolist(), strict=True)
        ]
        return Candidates(
            tokens=tokens,
            finished=(beams.tokens == stop).any(dim=2).cpu().numpy(),
            logp_d_given_e=beams.scores.cpu().numpy(),
            logp_d=None if self.lm is None else beam_logp(self.lm, beams, quirks).cpu().numpy(),
            texts=[[self.indexer.reconstruct(row) for row in rows] for rows in tokens],
        )

    def describe(
        self,
        features: Tensor | np.ndarray,
        lam: float | None = None,
        n_best: int = 1,
        beam_size: int | None = None,
        length: int | None = None,
        quirks: Quirks = NO_QUIRKS,
    ) -> list[list[Description]]:
        """The ``n_best`` descriptions of each unit, by :func:`best_descriptions` of :meth:`candidates`."""
        candidates = self.candidates(features, beam_size, length, quirks=quirks)
        return best_descriptions(candidates, self.lam if lam is None else lam, n_best, quirks)

    @torch.no_grad()
    def decode(
        self,
        features: Tensor | np.ndarray,
        strategy: str | Tensor | None = None,
        mi: bool | None = None,
        lam: float | None = None,
        beam_size: int | None = None,
        length: int | None = None,
        quirks: Quirks = NO_QUIRKS,
        generator: torch.Generator | None = None,
    ) -> Decoding:
        """Decodes as the reference's ``forward``, with any of its strategies and with its defaults.

        Args:
            features: Exemplar features (B, k, F).
            strategy: "greedy" and "sample" choose one token at a time and always ``length`` of them; "beam" chooses
                the best beam; "rerank" the best one by log p(d|E) − λ log p(d). Token ids (B, T), without
                ``<start>``, are only scored. The captioner's own strategy by default.
            mi: Whether to decode by log p(d|E) − λ log p(d), token by token, instead of log p(d|E); by default True
                with a language model, unless the strategy is "rerank".
            lam: λ; the captioner's own by default.
            beam_size: Beams per unit; the captioner's own by default.
            length: Maximum tokens; the captioner's own by default.
            quirks: Defects of the reference to reproduce.
            generator: Random generator for "sample"; torch's global one by default.

        Raises:
            MilanError: Features or tokens have the wrong shape, or the strategy is unknown or needs a language model.
        """
        if strategy is None:
            strategy = self.strategy or ("beam" if self.lm is None else "rerank")
        rerank = isinstance(strategy, str) and strategy == "rerank"
        mi = (self.lm is not None and not rerank) if mi is None else mi
        if self.lm is None and (mi or rerank):
            raise MilanError('decoding with mutual information needs a language model; use mi=False, or "beam"')
        if mi and rerank:
            raise MilanError('"rerank" subtracts λ log p(d) after the search; use mi=False, or "beam" with mi=True')
        given = self._features(features)
        lm, lam = self.lm if mi else None, self.lam if lam is None else lam
        length = self.length if length is None else length
        if isinstance(strategy, Tensor):
            if strategy.ndim != 2 or len(strategy) != len(given):
                raise MilanError(
                    f"{len(given)} units need tokens of shape ({len(given)}, T), not {tuple(strategy.shape)}"
                )
            decoded = decode_forced(self.decoder, given, strategy.to(given.device), lm, lam)
        elif strategy in ("greedy", "sample"):
            decoded = decode_stepwise(self.decoder, given, length, lm, lam, strategy == "sample", generator)
        elif strategy in STRATEGIES:
            beam_size = self.beam_size if beam_size is None else beam_size
            beams = beam_search(self.decoder, given, beam_size, length, lm, lam)
            scores = beams.scores
            if rerank and self.lm is not None:
                scores = rescore(scores, beam_logp(self.lm, beams, quirks), lam)
            return self._best_beams(beams, scores)
        else:
            raise unknown_name("strategy", strategy, STRATEGIES)
        return Decoding(
            self._texts(decoded.tokens), decoded.tokens, decoded.scores, decoded.log_probs, decoded.attentions
        )

    def _best_beams(self, beams: Beams, scores: Tensor) -> Decoding:
        """The beams with the highest scores (B, beam)."""
        best = scores.argmax(dim=1, keepdim=True)
        tokens = beams.tokens[torch.arange(len(scores), device=scores.device), best.squeeze(1)]
        beam_texts = [self._texts(rows) for rows in beams.tokens]
        chosen_scores = scores.gather(1, best).squeeze(1)
        return Decoding(self._texts(tokens), tokens, chosen_scores, beams=beams, beam_texts=beam_texts)

    def _texts(self, tokens: Tensor) -> list[str]:
        return [self.indexer.reconstruct(row) for row in tokens.tolist()]

    def score(
        self, texts: Sequence[str], features: Tensor | np.ndarray, mi: bool | None = None, lam: float | None = None
    ) -> np.ndarray:
        """Scores given descriptions: the sum over words and ``<stop>`` of log-probabilities, nats, float32 (B,).

        Args:
            texts: One description per unit (B).
            features: Exemplar features (B, k, F), or (1, k, F) to score all texts for one unit.
            mi: Whether to score by log p(d|E) − λ log p(d); by default True with a language model.
            lam: λ; the captioner's own by default.
        """
        targets = torch.tensor(self.indexer.index(texts, start=False))
        given = self._features(features)
        if len(given) not in (1, len(texts)):
            raise MilanError(
                f"{len(texts)} texts need the features of {len(texts)} units, or of one, not of {len(given)}"
            )
        decoded = self.decode(given.expand(len(texts), -1, -1), targets, mi, lam)
        assert decoded.log_probs is not None
        chosen = decoded.log_probs.gather(2, decoded.tokens.unsqueeze(2)).squeeze(2)
        return (chosen * (decoded.tokens != self.indexer.ids.pad)).sum(dim=1).cpu().numpy()


def best_descriptions(
    candidates: Candidates, lam: float, n_best: int = 1, quirks: Quirks = NO_QUIRKS
) -> list[list[Description]]:
    """The ``n_best`` descriptions of each unit by log p(d|E) − λ log p(d), best first; complete ones before others."""
    scores, logp_d_given_e, logp_d = candidates.scores(lam), candidates.logp_d_given_e, candidates.logp_d
    order = candidates.order(lam)
    if not quirks.plain_choice:
        each = zip(scores, candidates.texts, candidates.finished, strict=True)
        order = np.stack([choice_order(*unit) for unit in each]) if len(scores) else order
    return [
        [
            Description(
                candidates.texts[unit][beam] if quirks.plain_choice else readable(candidates.texts[unit][beam]),
                float(scores[unit, beam]),
                float(logp_d_given_e[unit, beam]),
                None if logp_d is None else float(logp_d[unit, beam]),
            )
            for beam in beams[:n_best]
        ]
        for unit, beams in enumerate(order)
    ]
