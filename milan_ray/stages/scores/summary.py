"""Unit scores summed up: means with their intervals, and paired differences to the trivial baselines."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from milan_ray.config import config_hash
from milan_ray.schema import SCORES, UNIT_SCORES, VERDICTS
from milan_ray.scoring.bootstrap import difference, interval, ratio, resampling_counts
from milan_ray.scoring.evaluation import CONSTANT, SHUFFLED, Row, score_table, unit_values
from milan_ray.scoring.verdicts import VERDICTS as VERDICT_NAMES
from milan_ray.stages.scores.inputs import OWN, SYSTEMS, ScoreConfig
from milan_ray.storage import Storage

READINGS = {
    "simulation": "correlation of the unit's activation with what its description predicts (sigmoid of the fit)",
    "correlation": "correlation of the unit's activation with the fit of image and description as it is",
    "auprc": "area under precision and recall of the fit, for the images that excite the unit most",
    "retrieval-auc": "AUC of the unit's activation for the images nearest to its description; blind to what it leaves "
    "out",
    "retrieval-mad": "how many standard deviations more the unit fires on the images nearest to its description; blind "
    "to what it leaves out",
    "cosy-auc": "AUC of the unit's activation for images generated from its description; blind to what it leaves out",
    "cosy-mad": "how many standard deviations more the unit fires on images generated from its description; blind to "
    "what it leaves out",
    "class-similarity": "product of the embeddings of description and class name",
    "class-top1": "share of units whose class name is nearer to the description than all other class names",
    "clarity": "mean cosine of two of the unit's exemplars",
    "polysemanticity": "1 − cosine of the two clusters that the unit's exemplars fall into",
    "redundancy": "highest cosine of the unit's mean exemplar with another unit's of the layer",
}
"""Every metric, and how to read it."""

_NOTES = {
    SHUFFLED: "the labeler's own descriptions, each given to another unit of the layer",
    CONSTANT: "the labeler's most frequent description of the layer, given to every unit",
}


def summarise(storage: Storage, predictor: str, model: str, config: ScoreConfig) -> str:
    """Sums the unit scores of a model's layers up by one predictor; returns the experiment.

    Every mean has its 95 % bootstrap interval over units; so has the paired difference to the trivial baselines.
    """
    partitions = storage.partitions(UNIT_SCORES, predictor=predictor, model=model)
    hashes = [storage.config_of(UNIT_SCORES, **keys) for keys in partitions]
    experiment = f"scores by {predictor}: {model}"
    fingerprint = config_hash({"summary": 1, "scores": hashes, "seed": config.seed, "samples": config.samples})
    if storage.is_current(SCORES, fingerprint, experiment=experiment):
        return experiment
    rows: list[Row] = []
    for labeler in sorted({keys["labeler"] for keys in partitions}):
        columns = ["layer", "unit", "system", "metric", "value"]
        tables = [storage.read(UNIT_SCORES, columns, **keys) for keys in partitions if keys["labeler"] == labeler]
        rows += _summary(labeler, pa.concat_tables(tables), config)
    storage.write(SCORES, score_table(experiment, rows), fingerprint, experiment=experiment)
    return experiment


def summarise_verdicts(storage: Storage, predictor: str, model: str, config: ScoreConfig) -> str:
    """Counts the verdicts on a model's descriptions by one predictor; returns the experiment.

    Every share has its 95 % bootstrap interval over units, alongside that of the trivial baselines.
    """
    partitions = storage.partitions(VERDICTS, predictor=predictor, model=model)
    hashes = [storage.config_of(VERDICTS, **keys) for keys in partitions]
    experiment = f"verdicts by {predictor}: {model}"
    fingerprint = config_hash({"verdicts": 1, "of": hashes, "seed": config.seed, "samples": config.samples})
    if storage.is_current(SCORES, fingerprint, experiment=experiment):
        return experiment
    rows: list[Row] = []
    for labeler in sorted({keys["labeler"] for keys in partitions}):
        mine = [keys for keys in partitions if keys["labeler"] == labeler]
        table = pa.concat_tables([storage.read(VERDICTS, ["system", "verdict"], **keys) for keys in mine])
        systems, verdicts = (np.array(table[name].to_pylist()) for name in ("system", "verdict"))
        for system in SYSTEMS if len(table) else ():
            of_system = verdicts[systems == system]
            counts = resampling_counts(len(of_system), config.samples, config.seed)
            name = labeler if system == OWN else f"{labeler}, {system}"
            for verdict in VERDICT_NAMES:
                share = interval(unit_values(of_system == verdict), ratio, counts)
                rows.append((name, verdict, share, len(of_system), _NOTES.get(system, f"share of units: {verdict}")))
    storage.write(SCORES, score_table(experiment, rows), fingerprint, experiment=experiment)
    return experiment


def _summary(labeler: str, table: pa.Table, config: ScoreConfig) -> list[Row]:
    """Rows of one labeler: its means, those of the trivial baselines, and the differences."""
    values: dict[str, dict[str, dict[tuple[str, int], float]]] = {}
    for row in table.to_pylist():
        if row["value"] is not None:
            place = values.setdefault(row["metric"], {}).setdefault(row["system"], {})
            place[row["layer"], row["unit"]] = row["value"]
    rows: list[Row] = []
    for metric, systems in values.items():
        units = sorted(systems.get(OWN, {}))
        if not units:
            continue
        counts = resampling_counts(len(units), config.samples, config.seed)
        of = {
            system: unit_values(np.array([scores[unit] for unit in units]))
            for system, scores in systems.items()
            if all(unit in scores for unit in units)
        }
        for system, statistics in of.items():
            name = labeler if system == OWN else f"{labeler}, {system}"
            score = interval(statistics, ratio, counts)
            rows.append((name, metric, score, len(units), _NOTES.get(system, READINGS[metric])))
            if system != OWN:
                gap = difference(of[OWN], statistics, ratio, counts)
                note = f"paired difference; above 0: {labeler} is better"
                rows.append((f"{labeler} − {system}", metric, gap, len(units), note))
    return rows
