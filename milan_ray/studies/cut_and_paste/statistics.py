"""Cut-and-paste adversarial images: what a unit sees, pasted where it does not belong (paper, Appendix D)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F

from milan_ray.scoring.bootstrap import Interval, difference, interval, ratio, resampling_counts

DIFFERENT, OTHERS = "different words", "other units"
"""Groups of units: those whose descriptions are made of the most different words, and a sample of the rest."""

CRITERION = "max-word-difference"
"""The criterion of :mod:`milan_ray.studies.analysis.statistics` by which units are chosen."""

TARGETS = 3
"""Classes per unit that it may mislead to: those it speaks for most, by the weights of the last layer."""

MARGIN = 1 / 16
"""Margin cut out around the mask, as a share of the image's height: a mask is smaller than what its unit sees."""

LARGEST = 1 / 3
"""Share of an image that a cut may cover: beyond it little of the original is left to be mistaken."""

OUTCOMES = ("fooled", "control", "beyond control")
"""Outcomes that are counted, see :func:`rates`."""


def choose_units(scores: pl.DataFrame, count: int, seed: int = 0) -> pl.DataFrame:
    """The units with the highest word difference, and as many of the others at random.

    Units of equal score stay in the table's order.

    Args:
        scores: Columns layer, unit, description and :data:`CRITERION`, of one layer.
        count: Units per group at most; with fewer than twice as many, half of all.
        seed: Of the others.

    Returns:
        Columns layer, unit, description, score, group.
    """
    count = min(count, len(scores) // 2)
    order = np.argsort(-scores[CRITERION].to_numpy(), kind="stable")
    others = np.sort(np.random.default_rng(seed).permutation(order[count:])[:count])
    named = scores.select("layer", "unit", "description", pl.col(CRITERION).alias("score"))
    groups = [
        named[places].with_columns(pl.lit(group).alias("group"))
        for group, places in ((DIFFERENT, order[:count]), (OTHERS, others))
    ]
    return pl.concat(groups)


def grown(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The area to cut out: a mask in the size of the images, with a margin of :data:`MARGIN`.

    Args:
        mask: bool (h, w).
        size: Height and width of the images.

    Returns:
        bool (H, W).
    """
    rows = np.arange(size[0]) * mask.shape[0] // size[0]
    columns = np.arange(size[1]) * mask.shape[1] // size[1]
    reach = max(1, round(MARGIN * size[0]))
    wide = torch.from_numpy(mask[rows[:, None], columns].astype(np.float32))[None, None]
    found: np.ndarray = F.max_pool2d(wide, 2 * reach + 1, stride=1, padding=reach)[0, 0].numpy() > 0
    return found


def paste(originals: np.ndarray, distractors: np.ndarray, cuts: np.ndarray) -> np.ndarray:
    """Every distractor's cut on every original, at its own place.

    Args:
        originals: uint8 (m, H, W, 3).
        distractors: uint8 (n, H, W, 3).
        cuts: bool (n, H, W).

    Returns:
        uint8 (m, n, H, W, 3).
    """
    return np.where(cuts[None, ..., None], distractors[None], originals[:, None])


def rates(pairs: pl.DataFrame, samples: int = 2000) -> dict[str, dict[str, Interval]]:
    """How often pasting misleads to a class of the unit's that is neither image's, with 95 % intervals over units.

    Every unit counts the same.

    Args:
        pairs: Columns layer, unit, group, fooled, control_fooled, a row per original and cut.
        samples: Bootstrap resamples.

    Returns:
        Group → outcome → rate: ``fooled``; ``control``, with the same cut from images that the unit is silent on;
        ``beyond control``, their difference.
    """
    units = pairs.group_by("group", "layer", "unit", maintain_order=True).agg(
        pl.col("fooled").mean(), pl.col("control_fooled").mean()
    )
    found = {}
    for group in dict.fromkeys(units["group"]):
        mine = units.filter(pl.col("group") == group)
        counts = resampling_counts(len(mine), samples)
        fooled, control = (_statistics(mine[column]) for column in ("fooled", "control_fooled"))
        values = (
            interval(fooled, ratio, counts),
            interval(control, ratio, counts),
            difference(fooled, control, ratio, counts),
        )
        found[group] = dict(zip(OUTCOMES, values, strict=True))
    return found


def between_groups(pairs: pl.DataFrame, samples: int = 2000, seed: int = 0) -> Interval:
    """How much more often, beyond their controls, units of different words mislead than others; a bootstrap over units.

    Args:
        pairs: As :func:`rates` takes them.
        samples: Bootstrap resamples.
        seed: Of them.
    """
    units = pairs.group_by("group", "layer", "unit", maintain_order=True).agg(
        (pl.col("fooled").cast(pl.Float64) - pl.col("control_fooled").cast(pl.Float64)).mean().alias("beyond")
    )
    of = {group: units.filter(pl.col("group") == group)["beyond"].to_numpy() for group in (DIFFERENT, OTHERS)}
    means = {
        group: resampling_counts(len(values), samples, seed + place) @ values / len(values)
        for place, (group, values) in enumerate(of.items())
    }
    low, high = np.percentile(means[DIFFERENT] - means[OTHERS], [2.5, 97.5])
    return Interval(float(of[DIFFERENT].mean() - of[OTHERS].mean()), float(low), float(high))


def _statistics(values: pl.Series) -> np.ndarray:
    return np.stack([np.ones(len(values)), values.to_numpy()], axis=1)


def best_examples(pairs: pl.DataFrame, count: int = 3) -> pl.DataFrame:
    """A pair each of the units of different words that mislead most often: those a figure shows.

    Args:
        pairs: As :func:`rates` takes them.
        count: Units at most.
    """
    fooled = pairs.filter(pl.col("group") == DIFFERENT).with_columns(
        pl.col("fooled").mean().over("layer", "unit").alias("rate")
    )
    fooled = fooled.filter("fooled").sort("rate", descending=True, maintain_order=True)
    return fooled.unique(["layer", "unit"], keep="first", maintain_order=True).head(count).drop("rate")


def describe_rates(found: Mapping[str, Mapping[str, Interval]]) -> str:
    """The rates in a few lines."""
    return "\n".join(
        f"  {group}: " + ", ".join(f"{name} {v.value:.3f} [{v.low:.3f}, {v.high:.3f}]" for name, v in outcomes.items())
        for group, outcomes in found.items()
    )
