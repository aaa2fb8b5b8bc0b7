"""Captioners on networks that they were not trained on (paper §4): divides the units and scores the descriptions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl
from spacy.language import Language

from milan_ray.annotations.splits import KINDS, OWN, Split
from milan_ray.labelers.milan import LIKELIHOOD, MILAN
from milan_ray.scoring.evaluation import CONSTANT, NEAREST, SHUFFLED, evaluate_text, shuffled
from milan_ray.scoring.text import BertScore
from milan_ray.scoring.words import shares_no_word
from milan_ray.studies.annotators.statistics import PARTS_OF_SPEECH, annotation_statistics
from milan_ray.studies.tables import Unit

TRAIN, TEST = "train", "test"
"""Parts of a split."""

BLEU_ORDERS = (4, 1, 2, 3)

TEXT_COLUMNS = ("words", "length", *PARTS_OF_SPEECH)
"""Statistics of generated descriptions (paper, Table 6): distinct words, mean words per text, % by part of speech."""

SYSTEMS = (MILAN, LIKELIHOOD, CONSTANT, NEAREST)
"""Systems that describe every held-out unit."""


def divided(
    split: Split, annotated: Mapping[str, Sequence[Unit]], share: float, seed: int, trial: int
) -> tuple[list[Unit], list[Unit]]:
    """Divides units into those that train and those that judge, both sorted by model, layer and number.

    Args:
        split: The split.
        annotated: Model → its annotated units.
        share: Share of units held out if the same models train and judge; at least one unit.
        seed: Seed of that division.
        trial: Number of the trial; each trial has its own division.

    Returns:
        (train, test).
    """
    train = [unit for model in split.train_models for unit in sorted(annotated[model])]
    if not split.within:
        return train, [unit for model in split.test_models for unit in sorted(annotated[model])]
    order = np.random.default_rng([seed, trial]).permutation(len(train)).tolist()
    held = set(order[: max(1, int(share * len(train)))])
    return (
        [unit for place, unit in enumerate(train) if place not in held],
        [unit for place, unit in enumerate(train) if place in held],
    )


def score_split(
    name: str,
    descriptions: pl.DataFrame,
    references: Mapping[Unit, Sequence[str]],
    bert_score: BertScore | None = None,
    *,
    samples: int = 1000,
) -> pl.DataFrame:
    """Scores the descriptions of held-out units by the captioners of all trials, and trivial baselines.

    Args:
        name: Name of the split.
        descriptions: Columns trial, system (of :data:`SYSTEMS`), model, layer, unit, description; every system
            describes every unit.
        references: Unit → its annotations, at least one with words in it.
        bert_score: The scorer; None leaves BERTScore out.
        samples: Bootstrap resamples.

    Returns:
        Columns trial, system, metric, value, low, high, n, note. Rows without a trial are of all trials together: a
        unit that several trials describe is resampled as one.
    """
    trials = descriptions["trial"].unique().sort().to_list()
    by_trial = [_systems(descriptions.filter(trial=trial)) for trial in trials]

    def scored(trial: int | None, units: Sequence[Unit], systems: Mapping[str, Sequence[str]]) -> pl.DataFrame:
        places = {unit: place for place, unit in enumerate(dict.fromkeys(units))}
        table = evaluate_text(
            name,
            systems,
            [references[unit] for unit in units],
            bert_score,
            owners=[places[unit] for unit in units],
            orders=BLEU_ORDERS,
            samples=samples,
        )
        frame = pl.DataFrame(pl.from_arrow(table)).drop("experiment").filter(pl.col("n") > 0)
        return frame.select(pl.lit(trial, pl.Int32).alias("trial"), pl.all())

    tables = [scored(trial, *described) for trial, described in zip(trials, by_trial, strict=True)]
    if len(trials) == 1:
        together = tables[0].with_columns(pl.lit(None, pl.Int32).alias("trial"))
    else:
        units = [unit for members, _ in by_trial for unit in members]
        texts = {system: [text for _, each in by_trial for text in each[system]] for system in by_trial[0][1]}
        together = scored(None, units, texts)
    return pl.concat([*tables, together])


def _systems(descriptions: pl.DataFrame) -> tuple[list[Unit], dict[str, list[str]]]:
    """The units of one trial; and system → their descriptions, with the shuffled baseline added."""
    wide = descriptions.pivot(on="system", index=["model", "layer", "unit"], values="description", maintain_order=True)
    systems = {name: wide[name].to_list() for name in SYSTEMS}
    systems[SHUFFLED] = shuffled(systems[MILAN])
    return list(wide.select("model", "layer", "unit").iter_rows()), systems


def text_rows(descriptions: pl.DataFrame, nlp: Language, language: str) -> pl.DataFrame:
    """Statistics of MILAN's descriptions by trial and in the mean over trials (paper, Table 6), as rows of scores.

    Args:
        descriptions: As for :func:`score_split`.
        nlp: The spaCy pipeline that finds words and parts of speech.
        language: Its name.
    """
    texts = descriptions.filter(system=MILAN).rename({"description": "text"})
    by_trial = annotation_statistics(texts, nlp, by=("trial",))
    rows = by_trial.unpivot(TEXT_COLUMNS, index=["trial", "units"], variable_name="metric", value_name="value")
    rows = rows.drop_nulls("value")
    mean = rows.group_by("metric", maintain_order=True).agg(
        pl.lit(None, pl.Int32).alias("trial"), pl.col("units").sum(), pl.col("value").mean()
    )
    return pl.concat([rows, mean.select(rows.columns)]).select(
        "trial",
        pl.lit(MILAN).alias("system"),
        "metric",
        pl.col("value").cast(pl.Float64),
        pl.lit(None, pl.Float64).alias("low"),
        pl.lit(None, pl.Float64).alias("high"),
        pl.col("units").cast(pl.Int64).alias("n"),
        pl.lit(f"of the generated descriptions; read by {language}").alias("note"),
    )


def main_metric(rows: pl.DataFrame) -> str:
    """The measure of the paper's tables: BERTScore, or ROUGE-L if there is no model for BERTScore."""
    return "bertscore-f" if "bertscore-f" in rows["metric"] else "rouge-l-f"


def table_3(rows: pl.DataFrame) -> pl.DataFrame:
    """The paper's Table 3 with trivial baselines: a line per split, in the paper's order.

    Args:
        rows: Columns of :data:`~milan_ray.schema.GENERALIZATION`.

    Returns:
        Columns split, kind, train, test, units, then for MILAN the measure of :func:`main_metric` with the ends of its
        interval, then the same of the other systems.
    """
    metric = main_metric(rows)
    pooled = rows.filter(pl.col("trial").is_null(), metric=metric).filter(~pl.col("system").str.contains(" − "))
    wide = pooled.pivot(on="system", index=["split", "kind", "train", "test"], values="value", maintain_order=True)
    own = pooled.filter(system=MILAN).select("split", pl.col("n").alias("units"), "low", "high")
    others = [name for name in wide.columns if name not in ("split", "kind", "train", "test", MILAN)]
    kinds = {kind: place for place, kind in enumerate((*KINDS, OWN))}
    return (
        wide.join(own, on="split", how="left", maintain_order="left")
        .sort(pl.col("kind").replace_strict(kinds, return_dtype=pl.Int64), maintain_order=True)
        .select("split", "kind", "train", "test", "units", pl.col(MILAN).alias(metric), "low", "high", *others)
    )


def table_6(rows: pl.DataFrame) -> pl.DataFrame:
    """The paper's Table 6: a line per split on the texts generated for its held-out units."""
    mean = rows.filter(pl.col("trial").is_null(), pl.col("metric").is_in(TEXT_COLUMNS), system=MILAN)
    return mean.pivot(on="metric", index=["kind", "train", "test", "n"], values="value", maintain_order=True).rename(
        {"n": "texts"}
    )


def disagreements(
    descriptions: pl.DataFrame, references: Mapping[Unit, Sequence[str]], count: int = 12, seed: int = 0
) -> tuple[list[str], list[str]]:
    """Held-out units whose description by MILAN shares no word with any annotation, and random units, as lines of text.

    Args:
        descriptions: As for :func:`score_split`, with the column split.
        references: Unit → its annotations.
        count: Maximum number of units of each kind; the first line of the former counts all of them.
        seed: Seed of the choice.
    """
    rows = descriptions.filter(system=MILAN).sort("split", "trial", "model", "layer", "unit")
    units = list(rows.select("model", "layer", "unit").iter_rows())
    annotations = [references[unit] for unit in units]
    texts = rows["description"].to_list()

    def line(place: int) -> str:
        model, layer, unit = units[place]
        return (
            f"{rows['split'][place]}: {model} {layer} {unit}: “{texts[place]}”; the annotators: "
            f"{'; '.join(annotations[place])}"
        )

    order = np.random.default_rng(seed).permutation(len(units)).tolist()
    unlike = shares_no_word(texts, annotations)
    apart = [place for place in order if unlike[place]]
    first = f"{len(apart)} of {len(units)} descriptions of held-out units share no word with any annotation:"
    return [first, *map(line, apart[:count])], list(map(line, order[:count]))


def where(row: Mapping[str, object]) -> str:
    """The networks that a captioner generalizes from and to, of a row of :func:`table_3`."""
    return f"within {row['train']}" if row["train"] == row["test"] else f"{row['train']} → {row['test']}"


def summary(rows: pl.DataFrame) -> str:
    """The paper's Tables 3 and 6 on one screen."""
    metric = main_metric(rows)
    lines = [f"{metric} on held-out units (95 % interval over units), beside what costs nothing:"]
    table = table_3(rows)
    others = table.columns[table.columns.index("high") + 1 :]
    for row in table.iter_rows(named=True):
        beside = ", ".join(f"{name} {row[name]:.3f}" for name in others if row[name] is not None)
        own = f"{row[metric]:.3f} ({row['low']:.3f} to {row['high']:.3f})"
        lines.append(f"  {row['kind']:20} {where(row):40} {own}, {row['units']} units; {beside}")
    lines.append("what is said there: texts, distinct words, words per text, % nouns, adjectives, prepositions")
    for row in table_6(rows).iter_rows(named=True):
        values = "  ".join("–" if row.get(name) is None else f"{row[name]:.1f}" for name in TEXT_COLUMNS)
        lines.append(f"  {row['kind']:20} {where(row):40} {row['texts']}  {values}")
    return "\n".join(lines)
