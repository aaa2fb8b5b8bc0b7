"""The built-in world judges labels of its networks' units on held-out scenes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import polars as pl
import pyarrow as pa

from milan_ray.engine import references
from milan_ray.labelers.compexp import CompExp
from milan_ray.models.registry import ModelSpec
from milan_ray.schema import EXEMPLARS, LEVELS, MANIFEST
from milan_ray.stages import world
from milan_ray.stages.arithmetic import Forwards, arithmetics_of
from milan_ray.storage import Storage
from milan_ray.studies.comparison.statistics import Unit
from milan_ray.studies.judges import statistics as judges
from milan_ray.world.lexicon import CONCEPT, CONCEPTS, KINDS
from milan_ray.world.networks import planted_concepts
from milan_ray.world.probe import WorldProbe
from milan_ray.world.scenes import Scene
from milan_ray.world.training import PREPROCESS

HELD_OUT_SCENES = references.ProbeRef(("world/heldout",))

PLANTED = "world/planted"
"""The network whose units' concepts are known beforehand."""

TRUTH, PLANTED_UNITS = "held-out scenes", "planted units"
"""Suffixes of the names of the judgements' tables."""

BY_KIND = "AUROC by kind of concept"
PLANTED_BY_KIND = "planted units named, by kind of concept"


def of_the_world(storage: Storage, model: str) -> bool:
    """Whether the world can judge a model: a network that looked at the world's scenes."""
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
    """A label as the world's lexicon understands it: what a formula rules out left out, concepts by a word for them.

    Args:
        labeler: Whose label.
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
        units: N units of networks that :func:`of_the_world` takes.
        systems: System → N labels in words (:func:`in_words`), the main one first.
        scenes: Held-out ones.

    Returns:
        Tables of schema SCORES, one per experiment.
    """
    planted = np.array([model == PLANTED for model, _, _ in units])
    tables = []
    if not planted.all():
        tables += _by_scenes(storage, name, *_some(units, systems, ~planted), scenes)
    if planted.any():
        tables += _by_plan(name, *_some(units, systems, planted))
    return tables


def _some(
    units: Sequence[Unit], systems: Mapping[str, Sequence[str]], which: np.ndarray
) -> tuple[list[Unit], dict[str, list[str]]]:
    places = np.flatnonzero(which).tolist()
    return [units[n] for n in places], {name: [labels[n] for n in places] for name, labels in systems.items()}


def _by_scenes(
    storage: Storage,
    name: str,
    units: Sequence[Unit],
    systems: Mapping[str, Sequence[str]],
    held_out: references.ProbeRef,
) -> list[pa.Table]:
    layers: dict[str, list[str]] = {}
    for model, layer, _ in units:
        if layer not in layers.setdefault(model, []):
            layers[model].append(layer)
    sizes = {
        (model, layer): storage.count(LEVELS, model=model, layer=layer) for model, of in layers.items() for layer in of
    }
    starts = dict(zip(sizes, np.cumsum([0, *sizes.values()]).tolist(), strict=False))
    columns = np.array([starts[model, layer] + unit for model, layer, unit in units])
    found = world.truth(storage, layers, held_out)
    maxima = np.concatenate([found[model].activations for model in layers], axis=1)[:, columns]
    best = np.concatenate([found[model].concept for model in layers])[columns]
    scenes = scenes_of(held_out)
    shown = judges.presence(scenes)
    told = f"{name}: {TRUTH}"
    run = activations(storage, layers, columns)
    tables = [
        pa.concat_tables(
            [
                judges.described_auroc(told, maxima, shown, systems),
                judges.causal_drops(told, run, scenes, systems),
            ]
        )
    ]
    parts = []
    for kind in KINDS:
        of_kind = np.array([CONCEPTS[concept].kind == kind for concept in best])
        if of_kind.any():
            _, some = _some(units, systems, of_kind)
            parts.append((kind, judges.described_auroc(told, maxima[:, of_kind], shown, some)))
    note = "AUROC of units whose best concept on held-out scenes, by intersection over union, is of this kind"
    return [*tables, _by_kind(f"{name}: {BY_KIND}", parts, "auroc", note)]


def _by_plan(name: str, units: Sequence[Unit], systems: Mapping[str, Sequence[str]]) -> list[pa.Table]:
    concepts = [planted_concepts[unit] for _, _, unit in units]
    tables = [judges.planted_accuracy(f"{name}: {PLANTED_UNITS}", concepts, systems)]
    parts = []
    for kind in KINDS:
        of_kind = np.array([CONCEPT[concept].kind == kind for concept in concepts])
        if of_kind.any():
            _, some = _some(units, systems, of_kind)
            chosen = [concept for concept, use in zip(concepts, of_kind, strict=True) if use]
            parts.append((kind, judges.planted_accuracy(name, chosen, some)))
    note = "share of units planted with a concept of this kind whose label names it"
    return [*tables, _by_kind(f"{name}: {PLANTED_BY_KIND}", parts, "planted-accuracy", note)]


def _by_kind(experiment: str, parts: Sequence[tuple[str, pa.Table]], metric: str, note: str) -> pa.Table:
    """One measure of several tables, the kinds of concepts in place of metrics."""
    frames = [
        pl.DataFrame(pl.from_arrow(table))
        .filter(pl.col("metric") == metric, ~pl.col("system").str.contains(" − "))
        .with_columns(pl.lit(experiment).alias("experiment"), pl.lit(kind).alias("metric"), pl.lit(note).alias("note"))
        for kind, table in parts
    ]
    return pl.concat(frames).to_arrow().cast(parts[0][1].schema)


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
        storage: The run directory, which says how the models' exemplars were computed.
        layers: Model → layers.
        columns: Places of the U units among those of all layers side by side.
    """
    forwards = {}
    for model, of in layers.items():
        spec = _spec(model)
        assert spec.preprocess == PREPROCESS  # scenes are the network's views as they are
        forwards[model] = Forwards(spec, spec.load, arithmetics_of(storage, model, of), 16)

    def run(images: np.ndarray) -> np.ndarray:
        found = []
        for model, of in layers.items():
            maps = forwards[model].maps(images)
            found += [maps[layer].amax(dim=(2, 3)).numpy() for layer in of]
        return np.concatenate(found, axis=1)[:, columns]

    return run
