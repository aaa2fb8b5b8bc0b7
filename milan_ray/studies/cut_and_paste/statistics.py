"""Cut-and-paste adversarial images: what a unit responds to, pasted into other images (paper, Appendix D)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F

from milan_ray.scoring.bootstrap import Interval, difference, interval, ratio, resampling_counts
from milan_ray.scoring.evaluation import unit_values

DIFFERENT, OTHERS = "different words", "other units"
"""Groups of units: those whose descriptions have the most different words, and a sample of the others."""

CRITERION = "max-word-difference"
"""The criterion of :mod:`milan_ray.studies.analysis.statistics` by which units are chosen."""

TARGETS = 3
"""Number of classes per unit that its cuts may mislead to: those with the largest weights in the last layer."""

MARGIN = 1 / 16
"""Margin cut out around the mask, which is smaller than what its unit sees, as a share of the image's height."""

LARGEST = 1 / 3
"""Largest share of an image that a cut may cover; larger cuts hide most of the original."""

OUTCOMES = ("fooled", "control", "beyond control")
"""Outcomes that are counted, see :func:`rates`."""


def choose_units(scores: pl.DataFrame, count: int, seed: int = 0) -> pl.DataFrame:
    """The units with the highest word difference, and as many random other units.

    Units of equal score stay in the order of the table.

    Args:
        scores: Columns layer, unit, description and :data:`CRITERION`, of one layer.
        count: Maximum number of units per group; if there are fewer than twice as many units, half of them.
        seed: Seed of the choice of other units.

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
    """The area to cut out: a mask, resized to the size of the images and extended by :data:`MARGIN`.

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
    area: np.ndarray = F.max_pool2d(wide, 2 * reach + 1, stride=1, padding=reach)[0, 0].numpy() > 0
    return area


def paste(originals: np.ndarray, distractors: np.ndarray, cuts: np.ndarray) -> np.ndarray:
    """Pastes every distractor's cut into every original, at the same position.

    Args:
        originals: uint8 (m, H, W, 3).
        distractors: uint8 (n, H, W, 3).
        cuts: bool (n, H, W).

    Returns:
        uint8 (m, n, H, W, 3).
    """
    return np.where(cuts[None, ..., None], distractors[None], originals[:, None])


def rates(pairs: pl.DataFrame, samples: int = 2000) -> dict[str, dict[str, Interval]]:
    """How often pasting misleads to a class of the unit that neither image shows, with 95 % intervals over units.

    Every unit has the same weight.

    Args:
        pairs: Columns layer, unit, group, fooled, control_fooled, a row per original and cut.
        samples: Bootstrap resamples.

    Returns:
        Group → outcome → rate: ``fooled``; ``control``, for the same cut from images that the unit is silent on;
        ``beyond control``, the difference of both.
    """
    units = pairs.group_by("group", "layer", "unit", maintain_order=True).agg(
        pl.col("fooled").mean(), pl.col("control_fooled").mean()
    )
    outcomes = {}
    for (group,), shares in units.group_by(["group"], maintain_order=True):
        counts = resampling_counts(len(shares), samples)
        fooled, control = (unit_values(shares[column].to_numpy()) for column in ("fooled", "control_fooled"))
        values = (
            interval(fooled, ratio, counts),
            interval(control, ratio, counts),
            difference(fooled, control, ratio, counts),
        )
        outcomes[str(group)] = dict(zip(OUTCOMES, values, strict=True))
    return outcomes


def between_groups(pairs: pl.DataFrame, samples: int = 2000, seed: int = 0) -> Interval:
    """How much more often units of different words mislead than other units, both less their controls.

    Args:
        pairs: As for :func:`rates`.
        samples: Bootstrap resamples, over units.
        seed: Seed of the bootstrap.
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


def best_examples(pairs: pl.DataFrame, count: int = 3) -> pl.DataFrame:
    """One pair of each of the units of different words that mislead most often, for the figure.

    Args:
        pairs: As for :func:`rates`.
        count: Maximum number of units.
    """
    fooled = pairs.filter(pl.col("group") == DIFFERENT).with_columns(
        pl.col("fooled").mean().over("layer", "unit").alias("rate")
    )
    fooled = fooled.filter("fooled").sort("rate", descending=True, maintain_order=True)
    return fooled.unique(["layer", "unit"], keep="first", maintain_order=True).head(count).drop("rate")


def describe_rates(groups: Mapping[str, Mapping[str, Interval]]) -> str:
    """The rates as lines of text."""
    return "\n".join(
        f"  {group}: " + ", ".join(f"{name} {v.value:.3f} [{v.low:.3f}, {v.high:.3f}]" for name, v in outcomes.items())
        for group, outcomes in groups.items()
    )
