"""Section 4 on the built-in world: MILAN and labels from concept maps, on a network new to MILAN (Table 2)."""

from __future__ import annotations

from typing import Any

import polars as pl

from milan_ray.engine import references
from milan_ray.labelers.compexp import CompExp
from milan_ray.labelers.milan import LIKELIHOOD, MILAN
from milan_ray.labelers.netdissect import NetDissect
from milan_ray.report.figures import figure_path
from milan_ray.schema import ANNOTATIONS, SCORES
from milan_ray.scoring.evaluation import CONSTANT
from milan_ray.scoring.search import scan_descriptions
from milan_ray.scoring.text import minilm_directory
from milan_ray.showcase.demo import DECODER, EXEMPLARS, HELD_OUT, PROBE, SEARCH
from milan_ray.showcase.paper.claims import Claim, Section, evidence
from milan_ray.showcase.paper.experiment_context import ExperimentContext
from milan_ray.stages import world
from milan_ray.stages.captioners import EncoderRef
from milan_ray.stages.concept_labels import LabelConfig
from milan_ray.storage import Storage
from milan_ray.studies.baselines import statistics as baselines
from milan_ray.studies.baselines.run import BaselinesJob, HeldOut, run_baselines
from milan_ray.studies.generalization.statistics import main_metric
from milan_ray.studies.judges.run import PLANTED
from milan_ray.studies.tables import read_annotations

NAME = "baselines"

PAPER = pl.DataFrame(
    {
        "model": ["AlexNet-ImageNet", "AlexNet-Places", "ResNet-ImageNet", "ResNet-Places"],
        "CE": [0.01, 0.02, 0.01, 0.03],
        "ND": [0.24, 0.21, 0.25, 0.22],
        "p(d|E)": [0.34, 0.31, 0.27, 0.30],
        "wPMI": [0.38, 0.37, 0.35, 0.31],
    }
)
"""The paper's Table 2: BERTScore with people's annotations."""

_NOTE = (
    "Here network dissection and compositional explanations read exact maps of the very concepts that the world's "
    "annotators name and its judges ask for; the paper's read segmentations with vocabularies of their own."
)


def run(context: ExperimentContext) -> Section:
    """Labels the world's held-out network by every method, for the claims on the paper's Table 2."""
    storage = context.storage
    models = (PLANTED,) if context.small else (HELD_OUT, PLANTED)
    name = context.experiment(NAME)
    job = BaselinesJob(
        [HeldOut(references.ModelRef(model), SEARCH, EncoderRef(DECODER)) for model in models],
        PROBE,
        EXEMPLARS,
        LabelConfig(),
        world.SOURCE,
        None if context.small else minilm_directory(),
        name,
    )
    rows = run_baselines(storage, job, context.resources)
    metrics = [metric for metric in baselines.METRICS if metric in set(rows["metric"])]
    failures, examples = _lines(storage, models[0])
    return Section(
        NAME,
        "Baselines: other ways to label units (paper, Section 4, Table 2)",
        claims(rows),
        (figure_path(storage, SCORES, experiment=name),),
        (
            *(evidence(f"Here: {metric}", baselines.table_2(rows, metric)) for metric in metrics),
            evidence("Table 2, the paper's: BERTScore", PAPER),
        ),
        failures,
        examples,
    )


def claims(rows: pl.DataFrame) -> tuple[Claim, ...]:
    """Compares the claims of Section 4 on Table 2 with annotations and with the world's own judges.

    Args:
        rows: From :func:`milan_ray.studies.baselines.statistics.collected`.
    """
    metric = main_metric(rows)
    first = rows["model"][0]
    results = []
    for judge, known in (
        ("agreement with annotations", metric),
        ("held-out scenes", "auroc"),
        ("scenes without the concept", "causal-drop"),
        ("planted units", "planted-accuracy"),
    ):
        of_judge = rows.filter(metric=known)
        if of_judge.is_empty():
            continue
        model = first if first in set(of_judge["model"]) else of_judge["model"][0]
        at = {row["system"]: row for row in of_judge.filter(model=model).iter_rows(named=True)}
        if not {CompExp.name, NetDissect.name, LIKELIHOOD, MILAN} <= at.keys():
            continue
        shown = (CompExp.name, NetDissect.name, LIKELIHOOD, MILAN, *([CONSTANT] if CONSTANT in at else []))
        ours = f"{model}, {at[MILAN]['n']} units, {known}: " + ", ".join(
            f"{baselines.LABELERS.get(name, name)} {at[name]['value']:.3f} {_ends(at[name])}" for name in shown
        )
        values = {name: at[name]["value"] for name in shown}
        maps = max(values[CompExp.name], values[NetDissect.name])
        order = maps < values[LIKELIHOOD] <= values[MILAN]
        note = _NOTE if known == metric else f"The paper has no such judge. {_NOTE}"
        results.append(
            Claim(
                f"Judged by {judge}: compositional explanations and network dissection < p(d|E) ≤ wPMI.",
                "Table 2: .01 to .03 and .21 to .25 < .27 to .34 < .31 to .38 (BERTScore)",
                ours,
                order,
                note,
            )
        )
        if known == metric:
            results.append(
                Claim(
                    "Network dissection agrees more with annotations than compositional explanations.",
                    "Table 2: .21 to .25 against .01 to .03",
                    ours,
                    values[CompExp.name] < values[NetDissect.name],
                    _NOTE,
                )
            )
            gain = values[MILAN] - values[LIKELIHOOD]
            results.append(
                Claim(
                    "Searching for mutual information agrees more with annotations than likelihood alone.",
                    "Table 2: wPMI .01 to .08 above p(d|E), mean .05",
                    f"{model}: wPMI {gain:+.3f} above p(d|E); intervals {_ends(at[MILAN])} and {_ends(at[LIKELIHOOD])}",
                    gain > 0,
                    "Taken as reproduced when the value is higher, though the intervals may meet.",
                )
            )
    return tuple(results)


def _ends(row: dict[str, float]) -> str:
    return f"[{row['low']:.3f}, {row['high']:.3f}]"


def _lines(storage: Storage, model: str, count: int = 10, seed: int = 0) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Units with different labels by wPMI and by p(d|E), and random units, with all labels, as lines of text."""
    frame = scan_descriptions(storage, [model], None, list(baselines.LABELERS)).collect()
    wide = frame.pivot(on="labeler", index=["layer", "unit"], values="description").drop_nulls().sort("layer", "unit")
    names = [name for name in baselines.LABELERS if name in wide.columns]
    layers = [(model, keys["layer"]) for keys in storage.partitions(ANNOTATIONS, source=world.SOURCE, model=model)]
    annotations = read_annotations(storage, world.SOURCE, layers)

    def line(row: dict[str, Any]) -> str:
        labels = "; ".join(f"{baselines.LABELERS[name]} “{row[name]}”" for name in names)
        people = "; ".join(annotations.get((model, row["layer"], row["unit"]), []))
        return f"{model} {row['layer']} {row['unit']}: {labels}; the annotators: {people}"

    mixed = wide.sample(fraction=1.0, shuffle=True, seed=seed).rows(named=True)
    unlike = [row for row in mixed if row[MILAN] != row[LIKELIHOOD]]
    first = f"{len(unlike)} of {len(mixed)} units have another label by wPMI than by p(d|E); some of them:"
    return (first, *map(line, unlike[:count])), tuple(map(line, mixed[:count]))
