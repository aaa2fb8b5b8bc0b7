"""Scores candidate labels by a unit's activations on the images generated for each label.

Implements the four scoring functions of Describe-and-Dissect (Bai et al., TMLR 2025, and its code). A higher score is
better.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

BEST_RANKS = 5
"""β: number of a candidate's best ranks in the TopK squared mean."""

BEST_IMAGES = 10
"""K: number of images with the highest activations, over all candidates, that are compared with the exemplars."""

NONE = -1.0
"""Image product of a candidate that has no image among the :data:`BEST_IMAGES`."""


def ranks(activations: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Ranks the images of all candidates together; rank 0 has the highest activation.

    Images with equal activations share the mean of their ranks, so the order of candidates does not matter.
    Non-finite activations rank last.

    Args:
        activations: Activations of each candidate's images, (n,) each.

    Returns:
        Ranks of each candidate's images, float64 (n,) each.
    """
    if not activations:
        return []
    values = np.concatenate([np.asarray(own, np.float64) for own in activations])
    falling = -np.where(np.isfinite(values), values, -np.inf)
    _, place, counts = np.unique(falling, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - (counts + 1) / 2
    ends = np.cumsum([len(own) for own in activations])
    return np.split(middle[place.reshape(-1)], ends[:-1])


def mean_rank(ranked: Sequence[np.ndarray]) -> np.ndarray:
    """The negative mean rank of each candidate's images, (M,); −inf without images."""
    return np.array([-own.mean() if len(own) else -np.inf for own in ranked])


def topk_squared_mean(ranked: Sequence[np.ndarray]) -> np.ndarray:
    """The negative mean square of each candidate's :data:`BEST_RANKS` best ranks, (M,); −inf without images."""
    return np.array([-(np.sort(own)[:BEST_RANKS] ** 2).mean() if len(own) else -np.inf for own in ranked])


def image_products(ranked: Sequence[np.ndarray], similarities: Sequence[np.ndarray]) -> np.ndarray:
    """The mean cosine of each candidate's highest-ranked images with the unit's exemplars, (M,).

    Args:
        ranked: The result of :func:`ranks`.
        similarities: Mean cosine of each of a candidate's images with all exemplars, (n,) each.

    Returns:
        Means over a candidate's images among the :data:`BEST_IMAGES` of all; :data:`NONE` if there are none.
    """
    chosen = [cosines[own < BEST_IMAGES] for own, cosines in zip(ranked, similarities, strict=True)]
    return np.array([cosines.mean() if len(cosines) else NONE for cosines in chosen])


def topk_compare(ranked: Sequence[np.ndarray], similarities: Sequence[np.ndarray]) -> np.ndarray:
    """The product of a candidate's rank score by TopK squared mean and its image product, (M,).

    The best of M candidates has rank score M, the next M − 1, …; ties share the mean. A negative image product counts
    as 0, because it would reverse the order of the rank scores.
    """
    behind = -topk_squared_mean(ranked)
    _, place, counts = np.unique(behind, return_inverse=True, return_counts=True)
    places = len(behind) - (np.cumsum(counts) - (counts + 1) / 2)[place.reshape(-1)]
    return places * np.maximum(image_products(ranked, similarities), 0)


def _without(function: Callable[[Sequence[np.ndarray]], np.ndarray]) -> Scoring:
    return lambda ranked, similarities: function(ranked)


Scoring = Callable[[Sequence[np.ndarray], Sequence[np.ndarray]], np.ndarray]
"""(ranks, similarities) → scores (M,)."""

SCORINGS: dict[str, Scoring] = {
    "mean": _without(mean_rank),
    "topk-squared-mean": _without(topk_squared_mean),
    "image-products": image_products,
    "topk-compare": topk_compare,
}
"""All scoring functions, by name."""

COMPARING = ("image-products", "topk-compare")
"""The scoring functions that compare images and therefore need an image embedding model."""


def order(
    scoring: str, activations: Sequence[np.ndarray], similarities: Sequence[np.ndarray]
) -> list[tuple[int, float]]:
    """Sorts candidates, best first, and returns their scores; ties by TopK squared mean, then in the given order.

    Args:
        scoring: A key of :data:`SCORINGS`.
        activations: Activations of each candidate's images, (n,) each.
        similarities: Mean cosine of each of a candidate's images with all exemplars, (n,) each; used only by
            :data:`COMPARING`.
    """
    ranked = ranks(activations)
    scores = SCORINGS[scoring](ranked, similarities)
    best = np.lexsort((-topk_squared_mean(ranked), -scores)) if len(scores) else np.zeros(0, np.int64)
    return [(int(place), float(scores[place])) for place in best]
