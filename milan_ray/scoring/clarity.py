"""Scores of a unit's exemplars that need no description: clarity, polysemanticity, redundancy.

Source: Dreyer et al., *Mechanistic understanding and validation of large AI models with SemanticLens* (2025), and its
code. V denotes the embeddings of a unit's k exemplars, normalised to length 1.
"""

from __future__ import annotations

import numpy as np

STARTS = 10
"""Random starts of the clustering; the best is used."""

ROUNDS = 50
"""Maximum number of rounds per start."""


def clarity(vectors: np.ndarray) -> float:
    """Mean cosine similarity over pairs of a unit's exemplars: (‖mean v‖² − 1/k)·k/(k − 1).

    Args:
        vectors: (k, D), of length 1.

    Returns:
        1 for identical exemplars, about 0 for unrelated ones; NaN for fewer than two.
    """
    k = len(vectors)
    if k < 2:
        return float("nan")
    mean = vectors.astype(np.float64).mean(axis=0)
    return float((mean @ mean - 1 / k) * k / (k - 1))


def polysemanticity(vectors: np.ndarray, seed: int = 123) -> float:
    """Distance between the two clusters of a unit's exemplars: 1 − the cosine of their centres.

    A cluster of one exemplar counts as an outlier, not as a meaning, so the mean of all exemplars replaces its centre.

    Args:
        vectors: (k, D), of length 1.
        seed: Seed of the clustering.

    Returns:
        0 for one meaning, 1 for two unrelated meanings; NaN for fewer than two exemplars.
    """
    if len(vectors) < 2:
        return float("nan")
    vectors = vectors.astype(np.float64)
    cluster = two_means(vectors, seed)
    mean = vectors.mean(axis=0)
    centres = [vectors[cluster == side].mean(axis=0) if (cluster == side).sum() > 1 else mean for side in (0, 1)]
    lengths = [np.linalg.norm(centre) for centre in centres]
    return float(1 - centres[0] @ centres[1] / max(lengths[0] * lengths[1], 1e-12))


def redundancy(means: np.ndarray) -> np.ndarray:
    """Highest cosine of each unit with another unit of its layer; the mean of these is the layer's redundancy.

    Args:
        means: Mean embeddings of U units' exemplars, (U, D).

    Returns:
        float64 (U,); NaN if the layer has only one unit.
    """
    if len(means) < 2:
        return np.full(len(means), np.nan)
    unit = means.astype(np.float64) / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -np.inf)
    return cosines.max(axis=1)


def two_means(vectors: np.ndarray, seed: int = 123, starts: int = STARTS) -> np.ndarray:
    """Runs Lloyd's algorithm with two clusters from k-means++ starts; returns the result with the lowest inertia.

    Args:
        vectors: (k, D).
        seed: Seed of the starts.
        starts: Number of starts.

    Returns:
        int64 (k,): cluster of each vector, 0 or 1; the first vector's cluster is 0.
    """
    rng = np.random.default_rng(seed)
    best, least = np.zeros(len(vectors), np.int64), np.inf
    for _ in range(starts):
        first = vectors[rng.integers(len(vectors))]
        far = ((vectors - first) ** 2).sum(axis=1)
        if far.sum() <= 0:
            break
        centres = np.stack([first, vectors[rng.choice(len(vectors), p=far / far.sum())]])
        of = np.full(len(vectors), -1)
        for _ in range(ROUNDS):
            distances = ((vectors[:, None] - centres[None]) ** 2).sum(axis=2)
            now = distances.argmin(axis=1)
            if (now == of).all():
                break
            of = now
            centres = np.stack([vectors[of == s].mean(axis=0) if (of == s).any() else centres[s] for s in (0, 1)])
        inertia = float(((vectors - centres[of]) ** 2).sum())
        if inertia < least - 1e-12:
            best, least = of, inertia
    return best if not len(best) or best[0] == 0 else 1 - best
