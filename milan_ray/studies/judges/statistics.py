"""Judges that know the truth: descriptions of the built-in world's networks against the world itself.

The oracle that wrote the training captions must not be the only judge. These ask other questions: does the description
name what was planted in the unit, does the unit fire on held-out scenes that show what the description names, does it
fire less when just that is taken out of the scene, and is there anything to describe in the unit at all.

Systems come as ``{system: descriptions of the same N units}``, the main one first, best from
:func:`~milan_ray.scoring.evaluation.with_trivial_rows`: its shuffled and constant rows are the levels to beat.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pyarrow as pa

from milan_ray.scoring.auroc import auroc
from milan_ray.scoring.bootstrap import interval, ratio, resampling_counts
from milan_ray.scoring.evaluation import score_table, system_rows, unit_values
from milan_ray.world.lexicon import NAMES, concepts_in
from milan_ray.world.scenes import Scene, concept_maps, render, without

Systems = Mapping[str, Sequence[str]]
"""System → descriptions of the same units."""

IOU_THRESHOLD = 0.04
"""Network Dissection's: units whose best concept lies above it are called interpretable."""


def planted_accuracy(
    experiment: str, planted: Sequence[str], systems: Systems, *, samples: int = 1000, seed: int = 0
) -> pa.Table:
    """Judge (a): the share of planted units whose description names the planted concept, by any synonym.

    Args:
        experiment: Name of the evaluation.
        planted: The concept of each of U units, known before any exemplar was seen.
        systems: System → U descriptions.
        samples: Bootstrap resamples.
        seed: Seed of the bootstrap.

    Returns:
        Rows ``planted-accuracy`` of schema SCORES.

    Raises:
        ValueError: A system does not describe every unit, or a concept is not the world's.
    """
    truth = [NAMES.index(concept) for concept in planted]
    units = np.arange(len(planted))
    hits = {system: unit_values(_named(texts, len(planted))[units, truth]) for system, texts in systems.items()}
    counts = resampling_counts(len(planted), samples, seed)
    reading = "share of planted units whose description names the planted concept"
    return score_table(experiment, system_rows("planted-accuracy", reading, hits, ratio, counts))


def presence(scenes: Sequence[Scene]) -> np.ndarray:
    """Which scenes show which concepts, by at least one pixel: bool (N, C), columns as ``lexicon.NAMES``."""
    return np.array([[concept in maps for concept in NAMES] for maps in map(concept_maps, scenes)])


def described_auroc(
    experiment: str,
    activations: np.ndarray,
    shown: np.ndarray,
    systems: Systems,
    *,
    samples: int = 1000,
    seed: int = 0,
) -> pa.Table:
    """Judge (b): how well a unit's activation tells held-out scenes that show what is described from those that do not.

    Per unit the mean AUROC over the described concepts (``auroc``), and the AUROC for all of them at once
    (``auroc-all-present``). One half where the description names no concept, or none that some scenes show and others
    do not.

    Args:
        experiment: Name of the evaluation.
        activations: (N, U), each unit's maximum over positions on each of N held-out scenes.
        shown: bool (N, C) from :func:`presence` on the same scenes.
        systems: System → U descriptions.
        samples: Bootstrap resamples.
        seed: Seed of the bootstrap.

    Returns:
        Rows of schema SCORES.

    Raises:
        ValueError: A system does not describe every unit, or an activation is NaN.
    """
    units = activations.shape[1]
    named = {system: _named(texts, units) for system, texts in systems.items()}
    single = auroc(activations, shown)
    sets, chosen = np.unique(np.concatenate(list(named.values())), axis=0, return_inverse=True)
    together = auroc(activations, shown.astype(np.int64) @ sets.T == sets.sum(1))
    joint = np.nan_to_num(together[np.tile(np.arange(units), len(named)), chosen.reshape(-1)], nan=0.5)
    means = {system: unit_values(_mean_of_named(single, of_units, 0.5)) for system, of_units in named.items()}
    joints = dict(zip(named, map(unit_values, np.split(joint, len(named))), strict=True))
    counts = resampling_counts(units, samples, seed)
    reading = "AUROC of the unit's activation for {} in held-out scenes, mean over units; .5 is chance"
    return score_table(
        experiment,
        system_rows("auroc", reading.format("each described concept"), means, ratio, counts)
        + system_rows("auroc-all-present", reading.format("all described concepts at once"), joints, ratio, counts),
    )


def causal_drops(
    experiment: str,
    activations: Callable[[np.ndarray], np.ndarray],
    scenes: Sequence[Scene],
    systems: Systems,
    *,
    pairs: int = 16,
    samples: int = 1000,
    seed: int = 0,
) -> pa.Table:
    """Judge (c): how much a unit's activation falls when what is described is taken out of the scene, all else kept.

    A unit's drop is the mean over its described concepts and over scenes that show them, in standard deviations of the
    unit over the unchanged scenes; 0 where the description names nothing that can be taken out, or the unit is dead.

    Args:
        experiment: Name of the evaluation.
        activations: From images uint8 (N, 64, 64, 3) to each unit's maximum over positions, (N, U).
        scenes: Held-out scenes to take pairs from.
        systems: System → U descriptions.
        pairs: Pairs per concept at most: the first scenes that can lose it.
        samples: Bootstrap resamples.
        seed: Seed of the bootstrap.

    Returns:
        Rows ``causal-drop`` (mean drop, standard deviations) and ``causal-share`` (share of units whose activation
        falls) of schema SCORES.

    Raises:
        ValueError: A system does not describe every unit.
    """
    units = len(next(iter(systems.values())))
    named = {system: _named(texts, units) for system, texts in systems.items()}
    wanted = np.any([of_units.any(0) for of_units in named.values()], axis=0)
    found: dict[str, list[tuple[Scene, Scene]]] = {name: [] for name, use in zip(NAMES, wanted, strict=True) if use}
    for scene in scenes:
        for concept in concept_maps(scene).keys() & found.keys():
            if len(found[concept]) < pairs and (changed := without(scene, concept)) is not None:
                found[concept].append((scene, changed))

    falls = np.full((units, len(NAMES)), np.nan)
    unchanged = []
    for concept, couples in found.items():
        if couples:
            before = activations(np.stack([render(scene) for scene, _ in couples]))
            after = activations(np.stack([render(changed) for _, changed in couples]))
            falls[:, NAMES.index(concept)] = (before - after).mean(0)
            unchanged.append(before)
    if unchanged:
        deviation = np.concatenate(unchanged).std(0)[:, None]
        falls /= np.where(deviation > 0, deviation, np.inf)

    drops = {system: _mean_of_named(falls, of_units, 0.0) for system, of_units in named.items()}
    counts = resampling_counts(units, samples, seed)
    sizes = {system: unit_values(drop) for system, drop in drops.items()}
    shares = {system: unit_values(drop > 0) for system, drop in drops.items()}
    reading = "of the unit's activation when what is described is taken out of the scene"
    return score_table(
        experiment,
        system_rows("causal-drop", f"mean fall {reading}, in standard deviations; 0 is none", sizes, ratio, counts)
        + system_rows("causal-share", f"share of units with a fall {reading}", shares, ratio, counts),
    )


def iou_shares(experiment: str, ious: Mapping[str, np.ndarray], *, samples: int = 1000, seed: int = 0) -> pa.Table:
    """Judge (d): the share of units that overlap some concept at all, in a trained and in an untrained network.

    Args:
        experiment: Name of the evaluation.
        ious: Network (``trained``, ``random-weights``) → each unit's highest IoU with a concept, (U,).
        samples: Bootstrap resamples.
        seed: Seed of the bootstrap.

    Returns:
        Rows ``iou>.04`` of schema SCORES.
    """
    note = "share of units whose mask overlaps some concept with an IoU above .04"
    rows = [
        (
            network,
            "iou>.04",
            interval(unit_values(iou > IOU_THRESHOLD), ratio, resampling_counts(len(iou), samples, seed)),
            len(iou),
            note,
        )
        for network, iou in ious.items()
    ]
    return score_table(experiment, rows)


def _named(texts: Sequence[str], units: int) -> np.ndarray:
    """Which concepts each description names: bool (U, C)."""
    if len(texts) != units:
        raise ValueError(f"{len(texts)} descriptions for {units} units")
    return np.array([[concept in named for concept in NAMES] for named in map(concepts_in, texts)])


def _mean_of_named(values: np.ndarray, named: np.ndarray, default: float) -> np.ndarray:
    """Per unit the mean of its named concepts' values (U, C), without NaN; a default where nothing is left: (U,)."""
    known = named & ~np.isnan(values)
    sums = np.where(known, values, 0).sum(1)
    return np.where(known.any(1), sums / np.maximum(known.sum(1), 1), default)
