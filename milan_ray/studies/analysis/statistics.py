"""What the words of descriptions say about units, and orders of ablation by it (paper, Section 5)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from scipy.stats import t as student
from spacy.language import Language
from spacy.tokens import Doc, Token

from milan_ray.scoring.differences import newcombe, wilson
from milan_ray.studies.ablation.curves import RANDOM, Order

WORDS = ("airliner", "finch", "gazelle", "ship", "tabby", "truck")
"""Words that descriptions are compared with, the reference's."""

TAGS = {"nouns": "NOUN", "verbs": "VERB", "adpositions": "ADP", "adjectives": "ADJ"}
"""Criterion → Universal part-of-speech tag that is counted."""

FRACTIONS = tuple(round(0.02 * step, 2) for step in range(10))
"""Shares of all units that are ablated, the reference's."""

SAME_LAYERS = ": other units of the same layers"
"""Suffix of a criterion: at every step, as many units of each layer are ablated, but random ones."""

PROPERTIES: Mapping[str, tuple[str, float]] = {
    "contains a verb": ("verbs", 0),
    "contains an adjective": ("adjectives", 0),
    "contains an adposition": ("adpositions", 0),
    "length > 10": ("description-length", 10),
    "parse depth > 3": ("parse-depth", 3),
}
"""Property of a description → the criterion that decides it, and the score above which it holds (Figure 4, right)."""

TOP_WORD_DIFFERENCE = 0.9
"""Quantile of the word difference above which a description counts as made of different words (Figure 4, right)."""

DIFFERENT_WORDS = "top 10 % word difference"
"""The property that this quantile decides."""


def missing_criteria(nlp: Language, words: Sequence[str] = WORDS) -> dict[str, tuple[str, ...]]:
    """Reason → criteria that a pipeline cannot compute: without a tagger, a parser or word vectors."""
    missing: dict[str, tuple[str, ...]] = {}
    if not {"tagger", "morphologizer", "attribute_ruler"} & set(nlp.pipe_names):
        missing["the pipeline has no tagger"] = tuple(TAGS)
    if "parser" not in nlp.pipe_names:
        missing["the pipeline has no parser"] = ("parse-depth",)
    if nlp.vocab.vectors_length == 0:
        missing["the pipeline has no word vectors"] = (
            "max-word-difference",
            *(f"similar to {word}" for word in words),
        )
    return missing


def parse_depth(doc: Doc) -> int:
    """Levels below the last root of a parsed text, 0 for a single word or without a parser.

    A text that was parsed as several sentences has several roots; the reference uses the last one.
    """

    def below(token: Token) -> int:
        return max((1 + below(child) for child in token.children), default=0)

    roots = [token for token in doc if token.dep_ == "ROOT"]
    return below(roots[-1]) if roots else 0


def max_word_difference(doc: Doc) -> float:
    """The largest squared Euclidean distance between the vectors of two of a text's tokens."""
    if not len(doc):
        return 0.0
    vectors = np.array([token.vector for token in doc], np.float64)
    squares = (vectors**2).sum(1)
    return float((squares[:, None] + squares - 2 * vectors @ vectors.T).max().clip(min=0))


def unit_scores(descriptions: pl.DataFrame, nlp: Language, words: Sequence[str] = WORDS) -> pl.DataFrame:
    """Scores every unit by the criteria that the pipeline allows.

    Args:
        descriptions: Columns layer, unit, description.
        nlp: A spaCy pipeline; what it lacks is in :func:`missing_criteria`.
        words: Words to compare descriptions with.

    Returns:
        Columns layer, unit, description, and a float column per criterion: nouns, verbs, adpositions, adjectives
        (counts), description-length (tokens), parse-depth (levels), max-word-difference (squared distance of word
        vectors), ``similar to WORD`` (cosine). Rows as given.
    """
    without = {criterion for criteria in missing_criteria(nlp, words).values() for criterion in criteria}
    texts = descriptions["description"].to_list()
    distinct = list(dict.fromkeys(texts))
    targets = {word: nlp(word) for word in words if f"similar to {word}" not in without}
    rows = []
    for doc in nlp.pipe(distinct, batch_size=256):
        tags = [token.pos_ for token in doc]
        row = {name: float(tags.count(tag)) for name, tag in TAGS.items()}
        row["description-length"] = float(len(doc))
        row["parse-depth"] = float(parse_depth(doc))
        row["max-word-difference"] = max_word_difference(doc)
        for word, target in targets.items():
            # Where a text has no vector, spaCy would warn and return 0.
            row[f"similar to {word}"] = float(doc.similarity(target)) if doc.vector_norm and target.vector_norm else 0.0
        rows.append({name: score for name, score in row.items() if name not in without})
    scored = pl.DataFrame(rows).with_columns(pl.Series("description", distinct, pl.String))
    return descriptions.select("layer", "unit", "description").join(
        scored, on="description", how="left", maintain_order="left"
    )


def criteria(scores: pl.DataFrame) -> list[str]:
    """The criteria of :func:`unit_scores`' columns."""
    return [name for name in scores.columns if name not in ("layer", "unit", "description")]


def layer_properties(scores: pl.DataFrame) -> pl.DataFrame:
    """How common properties of descriptions are in every layer (Figure 4, right).

    Returns:
        Columns layer, property, holding (units that have it), units, share, and the ends low and high of its 95 %
        interval; layers in order of first occurrence.
    """
    has = {name: pl.col(column) > above for name, (column, above) in PROPERTIES.items() if column in scores.columns}
    if "max-word-difference" in scores.columns:
        bound = scores["max-word-difference"].quantile(TOP_WORD_DIFFERENCE, "linear")
        has[DIFFERENT_WORDS] = pl.col("max-word-difference") > bound
    counted = (
        scores.group_by("layer", maintain_order=True)
        .agg(*(holds.sum().cast(pl.Int64).alias(name) for name, holds in has.items()), units=pl.len().cast(pl.Int64))
        .unpivot(list(has), index=["layer", "units"], variable_name="property", value_name="holding")
    )
    shares = wilson(counted["holding"].to_numpy(), counted["units"].to_numpy())
    return counted.select("layer", "property", "holding", "units").with_columns(
        pl.Series(name, values, pl.Float64) for name, values in zip(("share", "low", "high"), shares, strict=True)
    )


@dataclass(frozen=True)
class Contrast:
    """How much more common a property is in some layers than in others.

    Attributes:
        share: Share of units in some layers.
        other: Share of units in the other layers.
        low: Lower end of the 95 % interval of share − other (Newcombe 1998).
        high: Its upper end.
    """

    share: float
    other: float
    low: float
    high: float


def contrast(properties: pl.DataFrame, name: str, some: pl.Expr, others: pl.Expr) -> Contrast | None:
    """Compares the shares of a property in two groups of layers, the units of each group taken together.

    Args:
        properties: From :func:`layer_properties`, of one or several networks.
        name: The property.
        some: The rows of the first group.
        others: The rows of the second group.

    Returns:
        None if the property was not computed, or a group has no units.
    """
    rows = properties.filter(pl.col("property") == name)
    (b, of_b), (a, of_a) = (rows.filter(group).select("holding", "units").sum().row(0) for group in (some, others))
    if not of_a or not of_b:
        return None
    low, high = newcombe(np.array([a]), of_a, np.array([b]), of_b)
    return Contrast(b / of_b, a / of_a, float(low[0]), float(high[0]))


def first_ablated(scores: pl.DataFrame, count: int = 10) -> pl.DataFrame:
    """The units that each criterion ablates first (the paper's Figure 13 is chosen from among the first 10).

    Args:
        scores: From :func:`unit_scores`.
        count: Units per criterion.

    Returns:
        Columns criterion, place (from 1), layer, unit, score, description.
    """
    return pl.concat(
        scores.sort(name, descending=True, maintain_order=True)
        .head(count)
        .select(
            pl.lit(name).alias("criterion"),
            pl.int_range(1, pl.len() + 1, dtype=pl.Int64).alias("place"),
            "layer",
            pl.col("unit").cast(pl.Int64),
            pl.col(name).cast(pl.Float64).alias("score"),
            "description",
        )
        for name in criteria(scores)
    )


def beside_random(rows: pl.DataFrame) -> pl.DataFrame:
    """Compares the accuracy that each criterion leaves with that of random orders.

    The measure is the mean accuracy over all steps that ablate something: the height of the curve.

    Args:
        rows: Columns condition, trial, ablated, accuracy, over all classes.

    Returns:
        Columns condition, accuracy, random (mean over the random orders), and low and high: the range in which 95 % of
        random orders are expected (Student's t; null with less than two of them). Lowest accuracy first.
    """
    accuracy = pl.col("accuracy").mean()
    heights = rows.filter(pl.col("ablated") > 0).group_by("condition", "trial", maintain_order=True).agg(accuracy)
    is_random = pl.col("condition") == RANDOM
    expected = expected_range(heights.filter(is_random)["accuracy"].to_numpy())
    means = heights.filter(~is_random).group_by("condition", maintain_order=True).agg(accuracy)
    columns = (pl.lit(v, pl.Float64).alias(name) for name, v in zip(("random", "low", "high"), expected, strict=True))
    return means.with_columns(columns).sort("accuracy")


def expected_range(values: np.ndarray) -> tuple[float | None, float | None, float | None]:
    """Mean of independent values, and the range in which 95 % of further ones are expected (Student's t).

    Returns:
        Mean, low, high; the range is None for fewer than two values, the mean for none.
    """
    if len(values) < 2:
        return (float(values[0]) if len(values) else None), None, None
    mean = float(values.mean())
    half = float(student.ppf(0.975, len(values) - 1) * values.std(ddof=1) * np.sqrt(1 + 1 / len(values)))
    return mean, mean - half, mean + half


def orders(
    scores: pl.DataFrame, trials: int = 5, seed: int = 0, ties: int = 0, matched: Collection[str] = ()
) -> list[Order]:
    """Orders of all units by each criterion, highest score first, and random orders.

    Units of equal score stay in the order of the table, as in the reference: layer by layer. If most units have the
    same score, such an order reflects layers more than descriptions; ``ties`` avoids this.

    Args:
        scores: From :func:`unit_scores`.
        trials: Random orders.
        seed: Seed of everything random.
        ties: Orders per criterion, each with its ties broken at random; criteria with equal scores for all units are
            left out. 0 makes one order, with ties in the order of the table.
        matched: Criteria that also get orders of random units of the same layers. Such an order shows how much of the
            criterion's effect comes from the layers of its units.
    """
    random = np.random.default_rng(seed)
    shuffled = [Order(RANDOM, trial, random.permutation(len(scores))) for trial in range(trials)]
    by_criterion = []
    for name in criteria(scores):
        values = -scores[name].to_numpy().astype(np.float64)
        if not ties:
            by_criterion.append(Order(name, 0, np.argsort(values, kind="stable")))
        elif len(np.unique(values)) > 1:
            by_criterion += [
                Order(name, trial, np.lexsort((random.random(len(values)), values))) for trial in range(ties)
            ]
    same = [_of_the_same_layers(order, scores, random) for order in by_criterion if order.criterion in matched]
    return by_criterion + same + shuffled


def _of_the_same_layers(order: Order, scores: pl.DataFrame, random: np.random.Generator) -> Order:
    """An order with as many units of each layer at every step, chosen at random."""
    layers = scores["layer"].to_numpy()[order.units]
    units = order.units.copy()
    for layer in dict.fromkeys(layers):
        units[layers == layer] = random.permutation(units[layers == layer])
    return Order(f"{order.criterion}{SAME_LAYERS}", order.trial, units)


def step_counts(units: int, fractions: Sequence[float] = FRACTIONS) -> list[int]:
    """The number of units ablated at each fraction of all: ⌊fraction · units⌋."""
    # The fractions are decimals: .58 of 50 units is 29, though .58 × 50 is 28.999….
    return [int(round(fraction * units, 9)) for fraction in fractions]
