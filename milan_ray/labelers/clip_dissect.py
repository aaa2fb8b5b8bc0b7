"""CLIP-Dissect: labels a unit with the concept whose CLIP similarity to images follows the unit's activation.

See docs/clip-dissect.md.

Let P[x, c] be the product of the embeddings of image x and concept c, and A[x, u] the pooled activation of unit u.
Every similarity of a unit and a concept below depends only on the concept's own column of P, except for the softmax
over concepts in p(c|x). The work is therefore split by concepts. The parts share only one number per image,
log Σ_c exp(a·P[x, c]), whose sum is accurate enough for any split (:class:`LogSumExp`). The prior p(c) is a sum over
the units of a layer, and each part has all units.

Source: Oikarinen and Weng, *CLIP-Dissect* (ICLR 2023) and its code.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from milan_ray.device import to_device
from milan_ray.errors import MilanError, unknown_name
from milan_ray.labelers.protocol import Evidence, Kind, Label
from milan_ray.textfiles import read_lines

CLIP_DISSECT = "clip-dissect"
"""The labeler's name."""

CLIP_DISSECT_CONTRAST = "clip-dissect-contrast"
"""The name of the same labeler where it sets a unit's images against contrasts (docs/contrast.md)."""

N_BEST = 5

MIN_PROB = 1e-7
"""Constant that keeps logarithms finite; the reference's value."""

MIN_NORM = 1e-3
"""Lower limit of the norms in cosines; the reference's value."""

FRACTION, SCALE, PERMUTATIONS = 0.05, 0.5, 5
"""Parameters of rank reorder: fraction of the probe's images, exponent of the mean fit, number of shuffles."""

MIN_FIT = 1e-3
"""Lower limit of the mean fit in rank reorder. The mean fit is a cosine, and the reference takes its root."""

_SUMS_SCHEMA = pa.schema([("piece", pa.string()), ("top", pa.list_(pa.float64())), ("sum", pa.list_(pa.float64()))])

Similarity = Literal["soft_wpmi", "wpmi", "rank_reorder", "cos_similarity", "cos_similarity_cubed"]


@dataclass(frozen=True)
class Wpmi:
    """Parameters of the two similarities based on weighted pointwise mutual information (wPMI).

    Attributes:
        top_k: K, number of images with the unit's highest activations.
        a: Factor of P in the softmax over concepts.
        lam: λ, weight of the prior p(c).
        soft: Probabilities that the images of rank 0 and of rank K belong to the unit; None sets all to 1.
    """

    top_k: int
    a: float
    lam: float
    soft: tuple[float, float] | None = None


WPMI: dict[str, Wpmi] = {
    "soft_wpmi": Wpmi(100, 10.0, 1.0, (0.998, 0.97)),
    "wpmi": Wpmi(28, 2.0, 0.6),
}
"""The reference's parameters."""

SIMILARITIES: tuple[Similarity, ...] = ("soft_wpmi", "wpmi", "rank_reorder", "cos_similarity", "cos_similarity_cubed")


@dataclass(frozen=True)
class ClipDissect:
    """Labels units with concepts of a list.

    Attributes:
        concepts: The list, in order; the texts are passed to the image-text model unchanged.
        similarity: The similarity between a unit and a concept.
        pooling: ``mean`` or ``max``: how an activation map is pooled to one number.
        hold_out: Fraction of the probe's images that are not used, so that a score can be computed on them
            (:func:`milan_ray.scoring.simulation.held_out`).
        mu: μ, weight of the unit's contrasts against its own images; 0 for none. Only of wPMI similarities: the others
            compare no image with another unit's, or all images.
    """

    concepts: tuple[str, ...]
    similarity: Similarity = "soft_wpmi"
    pooling: Literal["mean", "max"] = "mean"
    hold_out: float = 0.0
    mu: float = 0.0
    requires: ClassVar[tuple[Kind, ...]] = ("concepts",)

    def __post_init__(self) -> None:
        if self.similarity not in SIMILARITIES:
            raise unknown_name("similarity", self.similarity, SIMILARITIES, f"One of {', '.join(SIMILARITIES)}.")
        if self.mu and self.similarity not in WPMI:
            raise MilanError(
                f"{self.similarity} has no use for contrasts: give --similarity {' or '.join(WPMI)}, or leave out --mu."
            )
        if not self.concepts:
            raise MilanError("the list of concepts is empty: give a file with one concept per line with --concepts.")

    @property
    def name(self) -> str:
        """The labeler's name: another with contrasts, so that both can stand in one run directory."""
        return CLIP_DISSECT_CONTRAST if self.mu else CLIP_DISSECT

    @property
    def wpmi(self) -> Wpmi | None:
        """Parameters of a wPMI similarity; None for other similarities."""
        return WPMI.get(self.similarity)

    @property
    def lam(self) -> float | None:
        """λ; None for similarities without a prior."""
        return None if self.wpmi is None else self.wpmi.lam

    def images(self, probe: int) -> int:
        """Number of images used per unit, given the number of readable images; all of them for cosines."""
        if self.wpmi is not None:
            return min(self.wpmi.top_k, probe)
        return max(1, int(probe * FRACTION)) if self.similarity == "rank_reorder" else probe

    def identity(self) -> dict[str, object]:
        """Everything that determines the labels, except activations and embeddings."""
        identity: dict[str, object] = {"mu": self.mu} if self.mu else {}
        return identity | {
            "clip_dissect": 1,
            "concepts": list(self.concepts),
            "similarity": self.similarity,
            "parameters": self.wpmi,
            "pooling": self.pooling,
            "hold_out": self.hold_out,
            "n_best": N_BEST,
        }

    def label(self, evidence: Evidence) -> Mapping[int, list[Label]]:
        """The best concepts of every unit."""
        assert evidence.concepts is not None  # required
        return evidence.concepts


def read_concepts(text: str) -> tuple[str, ...]:
    """Parses a list of concepts, one per line; skips blank lines and repetitions.

    Byte-order marks, surrounding spaces and a surrounding pair of quotes are removed; letters are composed (NFC).

    Raises:
        MilanError: The file has no concept.
    """
    concepts = tuple(dict.fromkeys(read_lines(text)))
    if not concepts:
        raise MilanError("the list of concepts is empty: give a file with one concept per line with --concepts.")
    return concepts


class LogSumExp:
    """Mergeable state of log Σ exp(x) of many columns, over terms that arrive in pieces.

    Pieces are stored by name, and the result adds them in the order of their names. So the result is identical for any
    order and repetition of pieces.
    """

    def __init__(self) -> None:
        """Starts empty."""
        self._pieces: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def update(self, name: str, terms: np.ndarray) -> None:
        """Adds one piece.

        Args:
            name: Its name.
            terms: x, (columns, terms).
        """
        top = terms.max(axis=1).astype(np.float64)
        self._pieces[name] = top, np.exp(terms - top[:, None], dtype=np.float64).sum(axis=1)

    def merge(self, other: LogSumExp) -> None:
        """Adds the pieces of another state."""
        self._pieces |= other._pieces

    def to_table(self) -> pa.Table:
        """The state as a table, one row per piece: name, and per column the largest term and Σ exp(x − largest)."""
        rows = [
            {"piece": name, "top": top.tolist(), "sum": total.tolist()} for name, (top, total) in self._pieces.items()
        ]
        return pa.Table.from_pylist(rows, schema=_SUMS_SCHEMA)

    @classmethod
    def from_table(cls, table: pa.Table) -> LogSumExp:
        """The state that :meth:`to_table` wrote."""
        state = cls()
        for row in table.to_pylist():
            state._pieces[row["piece"]] = np.array(row["top"]), np.array(row["sum"])
        return state

    def result(self) -> np.ndarray:
        """The value of log Σ exp(x), float64 (columns,).

        Raises:
            ValueError: There is no piece.
        """
        if not self._pieces:
            raise ValueError("nothing was added yet")
        tops, sums = zip(*(self._pieces[name] for name in sorted(self._pieces)), strict=True)
        top = np.max(tops, axis=0)
        total = np.zeros_like(top)
        for own, sum_ in zip(tops, sums, strict=True):
            total += sum_ * np.exp(own - top)
        return top + np.log(total)


def weights(how: Wpmi, images: int) -> np.ndarray:
    """w_j, the probability that the image of rank j belongs to the unit, float64 (images,)."""
    if how.soft is None:
        return np.ones(images)
    first, last = how.soft
    return first - np.arange(images) / images * (first - last)


def pointwise(
    fit: Tensor, normalisers: Tensor, rows: Tensor, how: Wpmi, contrasts: Tensor | None = None, mu: float = 0.0
) -> Tensor:
    """Similarities of all units of a layer to some concepts by (soft) weighted pointwise mutual information.

    With p(c|x) = exp(a·P[x, c]) / Σ_c′ exp(a·P[x, c′]) and x_j the image of rank j,
    s(u, c) = Σ_j log(1 + w_j·(p(c|x_j) − 1) + 10⁻⁷), or Σ_j log(p(c|x_j) + 10⁻⁷) without w;
    log p(c) = log Σ_u exp s(u, c) − log U; the similarity is s(u, c) − λ·log p(c).

    Args:
        fit: P of the images used by at least one unit, for these concepts, (N, C).
        normalisers: log Σ_c exp(a·P[x, c]) over *all* concepts, float64 (N,).
        rows: Row of P of every unit's images, best first, int64 (U, K) on the CPU; −1 where it has fewer.
        how: Parameters.
        contrasts: The same rows of every unit's contrasts C, (U, n). Then μ·s(C, c)·(images of the unit / contrasts of
            the unit) is subtracted, with the weights w of their ranks; nothing for a unit without contrasts.
        mu: μ.

    Returns:
        float64 (U, C).
    """
    probability = torch.exp(how.a * fit.double() - normalisers[:, None])
    similarities = _pointwise_sums(probability, rows, how)
    prior = torch.logsumexp(similarities, dim=0) - float(np.log(len(rows)))
    scores = similarities - how.lam * prior
    if contrasts is not None:
        counts = [(of >= 0).sum(dim=1) for of in (rows, contrasts)]
        share = to_device(counts[0].double() / counts[1].clamp(min=1), fit.device)[:, None]
        scores -= mu * share * _pointwise_sums(probability, contrasts, how)
    return scores


def _pointwise_sums(probability: Tensor, rows: Tensor, how: Wpmi) -> Tensor:
    """s(u, c) of :func:`pointwise`, float64 (U, C), from p(c|x) of images (N, C) and the rows of every unit's."""
    similarities = probability.new_empty(len(rows), probability.shape[1])
    there = rows >= 0
    listed = to_device(rows[there], probability.device)
    weight = torch.from_numpy(weights(how, rows.shape[1])).expand(len(rows), -1)[there]
    weight = to_device(weight, probability.device)[:, None]
    for unit, own in enumerate(_rows_of_units(there)):
        p = probability[listed[own]]
        terms = p + MIN_PROB if how.soft is None else 1 + weight[own] * (p - 1) + MIN_PROB
        similarities[unit] = terms.log().sum(dim=0)
    return similarities


def _rows_of_units(there: Tensor) -> Iterator[slice]:
    """Where each unit's images lie in the list of all units' images, given which there are, bool (U, K) on the CPU."""
    ends = there.sum(dim=1).cumsum(dim=0).tolist()
    return (slice(start, end) for start, end in pairwise([0, *ends]))


def rank_reorder(fit: Tensor, rows: Tensor, activations: Tensor) -> Tensor:
    """Similarities by how little a unit's activations change when its images are sorted by a concept's fit.

    The similarity is −( mean |a − a′|³ / b ) / f^½. Here a are the unit's highest activations, a′ are the same values
    in the order of P[·, c], b is the mean of mean |a − a″|³ over five fixed shuffles a″, and f is the mean of P[·, c]
    over these images.

    Args:
        fit: P of the images used by at least one unit, for some concepts, (N, C).
        rows: Row of P of every unit's images, best first, int64 (U, K) on the CPU; −1 where it has fewer.
        activations: Their activations, (U, K) on the CPU.

    Returns:
        float64 (U, C).
    """
    similarities = torch.empty(len(rows), fit.shape[1], dtype=torch.float64, device=fit.device)
    there = rows >= 0
    listed, active = to_device(rows[there], fit.device), to_device(activations[there].double(), fit.device)
    shuffled: dict[int, list[Tensor]] = {}
    for unit, own in enumerate(_rows_of_units(there)):
        near, act = fit[listed[own]].T.contiguous(), active[own]
        order = torch.argsort(near, dim=1, descending=True, stable=True)
        # In the concept's order; the mean over images does not depend on the order.
        apart = (act - act[order]).abs()
        errors = (apart * apart * apart).mean(dim=1)
        if len(act) not in shuffled:
            rng = np.random.default_rng(0)
            permutations = [torch.from_numpy(rng.permutation(len(act))) for _ in range(PERMUTATIONS)]
            shuffled[len(act)] = [to_device(permutation, fit.device) for permutation in permutations]
        usual = torch.stack([(act - act[shuffle]).abs().pow(3).mean() for shuffle in shuffled[len(act)]]).mean()
        fits = near.double().mean(dim=1).clamp(min=MIN_FIT)
        similarities[unit] = -(errors / usual.clamp(min=torch.finfo(torch.float64).tiny)) / fits**SCALE
    return similarities


class Cosines:
    """Mergeable cosines of units' activations and concepts' fits over images, both centred and, optionally, cubed.

    Attributes:
        products: Σ_x A′[x, u]·P′[x, c], float64 (U, C).
    """

    def __init__(self, units: Tensor, concepts: Tensor, power: int) -> None:
        """Starts empty.

        Args:
            units: Mean of every unit's activations over the probe, float64 (U,).
            concepts: Mean of every concept's fits, float64 (C,).
            power: 1, or 3 for cubes.
        """
        self._units, self._concepts, self._power = units, concepts, power
        self.products = units.new_zeros(len(units), len(concepts))
        self._squares = units.new_zeros(len(units)), units.new_zeros(len(concepts))

    def update(self, activations: Tensor, fit: Tensor) -> None:
        """Adds a batch of images: activations (B, U), NaN where missing, and P (B, C)."""
        own = torch.nan_to_num(activations.double() - self._units).pow(self._power)
        near = (fit.double() - self._concepts).pow(self._power)
        self.products += own.T @ near
        self._squares[0].add_(own.square().sum(dim=0))
        self._squares[1].add_(near.square().sum(dim=0))

    def result(self) -> Tensor:
        """The cosines, float64 (U, C)."""
        units, concepts = (squares.sqrt().clamp(min=MIN_NORM) for squares in self._squares)
        return self.products / units[:, None] / concepts


@dataclass(frozen=True)
class Best:
    """Every unit's best concepts of a subset of the concepts.

    Attributes:
        concepts: Indices of the concepts, best first, int64 (U, n).
        scores: Their similarities, float64 (U, n).
    """

    concepts: np.ndarray
    scores: np.ndarray

    @classmethod
    def of(cls, similarities: np.ndarray, first: int, n_best: int = N_BEST) -> Best:
        """Selects the best of similarities (U, C); column 0 is concept ``first``. Ties keep the concepts' order."""
        order = np.argsort(-similarities, axis=1, kind="stable")[:, :n_best]
        return cls(order + first, np.take_along_axis(similarities, order, axis=1))

    @classmethod
    def merged(cls, found: Iterable[Best], n_best: int = N_BEST) -> Best:
        """Merges several selections; the result does not depend on their order."""
        every = list(found)
        concepts = np.concatenate([best.concepts for best in every], axis=1)
        scores = np.concatenate([best.scores for best in every], axis=1)
        order = np.lexsort((concepts, -scores), axis=1)[:, :n_best]
        return cls(np.take_along_axis(concepts, order, axis=1), np.take_along_axis(scores, order, axis=1))

    def labels(self, names: Sequence[str], alive: np.ndarray, nothing: str) -> dict[int, list[Label]]:
        """The units' labels; a unit with constant activation gets the label ``nothing`` with score 0."""
        return {
            unit: [Label(names[concept], float(score)) for concept, score in zip(*rows, strict=True)]
            if alive[unit]
            else [Label(nothing, 0.0)]
            for unit, rows in enumerate(zip(self.concepts.tolist(), self.scores.tolist(), strict=True))
        }
