"""Section 5 on the built-in world: which units matter, by their descriptions, and in which layers they are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import polars as pl

from milan_ray.engine import references
from milan_ray.report.figures import figure_path
from milan_ray.schema import ABLATIONS, ANNOTATIONS, LAYER_PROPERTIES
from milan_ray.scoring.bootstrap import Interval
from milan_ray.scoring.words import shares_no_word
from milan_ray.showcase.paper.claims import Claim, Section, evidence, shown, unit_lines
from milan_ray.showcase.paper.experiment_context import ExperimentContext
from milan_ray.stages import world
from milan_ray.storage import Storage
from milan_ray.studies.ablation.curves import RANDOM
from milan_ray.studies.analysis import statistics as analysis
from milan_ray.studies.analysis.run import Analysis, AnalysisConfig, stored_scores
from milan_ray.studies.judges.run import HELD_OUT_SCENES
from milan_ray.studies.spacy_pipeline import find_spacy_pipeline
from milan_ray.studies.tables import read_annotations, read_frame

NAME = "analysis"

MODELS = ("world/cnn", "world/resnet", "world/vit")
"""The world's classifiers of objects. The captioner was trained on annotations of the first and the last."""

CONFIG = AnalysisConfig(
    words=(),
    fractions=(0.0, 0.05, 0.1, 0.15),
    trials=8,
    ties=3,
    matched=("adjectives",),
    split="held-out scenes",
)
"""The paper's settings, but with more random orders, larger steps, no words of ImageNet's classes, and random ties.
The world's descriptions are short, so that most of them have equal scores by most criteria."""

SMALL = AnalysisConfig(words=(), trials=2, ties=1, fractions=(0.0, 0.1), split="held-out scenes")

EARLY, MIDDLE, LATE = "first", "middle", "last"
"""Position of a layer among the layers of its network."""


def run(context: ExperimentContext) -> Section:
    """Analyses the world's classifiers on held-out scenes, for the claims of the paper's Section 5."""
    storage, config = context.storage, SMALL if context.small else CONFIG
    models = MODELS[:1] if context.small else MODELS
    name = context.experiment(NAME)
    nlp, language = find_spacy_pipeline()
    studies = [Analysis(references.ModelRef(model), HELD_OUT_SCENES, language, config, name) for model in models]
    rows = pl.concat(study.run(storage, nlp, context.resources) for study in studies)
    scores = {model: stored_scores(storage, model, name) for model in models}
    properties = pl.concat(_placed(storage, model, name) for model in models)
    heights = beside_random(rows)
    first = pl.concat(
        analysis.first_ablated(scores[model]).select(pl.lit(model).alias("model"), pl.all()) for model in models
    )
    first_claim, *claims = (*importance(heights, rows), *whereabouts(properties))
    note = f"Small networks of the world in place of ResNet18; ties broken at random; sentences read by {language}."
    units = pl.concat(
        frame.select(pl.lit(model).alias("model"), "layer", "unit", "description") for model, frame in scores.items()
    )
    return Section(
        NAME,
        "Analysis: which units matter (paper, Section 5, Figures 4 and 13)",
        (replace(first_claim, note=note), *claims),
        tuple(figure_path(storage, ABLATIONS, experiment=name, model=model) for model in models),
        (
            evidence("Mean accuracy over all steps of ablation, beside random orders; mean of the networks", heights),
            evidence("Where properties of descriptions are common", _by_place(properties)),
            evidence("Ablated first", first.filter(pl.col("place") <= 3)),
        ),
        _failures(storage, first),
        unit_lines(units, 12),
    )


def beside_random(rows: pl.DataFrame) -> pl.DataFrame:
    """Heights of curves and of random orders, each as the mean of the networks that have the criterion.

    Args:
        rows: Rows of schema ABLATIONS over all classes, of each network.

    Returns:
        Columns as those of :func:`milan_ray.studies.analysis.statistics.beside_random`, and ``networks``, how many.
    """
    tables = []
    for condition in rows["condition"].unique(maintain_order=True):
        models = rows.filter(pl.col("condition") == condition)["model"].unique().to_list()
        compared = rows.filter(pl.col("model").is_in(models), pl.col("condition").is_in([condition, RANDOM]))
        means = compared.group_by("condition", "trial", "fraction", maintain_order=True).agg(
            pl.col("accuracy").mean(), pl.col("ablated").max()
        )
        tables.append(analysis.beside_random(means).with_columns(networks=pl.lit(len(models))))
    return pl.concat(tables).sort("accuracy")


def importance(heights: pl.DataFrame, rows: pl.DataFrame) -> list[Claim]:
    """Compares the claims on Figure 4's curves with the results, by the heights of curves and of random orders.

    Args:
        heights: From :func:`beside_random`.
        rows: Rows of schema ABLATIONS over all classes, of each network.
    """
    at = {row["condition"]: row for row in heights.iter_rows(named=True)}
    each = {
        model: {
            row["condition"]: row["accuracy"] - row["random"]
            for row in analysis.beside_random(of_model).iter_rows(named=True)
        }
        for (model,), of_model in rows.group_by(["model"], maintain_order=True)
    }
    claims = []
    for criterion, words, more in (
        ("adjectives", "many adjectives", True),
        ("adpositions", "many prepositions", True),
        ("max-word-difference", "very different words", False),
    ):
        row = at.get(criterion)
        text = f"Units described with {words} matter {'more' if more else 'less'} than random units do."
        paper = (
            f"Figure 4: their curve lies {'below' if more else 'above'} that of random orders (no figure in the text)"
        )
        if row is None or row["low"] is None:
            claims.append(Claim(text, paper, f"no description differs from others by its {criterion}", None))
            continue
        gaps = ", ".join(f"{model} {of[criterion]:+.3f}" for model, of in each.items() if criterion in of)
        ours = (
            f"mean accuracy while they are ablated {row['accuracy']:.3f}; random orders {row['random']:.3f}, 95 % of "
            f"them in [{row['low']:.3f}, {row['high']:.3f}]. Against random: {gaps}"
        )
        if same := at.get(f"{criterion}{analysis.SAME_LAYERS}"):
            ours += f". As many other units of the same layers leave {same['accuracy']:.3f}"
        claims.append(Claim(text, paper, ours, row["accuracy"] < row["low"] if more else row["accuracy"] > row["high"]))
    nouns = at.get("nouns")
    others = {words: at[name] for name, words in (("adjectives",) * 2, ("adpositions", "prepositions")) if name in at}
    if nouns and others and nouns["low"] is not None:
        # Two orders differ by √2 times what one does from the mean.
        within = np.sqrt(2) * (nouns["high"] - nouns["random"])
        less = {words: row["accuracy"] - nouns["accuracy"] for words, row in others.items()}
        shown = ", ".join(f"{words} {gap:+.3f}" for words, gap in less.items())
        claims.append(
            Claim(
                "Ablating units described with many adjectives or prepositions costs more than ablating units "
                "described with many nouns.",
                "Figure 4, left: both curves lie below that of nouns (no figure in the text)",
                f"mean accuracy less that of nouns: {shown}; two random orders differ by at most {within:.3f} in 95 % "
                "of cases",
                max(less.values()) < -within,
            )
        )
    return claims


def whereabouts(properties: pl.DataFrame) -> list[Claim]:
    """Compares the claims on Figure 4, right, with the results: in which layers properties of descriptions are common.

    Args:
        properties: Rows of schema LAYER_PROPERTIES with a column ``place``, of all networks.
    """
    claims = []
    for text, paper, name, group, other in (
        (
            "Adjectives are most common in descriptions of early layers.",
            "Figure 4, right: highest in conv1, falling with depth",
            "contains an adjective",
            EARLY,
            LATE,
        ),
        (
            "Descriptions of very different words are more common in late layers.",
            "Figure 4, right: top 10 % word difference rises with depth",
            analysis.DIFFERENT_WORDS,
            LATE,
            EARLY,
        ),
        (
            "Relations (prepositions) are most common in descriptions of middle layers.",
            "Figure 4, right: the largest share is in the middle layers",
            "contains an adposition",
            MIDDLE,
            f"{EARLY} and {LATE}",
        ),
    ):
        groups = pl.col("place") == group, pl.col("place").is_in(other.split(" and "))
        together = analysis.contrast(properties, name, *groups)
        if together is None or not together.share + together.other:
            claims.append(Claim(text, paper, f"no description is such: “{name}”", None))
            continue
        each = []
        for (model,), rows in properties.group_by(["model"], maintain_order=True):
            alone = analysis.contrast(rows, name, *groups)
            if alone is not None:
                each.append(f"{model} {alone.share - alone.other:+.0%}")
        gap = shown(Interval(together.share - together.other, together.low, together.high), "+.0%")
        ours = (
            f"{group} layers {together.share:.0%} of units, {other} {together.other:.0%}: difference {gap}. By "
            f"network: {', '.join(each)}"
        )
        claims.append(Claim(text, paper, ours, together.low > 0))
    return claims


def _placed(storage: Storage, model: str, name: str) -> pl.DataFrame:
    """A network's shares of properties, with the place of each layer."""
    rows = read_frame(storage, LAYER_PROPERTIES, experiment=name, model=model)
    layers = rows["layer"].unique(maintain_order=True).to_list()
    places = dict.fromkeys(layers, MIDDLE) | {layers[0]: EARLY, layers[-1]: LATE}
    return rows.with_columns(pl.col("layer").replace_strict(places).alias("place"))


def _by_place(properties: pl.DataFrame) -> pl.DataFrame:
    """Share of units with each property, over all networks: a column per place."""
    return (
        properties.group_by("property", "place", maintain_order=True)
        .agg((pl.col("holding").sum() / pl.col("units").sum()).alias("share"))
        .pivot("place", index="property", values="share", maintain_order=True)
    )


def _failures(storage: Storage, first: pl.DataFrame) -> tuple[str, ...]:
    """Units that are ablated first and whose description shares no word with any annotation, as lines of text."""
    units = first.unique(["model", "layer", "unit"], keep="first", maintain_order=True)
    layers = units.select("model", "layer").unique(maintain_order=True).iter_rows()
    annotated = [
        (model, layer)
        for model, layer in layers
        if storage.metadata(ANNOTATIONS, source=world.SOURCE, model=model, layer=layer) is not None
    ]
    annotations = read_annotations(storage, world.SOURCE, annotated)
    rows = [row for row in units.to_dicts() if (row["model"], row["layer"], row["unit"]) in annotations]
    texts = [annotations[row["model"], row["layer"], row["unit"]] for row in rows]
    unlike = shares_no_word([row["description"] for row in rows], texts)
    lines = [
        f"{row['model']} {row['layer']} {row['unit']}: “{row['description']}” (among the first 10 by "
        f"{row['criterion']}); the annotators: {'; '.join(of_unit)}"
        for row, of_unit, alone in zip(rows, texts, unlike, strict=True)
        if alone
    ]
    return (
        f"{len(lines)} of {len(rows)} annotated units among the first 10 by some criterion have a description that "
        "shares no word with any annotation of theirs:",
        *lines[:12],
    )
