"""Section 5 on the built-in world: which units matter, by what is said of them, and where they lie."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import polars as pl

from milan_ray.engine import references
from milan_ray.report.figures import figure_path
from milan_ray.schema import ABLATIONS, ANNOTATIONS, LAYER_PROPERTIES
from milan_ray.scoring.words import FUNCTION_WORDS, head_words, words_of
from milan_ray.showcase.paper.claims import Claim, Section
from milan_ray.showcase.paper.experiment_context import ExperimentContext
from milan_ray.stages import world
from milan_ray.storage import Storage
from milan_ray.studies.ablation.curves import RANDOM
from milan_ray.studies.analysis import statistics as analysis
from milan_ray.studies.analysis.run import Analysis, AnalysisConfig, stored_scores
from milan_ray.studies.spacy_pipeline import find_spacy_pipeline

NAME = "analysis"

MODELS = ("world/cnn", "world/resnet", "world/vit")
"""The world's classifiers of objects. The captioner learnt from annotations of the first and the last."""

SCENES = references.ProbeRef(("world/heldout",))

CONFIG = AnalysisConfig(
    words=(),
    fractions=(0.0, 0.05, 0.1, 0.15),
    trials=8,
    ties=3,
    matched=("adjectives",),
    split="held-out scenes",
)
"""As the paper, with more random orders, larger steps, without likeness to words that are ImageNet's classes, and with
ties broken at random: the world's descriptions are short, so that most are equal by most criteria."""

SMALL = AnalysisConfig(words=(), trials=2, ties=1, fractions=(0.0, 0.1), split="held-out scenes")

EARLY, MIDDLE, LATE = "first", "middle", "last"
"""Where a layer lies among those of its network."""

_ADJECTIVE, _ADPOSITION = "contains an adjective", "contains an adposition"


def run(context: ExperimentContext) -> Section:
    """Analyses the world's classifiers on held-out scenes; says what of the paper's Section 5 is the same there."""
    storage, config = context.storage, SMALL if context.small else CONFIG
    models = MODELS[:1] if context.small else MODELS
    name = f"{NAME} (small)" if context.small else NAME
    nlp, language = find_spacy_pipeline()
    studies = [Analysis(references.ModelRef(model), SCENES, language, config, name) for model in models]
    rows = pl.concat(study.run(storage, nlp, context.resources) for study in studies)
    scores = {model: stored_scores(storage, model, name) for model in models}
    properties = pl.concat(_placed(storage, model, name) for model in models)
    heights = beside_random(rows)
    first = pl.concat(
        analysis.first_ablated(scores[model]).select(pl.lit(model).alias("model"), pl.all()) for model in models
    )
    failures, judged = _unheard(storage, first)
    first_claim, *claims = (*importance(heights, rows), *whereabouts(properties))
    note = f"Small networks of the world in place of ResNet18; ties broken at random; sentences read by {language}."
    first_claim = replace(first_claim, note=note)
    return Section(
        NAME,
        "Analysis: which units matter (paper, Section 5, Figures 4 and 13)",
        (first_claim, *claims),
        tuple(figure_path(storage, ABLATIONS, experiment=name, model=model) for model in models),
        (
            ("Mean accuracy over all steps of ablation, beside random orders; mean of the networks", heights),
            ("Where properties of descriptions are common", _by_place(properties)),
            ("Ablated first", first.filter(pl.col("place") <= 3)),
        ),
        tuple(_failure_lines(failures, judged)),
        _random_examples(scores),
    )


def _failure_lines(failures: pl.DataFrame, judged: int) -> list[str]:
    lines = [
        f"{model} {layer} {unit}: “{text}” (among the first 10 by {criterion}); the annotators: {said}"
        for model, criterion, layer, unit, text, said in failures.head(12).iter_rows()
    ]
    return [
        f"{len(failures)} of {judged} annotated units among the first 10 by some criterion have a description that "
        "shares no word with any annotation of theirs:",
        *lines,
    ]


def beside_random(rows: pl.DataFrame) -> pl.DataFrame:
    """Heights of curves beside those of random orders, each as the mean of the networks that have the criterion.

    Args:
        rows: Rows of schema ABLATIONS over all classes, of each network.

    Returns:
        Columns as those of :func:`milan_ray.studies.analysis.statistics.beside_random`, and ``networks``, how many.
    """
    found = []
    for condition in rows["condition"].unique(maintain_order=True):
        models = rows.filter(pl.col("condition") == condition)["model"].unique().to_list()
        of_them = rows.filter(pl.col("model").is_in(models), pl.col("condition").is_in([condition, RANDOM]))
        means = of_them.group_by("condition", "trial", "fraction", maintain_order=True).agg(
            pl.col("accuracy").mean(), pl.col("ablated").max()
        )
        found.append(analysis.beside_random(means).with_columns(networks=pl.lit(len(models))))
    return pl.concat(found).sort("accuracy")


def importance(heights: pl.DataFrame, rows: pl.DataFrame) -> list[Claim]:
    """What Figure 4's curves say, by how high they run beside those of random orders.

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
    """What Figure 4 says on the right: in which layers properties of descriptions are common.

    Args:
        properties: Rows of schema LAYER_PROPERTIES with a column ``place``, of all networks.
    """
    claims = []
    place = pl.col("place")
    for text, paper, name, here, there in (
        (
            "Adjectives are most common in descriptions of early layers.",
            "Figure 4, right: highest in conv1, falling with depth",
            _ADJECTIVE,
            (EARLY, place == EARLY),
            (LATE, place == LATE),
        ),
        (
            "Descriptions of very different words are more common in late layers.",
            "Figure 4, right: top 10 % word difference rises with depth",
            analysis.DIFFERENT_WORDS,
            (LATE, place == LATE),
            (EARLY, place == EARLY),
        ),
        (
            "Relations (prepositions) are most common in descriptions of middle layers.",
            "Figure 4, right: the largest share is in the middle layers",
            _ADPOSITION,
            (MIDDLE, place == MIDDLE),
            ("first and last", place != MIDDLE),
        ),
    ):
        found = analysis.contrast(properties, name, here[1], there[1])
        if found is None or not found.here + found.there:
            claims.append(Claim(text, paper, f"no description is such: “{name}”", None))
            continue
        each = []
        for (model,), of_model in properties.group_by(["model"], maintain_order=True):
            one = analysis.contrast(of_model, name, here[1], there[1])
            if one is not None:
                each.append(f"{model} {one.here - one.there:+.0%}")
        ours = (
            f"{here[0]} layers {found.here:.0%} of units, {there[0]} {found.there:.0%}: difference "
            f"{found.here - found.there:+.0%} [{found.low:+.0%}, {found.high:+.0%}]. By network: {', '.join(each)}"
        )
        claims.append(Claim(text, paper, ours, found.low > 0))
    return claims


def _placed(storage: Storage, model: str, name: str) -> pl.DataFrame:
    """A network's shares of properties, with the place of each layer."""
    rows = pl.DataFrame(pl.from_arrow(storage.read(LAYER_PROPERTIES, experiment=name, model=model)))
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


def _unheard(storage: Storage, first: pl.DataFrame) -> tuple[pl.DataFrame, int]:
    """Of units that are ablated first, those whose description shares no word with any annotation; and of how many.

    Columns model, criterion, layer, unit, description, said; each unit once.
    """
    units = first.unique(["model", "layer", "unit"], keep="first", maintain_order=True)
    said = []
    for model, layer in units.select("model", "layer").unique(maintain_order=True).iter_rows():
        keys = {"source": world.SOURCE, "model": model, "layer": layer}
        if storage.metadata(ANNOTATIONS, **keys) is not None:
            said.append(
                pl.DataFrame(pl.from_arrow(storage.read(ANNOTATIONS, ["model", "layer", "unit", "text"], **keys)))
            )
    if not said:
        return first.select("model", "criterion", "layer", "unit", "description", said=pl.lit("")).clear(), 0
    texts = pl.concat(said).with_columns(pl.col("unit").cast(pl.Int64))
    grouped = texts.group_by("model", "layer", "unit").agg(pl.col("text").alias("texts"))
    judged = units.join(grouped, on=["model", "layer", "unit"], how="inner", maintain_order="left")
    heads = head_words(word for text in [*judged["description"], *judged["texts"].explode()] for word in words_of(text))

    def contents(text: str) -> set[str]:
        return {heads[word] for word in words_of(text)} - FUNCTION_WORDS

    alone = [
        not contents(text) & set().union(*map(contents, of_people))
        for text, of_people in judged.select("description", "texts").iter_rows()
    ]
    chosen = ["model", "criterion", "layer", "unit", "description"]
    unheard = judged.filter(pl.Series(alone)).select(*chosen, said=pl.col("texts").list.join("; "))
    return unheard, len(judged)


def _random_examples(scores: dict[str, pl.DataFrame], count: int = 12, seed: int = 0) -> tuple[str, ...]:
    units = pl.concat(
        frame.select(pl.lit(model).alias("model"), "layer", "unit", "description") for model, frame in scores.items()
    )
    chosen = units.sample(min(count, len(units)), seed=seed)
    return tuple(f"{model} {layer} {unit}: “{text}”" for model, layer, unit, text in chosen.iter_rows())
