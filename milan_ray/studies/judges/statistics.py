"""Judges that know the truth: descriptions of the built-in world's networks against the world itself.

The oracle that writes the training captions must not be the only judge. These judges ask other questions: whether the
description names the concept that was planted in the unit, whether the unit responds to held-out scenes that show what
the description names, whether it responds less when this is removed from the scene, and whether the unit overlaps any
concept.

Systems are given as ``{system: descriptions of the same N units}``, the main one first, usually from
:func:`~milan_ray.scoring.evaluation.with_trivial_rows`: its shuffled and constant rows are trivial baselines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pyarrow as pa

from milan_ray.scoring.auroc import auroc
from milan_ray.scoring.bootstrap import interval, ratio, resampling_counts
from milan_ray.scoring.evaluation import Row, mean_rows, score_table, unit_values
from milan_ray.world.lexicon import NAMES, concepts_in
from milan_ray.world.scenes import Scene, concept_maps, render, without

Systems = Mapping[str, Sequence[str]]
"""System → descriptions of the same units."""

IOU_THRESHOLD = 0.04
"""Network Dissection's: units whose best concept lies above it are called interpretable."""


def planted_accuracy(experiment: str, planted: Sequence[str], systems: Systems) -> pa.Table:
    """Judge (a): the share of planted units whose description names the planted concept, by any synonym.

    Args:
        experiment: Name of the evaluation.
        planted: The concept of each of U units, known before any exemplar was seen.
        systems: System → U descriptions.

    Returns:
        Rows ``planted-accuracy`` of schema SCORES.

    Raises:
        ValueError: A system does not describe every unit, or a concept is not the world's.
    """
    truth = [NAMES.index(concept) for concept in planted]
    units = np.arange(len(planted))
    hits = {system: _named(texts, len(planted))[units, truth] for system, texts in systems.items()}
    reading = "share of planted units whose description names the planted concept"
    return score_table(experiment, mean_rows("planted-accuracy", reading, hits, resampling_counts(len(planted))))


def presence(scenes: Sequence[Scene]) -> np.ndarray:
    """Which scenes show which concepts, by at least one pixel: bool (N, C), columns as ``lexicon.NAMES``."""
    return np.array([[concept in maps for concept in NAMES] for maps in map(concept_maps, scenes)])


def described_auroc(experiment: str, activations: np.ndarray, shown: np.ndarray, systems: Systems) -> pa.Table:
    """Judge (b): how well a unit's activation separates held-out scenes that show what is described from the others.

    Per unit the mean AUROC over the described concepts (``auroc``), and the AUROC for all of them at once
    (``auroc-all-present``). One half if the description names no concept, or none that only some scenes show.

    Args:
        experiment: Name of the evaluation.
        activations: (N, U), each unit's maximum over positions on each of N held-out scenes.
        shown: bool (N, C) from :func:`presence` on the same scenes.
        systems: System → U descriptions.

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
    means = {system: _mean_of_named(single, of_units, 0.5) for system, of_units in named.items()}
    joints = dict(zip(named, np.split(joint, len(named)), strict=True))
    counts = resampling_counts(units)
    reading = "AUROC of the unit's activation for {} in held-out scenes, mean over units; .5 is chance"
    return score_table(
        experiment,
        mean_rows("auroc", reading.format("each described concept"), means, counts)
        + mean_rows("auroc-all-present", reading.format("all described concepts at once"), joints, counts),
    )


def causal_drops(
    experiment: str,
    activations: Callable[[np.ndarray], np.ndarray],
    scenes: Sequence[Scene],
    systems: Systems,
    pairs: int = 16,
) -> pa.Table:
    """Judge (c): how much a unit's activation falls when what is described is removed from the scene.

    A unit's drop is the mean over its described concepts and over scenes that show them, in standard deviations of the
    unit over the unchanged scenes; 0 if nothing that the description names can be removed, or the unit is dead.

    Args:
        experiment: Name of the evaluation.
        activations: From images uint8 (N, 64, 64, 3) to each unit's maximum over positions, (N, U).
        scenes: Held-out scenes to take pairs from.
        systems: System → U descriptions.
        pairs: Maximum number of pairs per concept: the first scenes that it can be removed from.

    Returns:
        Rows ``causal-drop`` (mean drop, standard deviations) and ``causal-share`` (share of units whose activation
        falls) of schema SCORES.

    Raises:
        ValueError: A system does not describe every unit.
    """
    units = len(next(iter(systems.values())))
    named = {system: _named(texts, units) for system, texts in systems.items()}
    wanted = np.any([of_units.any(0) for of_units in named.values()], axis=0)
    concepts = [concept for concept, use in zip(NAMES, wanted, strict=True) if use]
    falls = _falls(activations, _scene_pairs(scenes, concepts, pairs), units)
    drops = {system: _mean_of_named(falls, of_units, 0.0) for system, of_units in named.items()}
    shares = {system: drop > 0 for system, drop in drops.items()}
    counts = resampling_counts(units)
    reading = "of the unit's activation when what is described is taken out of the scene"
    return score_table(
        experiment,
        mean_rows("causal-drop", f"mean fall {reading}, in standard deviations; 0 is none", drops, counts)
        + mean_rows("causal-share", f"share of units with a fall {reading}", shares, counts),
    )


def _scene_pairs(scenes: Sequence[Scene], concepts: Sequence[str], most: int) -> dict[str, list[tuple[Scene, Scene]]]:
    """Concept → the first scenes that it can be removed from, each with and without it."""
    pairs: dict[str, list[tuple[Scene, Scene]]] = {concept: [] for concept in concepts}
    for scene in scenes:
        for concept in concept_maps(scene).keys() & pairs.keys():
            if len(pairs[concept]) < most and (changed := without(scene, concept)) is not None:
                pairs[concept].append((scene, changed))
    return pairs


def _falls(
    activations: Callable[[np.ndarray], np.ndarray], pairs: Mapping[str, Sequence[tuple[Scene, Scene]]], units: int
) -> np.ndarray:
    """Mean fall of every unit without a concept, in standard deviations: (U, C); NaN for concepts without a pair."""
    falls = np.full((units, len(NAMES)), np.nan)
    unchanged = []
    for concept, scenes in pairs.items():
        if scenes:
            before, after = (
                activations(np.stack([render(scene) for scene in side])) for side in zip(*scenes, strict=True)
            )
            falls[:, NAMES.index(concept)] = (before - after).mean(0)
            unchanged.append(before)
    if unchanged:
        deviation = np.concatenate(unchanged).std(0)[:, None]
        falls /= np.where(deviation > 0, deviation, np.inf)
    return falls


def iou_shares(experiment: str, ious: Mapping[str, np.ndarray]) -> pa.Table:
    """Judge (d): the share of units that overlap some concept at all, in a trained and in an untrained network.

    Args:
        experiment: Name of the evaluation.
        ious: Network (``trained``, ``random-weights``) → each unit's highest IoU with a concept, (U,).

    Returns:
        Rows ``iou>.04`` of schema SCORES.
    """
    note = "share of units whose mask overlaps some concept with an IoU above .04"
    rows: list[Row] = []
    for network, iou in ious.items():
        share = interval(unit_values(iou > IOU_THRESHOLD), ratio, resampling_counts(len(iou)))
        rows.append((network, "iou>.04", share, len(iou), note))
    return score_table(experiment, rows)


def _named(texts: Sequence[str], units: int) -> np.ndarray:
    """Which concepts each description names: bool (U, C)."""
    if len(texts) != units:
        raise ValueError(f"{len(texts)} descriptions for {units} units")
    return np.array([[concept in named for concept in NAMES] for named in map(concepts_in, texts)])


def _mean_of_named(values: np.ndarray, named: np.ndarray, default: float) -> np.ndarray:
    """Per unit the mean of its named concepts' values (U, C) except NaN: (U,); a default if nothing remains."""
    known = named & ~np.isnan(values)
    sums = np.where(known, values, 0).sum(1)
    return np.where(known.any(1), sums / np.maximum(known.sum(1), 1), default)
