"""Descriptions of a classifier's outputs against the names of its classes: the one truth that needs no annotators."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from milan_ray.scoring.bootstrap import resampling_counts
from milan_ray.scoring.evaluation import Row, mean_rows

SIMILARITY, TOP1 = "class-similarity", "class-top1"
"""Names of the metrics."""

_READINGS = {
    SIMILARITY: "product of the embeddings of description and class name",
    TOP1: "share of units whose class name is nearer to the description than all other class names",
}


def class_scores(text: np.ndarray, classes: np.ndarray, unit: int) -> tuple[float, float]:
    """Compares the description of one output with all class names.

    Args:
        text: Embedding of the description, (D,).
        classes: Embeddings of the K class names, (K, D).
        unit: The output's own class, 0 to K − 1.

    Returns:
        The product with its own class name, and whether this is higher than with all others, 1 or 0.
    """
    products = classes @ text
    others = np.delete(products, unit)
    return float(products[unit]), float(products[unit] > others.max()) if len(others) else 1.0


def nearest_constant(texts: Sequence[str], names: Sequence[str], embed: Callable[[Sequence[str]], np.ndarray]) -> str:
    """Finds the description that is most similar to class names when given to all outputs.

    It may beat descriptions that say something about their units: short plain words are near to many names.

    Args:
        texts: Descriptions to choose from; of equal ones the alphabetically first is taken.
        names: The K class names.
        embed: Embeds T texts as vectors of length 1, (T, D).
    """
    distinct = sorted(set(texts))
    return distinct[int((embed(distinct) @ embed(names).mean(axis=0)).argmax())]


def class_name_rows(
    systems: Mapping[str, Sequence[str]],
    names: Sequence[str],
    embed: Callable[[Sequence[str]], np.ndarray],
    *,
    samples: int = 1000,
    seed: int = 0,
) -> list[Row]:
    """Compares descriptions of all outputs of a classifier with its class names.

    Args:
        systems: System → description of each of K outputs, in their order, the main system first
            (:func:`~milan_ray.scoring.evaluation.with_trivial_rows`).
        names: The K class names.
        embed: Embeds T texts as vectors of length 1, (T, D).
        samples: Bootstrap resamples of units.
        seed: Seed of the bootstrap.

    Returns:
        Rows of both metrics with 95 % intervals, and the main system's margin over each trivial baseline.

    Raises:
        ValueError: A system does not describe as many outputs as there are classes.
    """
    if wrong := [system for system, texts in systems.items() if len(texts) != len(names)]:
        raise ValueError(f"{', '.join(wrong)} does not describe {len(names)} outputs")
    distinct = sorted(set().union(*systems.values()))
    vectors = dict(zip(distinct, embed(distinct), strict=True))
    classes = embed(names)
    values = {
        system: np.array([class_scores(vectors[text], classes, unit) for unit, text in enumerate(texts)])
        for system, texts in systems.items()
    }
    counts = resampling_counts(len(names), samples, seed)
    rows: list[Row] = []
    for column, (metric, reading) in enumerate(_READINGS.items()):
        of_metric = {system: of_units[:, column] for system, of_units in values.items()}
        rows += mean_rows(metric, reading, of_metric, counts)
    return rows
