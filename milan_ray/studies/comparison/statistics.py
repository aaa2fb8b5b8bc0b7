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
from milan_ray.scoring.bootstrap import Interval, resampling_counts
from milan_ray.scoring.evaluation import CONSTANT, SHUFFLED, Row, mean_rows, shuffled, with_trivial_rows
from milan_ray.storage import ALL_UNITS_KEY, CONFIG_KEY, Storage, inputs_of
from milan_ray.studies.tables import Unit

SECONDS, PER_HOUR = "seconds per unit", "units per hour"

EVERYBODY = "exemplars (for all labelers)"


def common_units(descriptions: pl.DataFrame) -> tuple[list[Unit], dict[str, list[str]]]:
    """The units that every labeler has labelled, and their labels.

    Args:
        descriptions: Columns labeler, model, layer, unit, description.

    Returns:
        N units, by model, layer and number; labeler → N descriptions, labelers in the order they first occur.

    Raises:
        MilanError: No unit is labelled by all of them.
    """
    labelers = list(dict.fromkeys(descriptions["labeler"]))
    key = ["model", "layer", "unit"]
    table = descriptions.pivot(on="labeler", index=key, values="description").drop_nulls(labelers).sort(key)
    if table.is_empty():
        models = descriptions.group_by("labeler", maintain_order=True).agg(pl.col("model").unique().sort())
        each = "; ".join(f"{labeler}: {', '.join(names)}" for labeler, names in models.iter_rows())
        raise MilanError(f"no unit is labelled by all of these ({each}); choose --labeler or --model, or label more.")
    return list(table.select(key).iter_rows()), {labeler: table[labeler].to_list() for labeler in labelers}


def with_trivial_labels(systems: Mapping[str, Sequence[str]], constant: str | None) -> dict[str, list[str]]:
    """Adds trivial baselines to labelers: one label for all units, and each labeler's labels given to other units.

    Args:
        systems: Labeler → labels of the same units, the main one first.
        constant: The label for all units; None uses the main labeler's most common one (ties: alphabetically first).
    """
    if constant is None:
        main = Counter(next(iter(systems.values())))
        constant = min(main, key=lambda label: (-main[label], label))
    others = {_shuffled(labeler, systems): shuffled(labels) for labeler, labels in systems.items()}
    return with_trivial_rows(systems, constant) | others


def _shuffled(labeler: str, systems: Iterable[str]) -> str:
    """Name of the baseline that gives a labeler's labels to other units."""
    return SHUFFLED if labeler == next(iter(systems)) else f"{labeler}, {SHUFFLED}"


def unit_score_rows(
    scores: pl.DataFrame,
    units: Sequence[Unit],
    systems: Mapping[str, Sequence[str]],
) -> list[Row]:
    """Means of the scores by ``jobs.score``, over the units that it scored for all labelers.

    Args:
        scores: Columns of :data:`~milan_ray.schema.UNIT_SCORES`, of one predictor.
        units: N units.
        systems: Labeler → N labels; scores of other labels are ignored.

    Returns:
        Rows of every measure that exists for at least two labelers: the labelers, the constant baseline of the main
        labeler, and the shuffled baseline of each labeler.
    """
    key = ["model", "layer", "unit"]
    main, own = next(iter(systems)), pl.col("system") == "own"
    requested = pl.DataFrame(units, {"model": pl.String, "layer": pl.String, "unit": pl.Int32}, orient="row")
    labels = pl.concat(
        requested.with_columns(pl.lit(labeler).alias("labeler"), pl.Series("description", texts, pl.String))
        for labeler, texts in systems.items()
    )
    current = scores.filter(own).join(labels, on=[*key, "labeler", "description"], how="semi")
    scores = scores.join(current, on=[*key, "labeler", "metric"], how="semi")
    scores = scores.filter(pl.col("system").is_in(["own", SHUFFLED]) | (pl.col("labeler") == main)).with_columns(
        pl.when(own)
        .then("labeler")
        .when(pl.col("system") == SHUFFLED)
        .then(pl.col("labeler").replace_strict({labeler: _shuffled(labeler, systems) for labeler in systems}))
        .otherwise(pl.lit(CONSTANT))
        .alias("name")
    )
    order = [*systems, CONSTANT, *(_shuffled(labeler, systems) for labeler in systems)]
    rows: list[Row] = []
    for metric in dict.fromkeys(scores["metric"]):
        table = scores.filter(pl.col("metric") == metric, pl.col("value").is_finite())
        table = table.pivot(on="name", index=key, values="value").drop_nulls()
        values = {name: table[name].to_numpy() for name in order if name in table.columns}
        if len(table) and len(values.keys() & systems.keys()) > 1:
            note = "mean over units that all could be scored on"
            rows += mean_rows(metric, note, values, resampling_counts(len(table)))
    return rows


# -- cost ---------------------------------------------------------------------------------------------------------


def cost_rows(storage: Storage, labelers: Sequence[str], layers: Iterable[tuple[str, str]]) -> list[Row]:
    """Cost of labels by the run log: every stage that they depend on, except exemplars, which all labelers need.

    Seconds are those of one worker at a time, as if nothing had run in parallel. Work for several layers at once, such
    as a pass over images, counts by the share of these layers.

    Args:
        storage: The run directory.
        labelers: The labelers.
        layers: (model, layer) pairs that all of them have labelled.

    Returns:
        Rows of :data:`SECONDS` and :data:`PER_HOUR`. A labeler has none if its runs are not recorded, or were recorded
        by a version whose seconds do not add up (:data:`~milan_ray.schema.operations.SHARES`). The work of killed jobs
        is not recorded.
    """
    runs = _runs(storage)
    seconds: dict[str, dict[tuple[str, str, str], float]] = defaultdict(dict)
    units: Counter[str] = Counter()
    missing: set[str] = set()
    for model, layer in dict.fromkeys(layers):
        made = storage.metadata(EXEMPLARS, model=model, layer=layer) or {}
        run = ("exemplars", made.get(CONFIG_KEY, ""))
        if run in runs:
            seconds[EVERYBODY] |= _seconds(runs, run, model)
            units[EVERYBODY] += storage.count(DESCRIPTIONS, labeler=labelers[0], model=model, layer=layer)
        for labeler in labelers:
            keys = {"labeler": labeler, "model": model, "layer": layer}
            recorded = [run for run in sorted(lineage(storage, DESCRIPTIONS, keys)) if run in runs]
            if not recorded:
                missing.add(labeler)
            units[labeler] += storage.count(DESCRIPTIONS, **keys)
            # Keyed by run, so that a run for several layers, such as the embedding of a probe, counts once.
            for run in recorded:
                seconds[labeler] |= _seconds(runs, run, model)
    rows: list[Row] = []
    for labeler in (*labelers, EVERYBODY):
        if labeler in missing or not seconds[labeler] or not units[labeler]:
            continue
        per_unit = math.fsum(seconds[labeler].values()) / units[labeler]
        if not per_unit > 0:  # NaN: recorded by an earlier version
            continue
        stages = ", ".join(dict.fromkeys(stage for stage, _, _ in seconds[labeler]))
        for metric, value in ((SECONDS, per_unit), (PER_HOUR, 3600 / per_unit)):
            rows.append((labeler, metric, Interval(value, math.nan, math.nan), units[labeler], stages))
    return rows


def _runs(storage: Storage) -> dict[tuple[str, str], dict[str, float]]:
    """(stage, run) → model → its seconds; NaN in records of earlier versions, whose seconds do not add up."""
    runs: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    left_out, columns = LeftOut("costs"), ["stage", "run", "model", "seconds"]
    for keys in storage.partitions(RUNS):
        table = left_out.unless_damaged(partial(storage.read, RUNS, columns, **keys), None)
        if table is None:
            continue
        adds_up = SHARES.items() <= (storage.metadata(RUNS, **keys) or {}).items()
        for row in table.to_pylist():
            runs[row["stage"], row["run"]][row["model"]] = row["seconds"] if adds_up else math.nan
    return runs


def _seconds(
    runs: Mapping[tuple[str, str], Mapping[str, float]], run: tuple[str, str], model: str
) -> dict[tuple[str, str, str], float]:
    """(stage, run, model) → seconds of a run; a network with two names has its run under one of them."""
    recorded = model if model in runs[run] else next(iter(runs[run]))
    return {(*run, recorded): runs[run][recorded]}


def lineage(storage: Storage, table: Table, keys: Mapping[str, str]) -> set[tuple[str, str]]:
    """(stage, run) of a partition and of everything that it was made from, except exemplars."""
    meta = storage.metadata(table, **keys) or {}
    runs = {(keys.get("labeler", table.name), meta.get(CONFIG_KEY, ""))}
    inputs = inputs_of(meta)
    for source in TABLES:
        if source is EXEMPLARS or source.name not in inputs:
            continue
        where = {key: keys[key] for key in ("model", "layer") if key in source.partition}
        for other in storage.partitions(source, **where):
            made = LeftOut("costs").unless_damaged(partial(storage.metadata, source, **other), None) or {}
            all_units = made.get(ALL_UNITS_KEY, made.get(CONFIG_KEY, ""))
            if Fingerprint.of({source.name: all_units}).inputs[source.name] == inputs[source.name]:
                runs |= lineage(storage, source, other)
    return runs
