"""MILAN's labelers: rank the captioner's candidates by its own log-probabilities (paper §3, docs/contrast.md)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from milan_ray.captioner.rerank import CHOICE_VERSION, choice_order, contrast, rescore
from milan_ray.captioner.text import readable
from milan_ray.errors import MilanError
from milan_ray.labelers.protocol import Evidence, Kind, Label

MILAN = "milan"
"""Labeler: log p(d|E) − λ·log p(d)."""

LIKELIHOOD = "milan-pdE"
"""Labeler: log p(d|E) alone."""

CONTRAST = "milan-contrast"
"""Labeler: log p(d|E) − λ·log p(d) − μ·log p(d|C), C the unit's contrasts."""

N_BEST = 5


@dataclass(frozen=True)
class PointwiseMutualInformation:
    """Ranks candidates by log p(d|E) − λ·log p(d) (paper eq. 2); λ = 0 ranks by log p(d|E) alone.

    Attributes:
        name: :data:`MILAN` or :data:`LIKELIHOOD`.
        lam: λ.
        plain_choice: The reference's choice, see :class:`milan_ray.captioner.quirks.Quirks`.
    """

    name: str
    lam: float
    plain_choice: bool = False
    requires: tuple[Kind, ...] = field(default=("candidates",), init=False)

    def identity(self) -> dict[str, object]:
        """Everything that determines the labels, except the candidates."""
        return {"rescore": 1 if self.plain_choice else CHOICE_VERSION, "lam": self.lam, "n_best": N_BEST}

    def label(self, evidence: Evidence) -> dict[int, list[Label]]:
        """The best candidates of every unit."""
        table = evidence.candidates
        assert table is not None  # required
        likely, prior = (table[name].to_numpy() for name in ("logp_d_given_e", "logp_d"))
        return rank(table, rescore(likely, prior, self.lam), self.plain_choice)


@dataclass(frozen=True)
class ContrastiveInformation:
    """Ranks candidates by log p(d|E) − λ·log p(d) − μ·log p(d|C), C images that do not excite the unit.

    A unit without contrasts is ranked without the last term; μ = 0 is :class:`PointwiseMutualInformation`.

    Attributes:
        lam: λ.
        mu: μ.
        plain_choice: The reference's choice, see :class:`milan_ray.captioner.quirks.Quirks`.
    """

    lam: float
    mu: float
    plain_choice: bool = False
    name: str = field(default=CONTRAST, init=False)
    requires: tuple[Kind, ...] = field(default=("candidates", "contrasted"), init=False)

    def __post_init__(self) -> None:
        if self.mu < 0 or self.lam + self.mu > 1 + 1e-9:
            raise MilanError(
                f"μ = {self.mu:g} with λ = {self.lam:g}: λ + μ above 1, or a negative μ, prefers what is unlikely in "
                f"any case; give a μ from 0 to {max(0.0, 1 - self.lam):g} with --mu, or lower --lam."
            )

    def identity(self) -> dict[str, object]:
        """Everything that determines the labels, except candidates and contrasts."""
        version = 1 if self.plain_choice else CHOICE_VERSION
        return {"rescore": version, "lam": self.lam, "mu": self.mu, "contrast": 1, "n_best": N_BEST}

    def label(self, evidence: Evidence) -> dict[int, list[Label]]:
        """The best candidates of every unit."""
        table = evidence.candidates
        assert table is not None and evidence.contrasted is not None  # required
        likely, prior = (table[name].to_numpy() for name in ("logp_d_given_e", "logp_d"))
        scores = contrast(rescore(likely, prior, self.lam), evidence.contrasted, self.mu)
        return rank(table, scores, self.plain_choice)


def rank(candidates: pa.Table, scores: np.ndarray, plain_choice: bool = False) -> dict[int, list[Label]]:
    """The best candidates of every unit.

    Args:
        candidates: Rows of the table of candidates, grouped by unit.
        scores: Scores of the rows; ties keep beam order.
        plain_choice: The reference's choice: by score alone, texts as it joins them.
    """
    texts = candidates["text"].to_pylist()
    finished = None if plain_choice else candidates["finished"].to_numpy(zero_copy_only=False)
    likely, prior = (candidates[name].to_numpy() for name in ("logp_d_given_e", "logp_d"))
    has_lm = bool(candidates["lm"][0].as_py()) if len(candidates) else False
    return {
        unit: best_labels(
            texts[rows],
            scores[rows],
            likely[rows],
            prior[rows] if has_lm else None,
            finished=None if finished is None else finished[rows],
        )
        for unit, rows in by_unit(candidates["unit"].to_numpy())
    }


def by_unit(units: np.ndarray) -> Iterator[tuple[int, slice]]:
    """Yields each unit and the slice of its rows, from a column in which each unit's rows are contiguous."""
    starts = np.flatnonzero(np.diff(units, prepend=-1))
    ends = np.append(starts[1:], len(units))[: len(starts)]
    for begin, end in zip(starts.tolist(), ends.tolist(), strict=True):
        yield int(units[begin]), slice(begin, end)


def best_labels(
    texts: Sequence[str],
    scores: np.ndarray,
    likely: np.ndarray,
    prior: np.ndarray | None,
    n_best: int = N_BEST,
    finished: np.ndarray | None = None,
) -> list[Label]:
    """The best distinct texts of one unit, with their scores and log-probabilities, best first.

    Args:
        texts: The candidates (N).
        scores: Their scores (N,).
        likely: Their log p(d|E) (N,).
        prior: Their log p(d) (N,); None without a language model.
        n_best: Most texts.
        finished: Whether each reached ``<stop>`` (N,): complete ones come first, and texts are as people write them.
            None chooses as the reference does, by score alone.
    """
    best: dict[str, Label] = {}
    order = np.argsort(-scores, kind="stable") if finished is None else choice_order(scores, texts, finished)
    for place in order.tolist():
        text = texts[place] if finished is None else readable(texts[place])
        if text not in best:  # different tokens may give the same text
            chosen = None if prior is None else float(prior[place])
            best[text] = Label(text, float(scores[place]), float(likely[place]), chosen)
        if len(best) == n_best:
            break
    return list(best.values())
