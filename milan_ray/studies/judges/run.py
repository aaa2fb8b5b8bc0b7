"""The built-in world judges labels of its networks' units on held-out scenes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import polars as pl
import pyarrow as pa

from milan_ray.engine import references
from milan_ray.engine.stage import pairs
from milan_ray.labelers.compexp import CompExp
from milan_ray.models.registry import ModelSpec
from milan_ray.schema import EXEMPLARS, LEVELS, MANIFEST, SCORES
from milan_ray.stages import world
from milan_ray.stages.arithmetic import Forwards, arithmetics_of
from milan_ray.storage import Storage
from milan_ray.studies.judges import statistics as judges
from milan_ray.studies.tables import Unit, frame_of, table_of
from milan_ray.world.lexicon import CONCEPT, CONCEPTS, KINDS
from milan_ray.world.networks import planted_concepts
from milan_ray.world.probe import WorldProbe
from milan_ray.world.scenes import Scene
from milan_ray.world.training import PREPROCESS

HELD_OUT_SCENES = references.ProbeRef(("world/heldout",))

PLANTED = "world/planted"
"""The network with units built for known concepts."""

TRUTH, PLANTED_UNITS = "held-out scenes", "planted units"
"""Suffixes of the names of the judgements' tables."""

BY_KIND = "AUROC by kind of concept"
PLANTED_BY_KIND = "planted units named, by kind of concept"


def of_the_world(storage: Storage, model: str) -> bool:
    """Whether the world can judge a model: a network that was dissected on the world's scenes."""
    layers = storage.partitions(EXEMPLARS, model=model) if model.startswith("world/") else []
    if not layers:
        return False
    probe = (storage.metadata(EXEMPLARS, **layers[0]) or {}).get("probe", "")
    if not storage.count(MANIFEST, probe=probe):
        return False
    root = storage.read_rows(MANIFEST, 0, 1, ["root"], probe=probe)["root"][0].as_py()
    return root.startswith("world:") and _spec(model).images is None


def _spec(model: str) -> ModelSpec:
    return references.model(references.ModelRef(model))


def in_words(labeler: str, label: str) -> str:
    """A label in words of the world's lexicon: concepts become words, and negated parts of a formula are left out.

    Args:
        labeler: The labeler of the label.
        label: The label.
    """
    parts = [label]
    if labeler == CompExp.name:
        parts = [part for part in label.replace(" and ", " or ").split(" or ") if not part.startswith("not ")]
    return ", ".join(CONCEPT[part].synonyms[0] if part in CONCEPT else part for part in parts)


def judge_labels(
    storage: Storage,
    name: str,
    units: Sequence[Unit],
    systems: Mapping[str, Sequence[str]],
    scenes: references.ProbeRef = HELD_OUT_SCENES,
) -> list[pa.Table]:
    """Judges labels of the world's networks by held-out scenes and by what was planted.

    Args:
        storage: The run directory, which holds the units' levels.
        name: Name of the comparison.
        units: N units of networks that :func:`of_the_world` accepts.
        systems: System → N labels in words (:func:`in_words`), the main one first.
        scenes: Held-out scenes.

    Returns:
        Tables of schema SCORES, one per experiment.
    """
    planted = np.array([model == PLANTED for model, _, _ in units])
    tables = []
    if not planted.all():
        tables += _by_scenes(
            storage, name, [units[n] for n in np.flatnonzero(~planted).tolist()], labels_of(systems, ~planted), scenes
        )
    if planted.any():
        tables += _by_plan(name, [units[n] for n in np.flatnonzero(planted).tolist()], labels_of(systems, planted))
    return tables


def labels_of(systems: Mapping[str, Sequence[str]], which: np.ndarray) -> dict[str, list[str]]:
    """The labels of some of the units, which are given as a mask."""
    return {name: [labels[n] for n in np.flatnonzero(which).tolist()] for name, labels in systems.items()}


def _by_scenes(
    storage: Storage,
    name: str,
    units: Sequence[Unit],
    systems: Mapping[str, Sequence[str]],
    held_out: references.ProbeRef,
) -> list[pa.Table]:
    layers: dict[str, list[str]] = {}
    for model, layer in dict.fromkeys((model, layer) for model, layer, _ in units):
        layers.setdefault(model, []).append(layer)
    sizes = {(model, layer): storage.count(LEVELS, model=model, layer=layer) for model, layer in pairs(layers)}
    starts = dict(zip(sizes, np.cumsum([0, *sizes.values()]).tolist(), strict=False))
    columns = np.array([starts[model, layer] + unit for model, layer, unit in units])
    truths = world.truth(storage, layers, held_out)
    maxima = np.concatenate([truths[model].activations for model in layers], axis=1)[:, columns]
    best = np.concatenate([truths[model].concept for model in layers])[columns]
    scenes = scenes_of(held_out)
    shown = judges.presence(scenes)
    experiment = f"{name}: {TRUTH}"
    table = pa.concat_tables(
        [
            judges.described_auroc(experiment, maxima, shown, systems),
            judges.causal_drops(experiment, activations(storage, layers, columns), scenes, systems),
        ]
    )
    note = "AUROC of units whose best concept on held-out scenes, by intersection over union, is of this kind"
    by_kind = _by_kind(
        f"{name}: {BY_KIND}",
        [CONCEPTS[concept].kind for concept in best],
        lambda which: judges.described_auroc(experiment, maxima[:, which], shown, labels_of(systems, which)),
        "auroc",
        note,
    )
    return [table, by_kind]


def _by_plan(name: str, units: Sequence[Unit], systems: Mapping[str, Sequence[str]]) -> list[pa.Table]:
    concepts = np.array([planted_concepts[unit] for _, _, unit in units])
    by_kind = _by_kind(
        f"{name}: {PLANTED_BY_KIND}",
        [CONCEPT[concept].kind for concept in concepts],
        lambda which: judges.planted_accuracy(name, concepts[which].tolist(), labels_of(systems, which)),
        "planted-accuracy",
        "share of units planted with a concept of this kind whose label names it",
    )
    return [judges.planted_accuracy(f"{name}: {PLANTED_UNITS}", concepts.tolist(), systems), by_kind]


def _by_kind(
    experiment: str, kinds: Sequence[str], judge: Callable[[np.ndarray], pa.Table], metric: str, note: str
) -> pa.Table:
    """One measure for each kind of concept, with the kind in the column of metrics.

    Args:
        experiment: Name of the evaluation.
        kinds: Kind of each unit's concept.
        judge: Judges some of the units, bool (N,).
        metric: The measure.
        note: Note of all rows.
    """
    frames = []
    for kind in KINDS:
        which = np.array([of_unit == kind for of_unit in kinds])
        if which.any():
            rows = frame_of(judge(which)).filter(pl.col("metric") == metric, ~pl.col("system").str.contains(" − "))
            frames.append(rows.with_columns(experiment=pl.lit(experiment), metric=pl.lit(kind), note=pl.lit(note)))
    return table_of(SCORES, pl.concat(frames))


def scenes_of(ref: references.ProbeRef) -> list[Scene]:
    """All scenes of one of the world's probes."""
    probe = references.probe(ref)
    assert isinstance(probe, WorldProbe)
    return [probe.scene(image_id) for image_id in range(probe.size)]


def activations(
    storage: Storage, layers: Mapping[str, Sequence[str]], columns: np.ndarray | slice = slice(None)
) -> Callable[[np.ndarray], np.ndarray]:
    """A function from scenes (N, 64, 64, 3) to units' maxima (N, U).

    Args:
        storage: The run directory, which holds the arithmetic of the models' exemplars.
        layers: Model → layers.
        columns: Indices of the U units among the units of all layers, concatenated.
    """
    forwards = {}
    for model, names in layers.items():
        spec = _spec(model)
        assert spec.preprocess == PREPROCESS  # so that scenes are the network's views
        forwards[model] = Forwards(spec, spec.load, arithmetics_of(storage, model, names), 16)

    def run(images: np.ndarray) -> np.ndarray:
        maxima = []
        for model, names in layers.items():
            maps = forwards[model].maps(images)
            maxima += [maps[layer].amax(dim=(2, 3)).numpy() for layer in names]
        return np.concatenate(maxima, axis=1)[:, columns]

    return run
