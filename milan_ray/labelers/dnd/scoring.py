"""Which candidate label fits a unit best: the images drawn for each, ranked by what the unit makes of them.

The four functions of Describe-and-Dissect (Bai et al., TMLR 2025, and its code), as scores of which the highest is
the best.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

BEST_RANKS = 5
"""β: how many of a candidate's best ranks count for TopK squared mean."""

BEST_IMAGES = 10
"""K: how many of all images, the most exciting ones, are compared with the exemplars."""

NONE = -1.0
"""Image product of a candidate none of whose images is among the most exciting ones."""


def ranks(activations: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Ranks the images of all candidates together, 0 for the most exciting.

    Images that excite alike share the mean of their ranks, so that no candidate gains by its place; what is not finite
    comes last.

    Args:
        activations: Per candidate its images' activations, (n,) each.

    Returns:
        Per candidate float64 (n,).
    """
    if not activations:
        return []
    values = np.concatenate([np.asarray(found, np.float64) for found in activations])
    falling = -np.where(np.isfinite(values), values, -np.inf)
    _, place, counts = np.unique(falling, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - (counts + 1) / 2
    ends = np.cumsum([len(found) for found in activations])
    return np.split(middle[place.reshape(-1)], ends[:-1])


def mean_rank(ranked: Sequence[np.ndarray]) -> np.ndarray:
    """Minus the mean rank of each candidate's images, (M,); −inf without images."""
    return np.array([-found.mean() if len(found) else -np.inf for found in ranked])


def topk_squared_mean(ranked: Sequence[np.ndarray]) -> np.ndarray:
    """Minus the mean of the squares of each candidate's :data:`BEST_RANKS` best ranks, (M,); −inf without images."""
    return np.array([-(np.sort(found)[:BEST_RANKS] ** 2).mean() if len(found) else -np.inf for found in ranked])


def image_products(ranked: Sequence[np.ndarray], similarities: Sequence[np.ndarray]) -> np.ndarray:
    """The mean cosine of a candidate's most exciting images with the unit's exemplars, (M,).

    Args:
        ranked: As :func:`ranks` gives them.
        similarities: Per candidate, each image's mean cosine with all exemplars, (n,).

    Returns:
        Means over the images among the :data:`BEST_IMAGES` most exciting of all; :data:`NONE` where there is none.
    """
    chosen = [cosines[found < BEST_IMAGES] for found, cosines in zip(ranked, similarities, strict=True)]
    return np.array([cosines.mean() if len(cosines) else NONE for cosines in chosen])


def topk_compare(ranked: Sequence[np.ndarray], similarities: Sequence[np.ndarray]) -> np.ndarray:
    """Both of the last two: a candidate's place by TopK squared mean, times its image product, (M,).

    The best of M candidates has place score M, the next M − 1, …; equal ones share the mean. A product below 0 counts
    as 0: it would turn the order of places around.
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
"""Every scoring function, by the name that chooses it."""

COMPARING = ("image-products", "topk-compare")
"""Those that compare images, and need a model that embeds them."""


def order(
    scoring: str, activations: Sequence[np.ndarray], similarities: Sequence[np.ndarray]
) -> list[tuple[int, float]]:
    """The candidates, best first, with their scores; equal ones by TopK squared mean, then as they came.

    Args:
        scoring: A key of :data:`SCORINGS`.
        activations: Per candidate its images' activations, (n,) each.
        similarities: Per candidate, each image's mean cosine with all exemplars, (n,); read by :data:`COMPARING` alone.
    """
    ranked = ranks(activations)
    scores = SCORINGS[scoring](ranked, similarities)
    best = np.lexsort((-topk_squared_mean(ranked), -scores)) if len(scores) else np.zeros(0, np.int64)
    return [(int(place), float(scores[place])) for place in best]
