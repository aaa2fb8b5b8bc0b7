"""Effects of units on class scores: sums over images that merge to the same bits in any order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import torch

from milan_ray.errors import MilanError
from milan_ray.models.interventions import CHANGES, RANDOM

DETAILED = tuple(change for change in CHANGES if change != RANDOM)
"""The changes whose effects are kept class by class."""

_PROBABILITY_BITS, _SCORE_BITS = 40, 24
"""Sums are of whole multiples of 2⁻⁴⁰ (probabilities) and 2⁻²⁴ (scores): whole numbers add up in any order."""

MOST_SCORE = 2.0**18
"""Class scores up to which sums over 2²¹ images stay exact."""


def are_probabilities(scores: torch.Tensor, coarse: bool = False) -> bool:
    """Whether class scores of some images are all probabilities: decided once for a network, not image by image.

    Args:
        scores: (n, classes), of the unchanged network.
        coarse: Whether the network computes in half precision, whose probabilities add up to 1 less well.
    """
    tolerance = 3e-2 if coarse else 1e-3
    return bool((scores >= 0).all() and ((scores.sum(dim=1) - 1).abs() < tolerance).all())


def log_scores(scores: torch.Tensor, probabilities: bool) -> torch.Tensor:
    """Logits (R, classes): the scores themselves, or their logarithm where the network puts out probabilities."""
    return scores.clamp_min(1e-30).log() if probabilities else scores


@dataclass
class EffectSums:
    """What changes of U units did to C class scores, summed over images.

    Arrays are int64; probabilities and scores are in units of 2⁻⁴⁰ and 2⁻²⁴.

    Attributes:
        images: (1,), images.
        replayed: (2,), images whose passes ran the whole network, and images of a linear readout.
        active: (U,), images on which something of the unit was there to change.
        strength: (U,), mean absolute value over positions, summed.
        moved: (changes, U), ½ Σ_c |Δp_c|, summed.
        flipped: (changes, U), images whose most probable class changed.
        probabilities: (detailed changes, U, C), Δp summed.
        scores: (detailed changes, U, C), Δ logit summed.
        predicted: (detailed changes, U, C), images predicted as the class with the change, less those without.
    """

    images: torch.Tensor
    replayed: torch.Tensor
    active: torch.Tensor
    strength: torch.Tensor
    moved: torch.Tensor
    flipped: torch.Tensor
    probabilities: torch.Tensor
    scores: torch.Tensor
    predicted: torch.Tensor

    @classmethod
    def empty(cls, units: int, classes: int, device: torch.device | None = None) -> EffectSums:
        """Sums over no images."""

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        detailed = (len(DETAILED), units, classes)
        return cls(
            zeros(1), zeros(2), zeros(units), zeros(units), zeros(len(CHANGES), units), zeros(len(CHANGES), units),
            zeros(*detailed), zeros(*detailed), zeros(*detailed),
        )  # fmt: skip

    def add_image(self, amounts: torch.Tensor, whole: bool, linear: bool) -> None:
        """Counts an image.

        Args:
            amounts: (U, P), how much of each unit there is at each position.
            whole: Whether its passes run the whole network.
            linear: Whether a linear readout gives its scores.
        """
        self.images += 1
        self.replayed += torch.tensor([whole, linear], device=self.replayed.device)
        self.active += (amounts != 0).any(dim=1)
        self.strength += _fixed(amounts.abs().double().mean(dim=1), _SCORE_BITS)

    def add(self, pairs: torch.Tensor, base: torch.Tensor, scores: torch.Tensor) -> None:
        """Adds what changes did on one image.

        Args:
            pairs: int64 (R, 2): which change of which unit, by its place; each at most once.
            base: (C,), logits of the unchanged network.
            scores: (R, C), logits with the changes.

        Raises:
            MilanError: Scores are not finite, or too large.
        """
        if not (scores.isfinite().all() and scores.abs().max() < MOST_SCORE):
            raise MilanError(
                "the network puts out NaN, infinite or very large class scores, which have no effects that can be "
                "added up: mend its weights, or choose other images."
            )
        changes, units = pairs.unbind(1)
        before, after = base.double().softmax(dim=0), scores.double().softmax(dim=1)
        difference = after - before
        self.moved[changes, units] += _fixed(difference.abs().sum(dim=1) / 2, _PROBABILITY_BITS)
        was, now = base.argmax(), scores.argmax(dim=1)
        self.flipped[changes, units] += now != was
        kept = changes < len(DETAILED)
        if not bool(kept.all()):
            changes, units, now = changes[kept], units[kept], now[kept]
            difference, scores = difference[kept], scores[kept]
        self.probabilities[changes, units] += _fixed(difference, _PROBABILITY_BITS)
        self.scores[changes, units] += _fixed(scores.double() - base.double(), _SCORE_BITS)
        self.predicted[changes, units, now] += 1
        self.predicted[changes, units, was] -= 1

    def merge(self, other: EffectSums) -> None:
        """Adds sums over other images, of the same units."""
        for name in _NAMES:
            getattr(self, name).add_(getattr(other, name))

    def state(self) -> dict[str, np.ndarray]:
        """The sums as arrays; most of ``predicted`` is 0 and small."""
        arrays = {name: getattr(self, name).cpu().numpy() for name in _NAMES}
        return {**arrays, "predicted": arrays["predicted"].astype(np.int32)}

    @classmethod
    def of_state(cls, arrays: Mapping[str, np.ndarray]) -> EffectSums:
        """The sums of :meth:`state`."""
        return cls(**{name: torch.from_numpy(arrays[name].astype(np.int64)) for name in _NAMES})


_NAMES = tuple(each.name for each in fields(EffectSums))


def _fixed(values: torch.Tensor, bits: int) -> torch.Tensor:
    return (values.double() * 2.0**bits).round().to(torch.int64)


@dataclass(frozen=True)
class ClassEffect:
    """What a change did to one class, per image.

    Attributes:
        number: The class.
        probability: Mean change of its probability.
        logit: Mean change of its logit.
        predicted: Change of the share of images that are predicted as it.
    """

    number: int
    probability: float
    logit: float
    predicted: float


@dataclass(frozen=True)
class Effect:
    """What one change of one unit did.

    Attributes:
        unit: Place of the unit.
        change: One of :data:`~milan_ray.models.interventions.CHANGES`.
        active: Images on which there was something to change.
        strength: Mean over images and positions of the absolute value.
        moved: Mean over images of ½ Σ_c |Δp_c|: the probability that moved from classes to others.
        flipped: Share of images whose most probable class changed.
        gained: Classes whose probability rose most, at most as many as asked for; none for the baseline.
        lost: Classes whose probability fell most.
    """

    unit: int
    change: str
    active: int
    strength: float
    moved: float
    flipped: float
    gained: Sequence[ClassEffect] = field(default=())
    lost: Sequence[ClassEffect] = field(default=())


def effects(sums: EffectSums, most: int) -> list[Effect]:
    """Means over images, by unit and change.

    Args:
        sums: Sums over at least one image.
        most: Classes gained, and lost, at most.
    """
    arrays = {name: array.astype(np.int64) for name, array in sums.state().items()}
    images = int(arrays["images"][0])
    found = []
    for unit in range(len(arrays["active"])):
        for place, change in enumerate(CHANGES):
            gained: list[ClassEffect] = []
            lost: list[ClassEffect] = []
            if change in DETAILED:
                moved = arrays["probabilities"][place, unit]
                order = np.lexsort((np.arange(len(moved)), -moved))
                up = [number for number in order[:most].tolist() if moved[number] > 0]
                order = np.lexsort((np.arange(len(moved)), moved))
                down = [number for number in order[:most].tolist() if moved[number] < 0]
                gained, lost = ([_class(arrays, place, unit, number, images) for number in of] for of in (up, down))
            found.append(
                Effect(
                    unit,
                    change,
                    int(arrays["active"][unit]),
                    float(arrays["strength"][unit]) / images / 2**_SCORE_BITS,
                    float(arrays["moved"][place, unit]) / images / 2**_PROBABILITY_BITS,
                    float(arrays["flipped"][place, unit]) / images,
                    gained,
                    lost,
                )
            )
    return found


def _class(arrays: Mapping[str, np.ndarray], place: int, unit: int, number: int, images: int) -> ClassEffect:
    at = place, unit, number
    return ClassEffect(
        number,
        float(arrays["probabilities"][at]) / images / 2**_PROBABILITY_BITS,
        float(arrays["scores"][at]) / images / 2**_SCORE_BITS,
        float(arrays["predicted"][at]) / images,
    )


def peers(strengths: Sequence[float], active: Sequence[int]) -> list[int | None]:
    """For each unit the other one whose mean strength is nearest: a baseline that costs nothing.

    Args:
        strengths: Mean absolute value of each unit.
        active: Images on which each unit is active; units that never are have no peer and are none.

    Returns:
        Places; of two that are equally near, the weaker one.
    """
    able = [place for place in range(len(strengths)) if active[place]]
    order = sorted(able, key=lambda place: (strengths[place], place))
    found: list[int | None] = [None] * len(strengths)
    for at, place in enumerate(order):
        near = [order[other] for other in (at - 1, at + 1) if 0 <= other < len(order)]
        found[place] = min(near, key=lambda other: abs(strengths[other] - strengths[place]), default=None)
    return found
