"""Labelers on the same units: their labels with trivial baselines, scores of units, and cost."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import polars as pl

from milan_ray.config import Fingerprint
from milan_ray.damaged import LeftOut
from milan_ray.errors import MilanError
from milan_ray.schema import DESCRIPTIONS, EXEMPLARS, RUNS, TABLES, Table
from milan_ray.schema.operations import SHARES
from milan_ray.scoring.bootstrap import Interval, ratio, resampling_counts
from milan_ray.scoring.evaluation import (
    CONSTANT,
    SHUFFLED,
    Row,
    shuffled,
    system_rows,
    unit_values,
)
from milan_ray.storage import ALL_UNITS_KEY, CONFIG_KEY, Storage, inputs_of

Unit = tuple[str, str, int]
"""(model, layer, unit)."""

SECONDS, PER_HOUR = "seconds per unit", "units per hour"

EVERYBODY = "exemplars (for all labelers)"


def common_units(descriptions: pl.DataFrame) -> tuple[list[Unit], dict[str, list[str]]]:
    """The units that every labeler has labelled, and what each says of them.

    Args:
        descriptions: Columns labeler, model, layer, unit, description.

    Returns:
        N units, by model, layer and number; labeler → N descriptions, labelers in the order they first occur.

    Raises:
        MilanError: There is no unit that all have labelled.
    """
    labelers = list(dict.fromkeys(descriptions["labeler"]))
    key = ["model", "layer", "unit"]
    table = descriptions.pivot(on="labeler", index=key, values="description").drop_nulls(labelers).sort(key)
    if table.is_empty():
        said = descriptions.group_by("labeler", maintain_order=True).agg(pl.col("model").unique().sort())
        each = "; ".join(f"{row['labeler']}: {', '.join(row['model'])}" for row in said.iter_rows(named=True))
        raise MilanError(f"no unit is labelled by all of these ({each}); choose --labeler or --model, or label more.")
    return list(table.select(key).iter_rows()), {labeler: table[labeler].to_list() for labeler in labelers}


def with_trivial_labels(systems: Mapping[str, Sequence[str]], constant: str | None) -> dict[str, list[str]]:
    """The labelers, then trivial baselines: one label for all units, and each labeler's own dealt to other units.

    Args:
        systems: Labeler → labels of the same units, the main one first.
        constant: The label for all; None takes the main labeler's commonest, the first in the alphabet among equals.
    """
    main = next(iter(systems.values()))
    if constant is None:
        constant = min(Counter(main).items(), key=lambda pair: (-pair[1], pair[0]))[0]
    found = {labeler: list(labels) for labeler, labels in systems.items()}
    found[CONSTANT] = [constant] * len(main)
    for labeler, labels in systems.items():
        found[_shuffled(labeler, systems)] = shuffled(labels)
    return found


def _shuffled(labeler: str, systems: Iterable[str]) -> str:
    """The name of a labeler's own labels dealt to other units."""
    return SHUFFLED if labeler == next(iter(systems)) else f"{labeler}, {SHUFFLED}"


def unit_score_rows(
    scores: pl.DataFrame,
    units: Sequence[Unit],
    systems: Mapping[str, Sequence[str]],
    *,
    samples: int = 1000,
    seed: int = 0,
) -> list[Row]:
    """Means of the scores by ``jobs.score``, over the units that it scored for all labelers.

    Args:
        scores: Columns of :data:`~milan_ray.schema.UNIT_SCORES`, of one predictor.
        units: N units.
        systems: Labeler → N labels; scores of other labels than these do not count.
        samples: Bootstrap resamples.
        seed: Seed of the bootstrap.

    Returns:
        Rows of every measure that was taken of two labelers or more: the labelers, the main one's constant row, and
        each one's shuffled row.
    """
    key = ["model", "layer", "unit"]
    asked = pl.DataFrame(
        list(units), schema=dict(zip(key, (pl.String, pl.String, pl.Int32), strict=True)), orient="row"
    )
    said = pl.concat(
        asked.with_columns(pl.lit(labeler).alias("labeler"), pl.Series("description", list(labels), pl.String))
        for labeler, labels in systems.items()
    )
    current = scores.filter(pl.col("system") == "own").join(said, on=[*key, "labeler", "description"], how="semi")
    scores = scores.join(current.select(*key, "labeler", "metric").unique(), on=[*key, "labeler", "metric"], how="semi")
    main = next(iter(systems))
    name = pl.col("labeler").replace_strict({one: _shuffled(one, systems) for one in systems})
    scores = scores.filter(pl.col("system").is_in(["own", SHUFFLED]) | (pl.col("labeler") == main)).with_columns(
        pl.when(pl.col("system") == "own")
        .then("labeler")
        .when(pl.col("system") == SHUFFLED)
        .then(name)
        .otherwise(pl.lit(CONSTANT))
        .alias("name")
    )
    rows: list[Row] = []
    for metric in dict.fromkeys(scores["metric"]):
        table = scores.filter(pl.col("metric") == metric, pl.col("value").is_finite())
        table = table.pivot(on="name", index=key, values="value").drop_nulls()
        order = [*systems, CONSTANT, *(_shuffled(labeler, systems) for labeler in systems)]
        present = [one for one in order if one in table.columns]
        if len(table) and len([one for one in present if one in systems]) > 1:
            statistics = {one: unit_values(table[one].to_numpy()) for one in present}
            counts = resampling_counts(len(table), samples, seed)
            rows += system_rows(metric, "mean over units that all could be scored on", statistics, ratio, counts)
    return rows


# -- cost ---------------------------------------------------------------------------------------------------------


def cost_rows(storage: Storage, labelers: Sequence[str], layers: Iterable[tuple[str, str]]) -> list[Row]:
    """Cost of labels by the run log: every stage that they follow from, except exemplars, which all labelers need.

    Seconds are those of one worker at a time, as if nothing had run side by side. What was done for several layers at
    once, as a pass over images, counts by the share of these layers; what was done for all of them, once.

    Args:
        storage: The run directory.
        labelers: Whose labels.
        layers: (model, layer) pairs that all of them have labelled.

    Returns:
        Rows of :data:`SECONDS` and :data:`PER_HOUR`; a labeler whose runs are not recorded, or by a version whose
        seconds do not add up (:data:`~milan_ray.schema.operations.SHARES`), has none. What a killed job had done before
        it was started again is in no record.
    """
    pairs = list(dict.fromkeys(layers))
    runs = _runs(storage)
    found: dict[str, dict[tuple[str, str, str], float]] = defaultdict(dict)
    units: Counter[str] = Counter()
    missing: set[str] = set()
    for model, layer in pairs:
        made = storage.metadata(EXEMPLARS, model=model, layer=layer) or {}
        ran = ("exemplars", made.get(CONFIG_KEY, ""))
        if ran in runs:
            found[EVERYBODY] |= _spent(runs, ran, model)
            units[EVERYBODY] += storage.count(DESCRIPTIONS, labeler=labelers[0], model=model, layer=layer)
        for labeler in labelers:
            keys = {"labeler": labeler, "model": model, "layer": layer}
            behind = [run for run in sorted(lineage(storage, DESCRIPTIONS, keys)) if run in runs]
            if not behind:
                missing.add(labeler)
            units[labeler] += storage.count(DESCRIPTIONS, **keys)
            # By its run, so that what serves several layers, as the embeddings of a probe, counts once.
            for run in behind:
                found[labeler] |= _spent(runs, run, model)
    rows: list[Row] = []
    for labeler in (*labelers, EVERYBODY):
        if labeler in missing or not found[labeler] or not units[labeler]:
            continue
        seconds = math.fsum(found[labeler].values()) / units[labeler]
        if not seconds > 0:  # NaN: of an earlier version
            continue
        stages = ", ".join(dict.fromkeys(stage for stage, _, _ in found[labeler]))
        for metric, value in ((SECONDS, seconds), (PER_HOUR, 3600 / seconds)):
            rows.append((labeler, metric, Interval(value, math.nan, math.nan), units[labeler], stages))
    return rows


def _runs(storage: Storage) -> dict[tuple[str, str], dict[str, float]]:
    """(stage, run) → model → its seconds; NaN where these do not add up, in records of earlier versions."""
    found: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    left_out, columns = LeftOut("costs"), ["stage", "run", "model", "seconds"]
    for keys in storage.partitions(RUNS):
        table = left_out.unless_damaged(partial(storage.read, RUNS, columns, **keys), None)
        if table is None:
            continue
        adds_up = SHARES.items() <= (storage.metadata(RUNS, **keys) or {}).items()
        for row in table.to_pylist():
            found[row["stage"], row["run"]][row["model"]] = row["seconds"] if adds_up else math.nan
    return found


def _spent(
    runs: Mapping[tuple[str, str], Mapping[str, float]], run: tuple[str, str], model: str
) -> dict[tuple[str, str, str], float]:
    """A run, by the model that it was of, and its seconds; a network that goes by two names has it twice."""
    of = model if model in runs[run] else next(iter(runs[run]))
    return {(*run, of): runs[run][of]}


def lineage(storage: Storage, noun: Table, keys: Mapping[str, str]) -> set[tuple[str, str]]:
    """(stage, run) of a partition and of all that it was made from, exemplars left out."""
    meta = storage.metadata(noun, **keys) or {}
    found = {(keys.get("labeler", noun.name), meta.get(CONFIG_KEY, ""))}
    parts = inputs_of(meta)
    for above in TABLES:
        if above is EXEMPLARS or above.name not in parts:
            continue
        same = {key: keys[key] for key in ("model", "layer") if key in above.partition}
        for other in storage.partitions(above, **same):
            made = LeftOut("costs").unless_damaged(partial(storage.metadata, above, **other), None) or {}
            whole = made.get(ALL_UNITS_KEY, made.get(CONFIG_KEY, ""))
            if Fingerprint.of({above.name: whole}).inputs[above.name] == parts[above.name]:
                found |= lineage(storage, above, other)
    return found
