"""What the words of descriptions say about units, and orders of ablation by it (paper, Section 5)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from scipy.stats import t as student
from spacy.language import Language
from spacy.tokens import Doc, Token

from milan_ray.models.ablation import UnitSet
from milan_ray.scoring.differences import newcombe, wilson

WORDS = ("airliner", "finch", "gazelle", "ship", "tabby", "truck")
"""Words that descriptions are compared with, the reference's."""

TAGS = {"nouns": "NOUN", "verbs": "VERB", "adpositions": "ADP", "adjectives": "ADJ"}
"""Criterion → Universal part-of-speech tag that is counted."""

FRACTIONS = tuple(round(0.02 * step, 2) for step in range(10))
"""Shares of all units that are ablated, the reference's."""

RANDOM = "random"
"""The criterion that the others are compared with: units in random order."""

SAME_LAYERS = ": other units of the same layers"
"""Behind a criterion: not its units, but as many of each layer at every step."""

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


_FIRST = {
    "criterion": pl.String,
    "place": pl.Int64,
    "layer": pl.String,
    "unit": pl.Int64,
    "score": pl.Float64,
    "description": pl.String,
}


@dataclass(frozen=True)
class Missing:
    """Criteria that a spaCy pipeline cannot give, and why."""

    criteria: tuple[str, ...]
    reason: str


def missing_criteria(nlp: Language, words: Sequence[str] = WORDS) -> list[Missing]:
    """Criteria that a pipeline cannot give: parts of speech without a tagger, depth without a parser, and so on."""
    found = []
    if not {"tagger", "morphologizer", "attribute_ruler"} & set(nlp.pipe_names):
        found.append(Missing(tuple(TAGS), "the pipeline has no tagger"))
    if "parser" not in nlp.pipe_names:
        found.append(Missing(("parse-depth",), "the pipeline has no parser"))
    if nlp.vocab.vectors_length == 0:
        similar = tuple(f"similar to {word}" for word in words)
        found.append(Missing(("max-word-difference", *similar), "the pipeline has no word vectors"))
    return found


def parse_depth(doc: Doc) -> int:
    """Levels below the last root of a parsed text, 0 for a lone word.

    A text that was taken for several sentences has several roots; the reference looks at the last.
    """
    roots = [token for token in doc if token.dep_ == "ROOT"]
    if not roots:
        return 0

    def below(token: Token) -> int:
        return max((1 + below(child) for child in token.children), default=0)

    return below(roots[-1])


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
    without = {criterion for each in missing_criteria(nlp, words) for criterion in each.criteria}
    texts = descriptions["description"].to_list()
    distinct = list(dict.fromkeys(texts))
    targets = {word: nlp(word) for word in words if f"similar to {word}" not in without}
    rows = []
    for doc in nlp.pipe(distinct, batch_size=256):
        tags = [token.pos_ for token in doc]
        row = {name: float(tags.count(tag)) for name, tag in TAGS.items()}
        row["description-length"] = float(len(doc))
        if "parse-depth" not in without:
            row["parse-depth"] = float(parse_depth(doc))
        if "max-word-difference" not in without:
            row["max-word-difference"] = max_word_difference(doc)
        for word, target in targets.items():
            # spaCy warns, and says 0, where a text has no vector.
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
        Columns layer, property, holding (units of which it holds), units, share, and the ends low and high of its
        95 % interval; layers in the order they first occur.
    """
    shown = {name: pl.col(column) > above for name, (column, above) in PROPERTIES.items() if column in scores.columns}
    if "max-word-difference" in scores.columns:
        bar = scores["max-word-difference"].quantile(TOP_WORD_DIFFERENCE, "linear")
        shown[DIFFERENT_WORDS] = pl.col("max-word-difference") > bar
    counted = (
        scores.group_by("layer", maintain_order=True)
        .agg(*(holds.sum().cast(pl.Int64).alias(name) for name, holds in shown.items()), units=pl.len().cast(pl.Int64))
        .unpivot(list(shown), index=["layer", "units"], variable_name="property", value_name="holding")
    )
    share, low, high = wilson(counted["holding"].to_numpy(), counted["units"].to_numpy())
    return counted.select("layer", "property", "holding", "units").with_columns(
        share=pl.Series(share, dtype=pl.Float64),
        low=pl.Series(low, dtype=pl.Float64),
        high=pl.Series(high, dtype=pl.Float64),
    )


@dataclass(frozen=True)
class Contrast:
    """How much more common a property is in some layers than in others.

    Attributes:
        here: Share of units in the ones.
        there: Share of units in the others.
        low: Lower end of the 95 % interval of here − there (Newcombe 1998).
        high: Its upper end.
    """

    here: float
    there: float
    low: float
    high: float


def contrast(properties: pl.DataFrame, name: str, here: pl.Expr, there: pl.Expr) -> Contrast | None:
    """Compares the shares of a property in two groups of layers, units of each group taken together.

    Args:
        properties: From :func:`layer_properties`, of one or several networks.
        name: The property.
        here: Which rows are the ones.
        there: Which are the others.

    Returns:
        None where the property was not told, or a group has no units.
    """
    of_it = properties.filter(pl.col("property") == name)
    (a, of_a), (b, of_b) = (
        (int(rows["holding"].sum()), int(rows["units"].sum())) for rows in (of_it.filter(there), of_it.filter(here))
    )
    if not of_a or not of_b:
        return None
    low, high = newcombe(np.array([a]), of_a, np.array([b]), of_b)
    return Contrast(b / of_b, a / of_a, float(low[0]), float(high[0]))


def first_ablated(scores: pl.DataFrame, count: int = 10, of: Collection[str] | None = None) -> pl.DataFrame:
    """The units that each criterion ablates first (the paper's Figure 13 is chosen from among the first 10).

    Args:
        scores: From :func:`unit_scores`.
        count: Units per criterion.
        of: Criteria; all when left out.

    Returns:
        Columns criterion, place (from 1), layer, unit, score, description.
    """
    chosen = [name for name in criteria(scores) if of is None or name in of]
    if not chosen:
        return pl.DataFrame(schema=_FIRST)
    found = []
    for name in chosen:
        first = scores[np.argsort(-scores[name].to_numpy().astype(np.float64), kind="stable")[:count]]
        found.append(
            first.select(
                pl.lit(name).alias("criterion"),
                pl.int_range(1, pl.len() + 1, dtype=pl.Int64).alias("place"),
                "layer",
                pl.col("unit").cast(pl.Int64),
                pl.col(name).cast(pl.Float64).alias("score"),
                "description",
            )
        )
    return pl.concat(found)


def beside_random(rows: pl.DataFrame) -> pl.DataFrame:
    """Compares the accuracy that each criterion leaves with that of random orders.

    The measure is the mean accuracy over all steps that ablate something: the height of the curve.

    Args:
        rows: Columns condition, trial, ablated, accuracy, over all classes.

    Returns:
        Columns condition, accuracy, random (mean over the random orders), and low and high: the range in which 95 % of
        random orders are expected (Student's t; null with less than two of them). Lowest accuracy first.
    """
    heights = (
        rows.filter(pl.col("ablated") > 0)
        .group_by("condition", "trial", maintain_order=True)
        .agg(pl.col("accuracy").mean())
    )
    random = heights.filter(pl.col("condition") == RANDOM)["accuracy"].to_numpy()
    mean, low, high = expected_range(random)
    return (
        heights.filter(pl.col("condition") != RANDOM)
        .group_by("condition", maintain_order=True)
        .agg(pl.col("accuracy").mean())
        .with_columns(random=pl.lit(mean, pl.Float64), low=pl.lit(low, pl.Float64), high=pl.lit(high, pl.Float64))
        .sort("accuracy")
    )


def expected_range(values: np.ndarray) -> tuple[float | None, float | None, float | None]:
    """Mean of independent values, and the range in which 95 % of further ones are expected (Student's t).

    Returns:
        Mean, low, high; None for what cannot be said of so few.
    """
    if len(values) < 2:
        return (float(values[0]) if len(values) else None), None, None
    mean = float(values.mean())
    half = float(student.ppf(0.975, len(values) - 1) * values.std(ddof=1) * np.sqrt(1 + 1 / len(values)))
    return mean, mean - half, mean + half


@dataclass(frozen=True)
class Order:
    """An order in which units are ablated.

    Attributes:
        criterion: By which: a criterion, or :data:`RANDOM`.
        trial: Counted from 0; only random orders, and those with ties broken at random, have several.
        units: Places of the units in the table of scores, first ablated first.
    """

    criterion: str
    trial: int
    units: np.ndarray


def orders(
    scores: pl.DataFrame, trials: int = 5, seed: int = 0, ties: int = 0, matched: Collection[str] = ()
) -> list[Order]:
    """Orders of all units, highest score first, and random ones.

    Units of equal score stay in the table's order, as in the reference: layer by layer. Where few units have other
    scores than the rest, such an order says more of layers than of descriptions; ``ties`` takes that out.

    Args:
        scores: From :func:`unit_scores`.
        trials: Random orders.
        seed: Of whatever is random.
        ties: Orders per criterion, each with its ties broken at random; criteria by which all units are equal are left
            out. 0 for one order, ties in the table's order.
        matched: Criteria for which there are also orders of other units of the same layers: what of a criterion's
            effect is where its units lie.
    """
    random = np.random.default_rng(seed)
    shuffled = [Order(RANDOM, trial, random.permutation(len(scores))) for trial in range(trials)]
    found = []
    for name in criteria(scores):
        values = -scores[name].to_numpy().astype(np.float64)
        if not ties:
            found.append(Order(name, 0, np.argsort(values, kind="stable")))
        elif len(np.unique(values)) > 1:
            found += [Order(name, trial, np.lexsort((random.random(len(values)), values))) for trial in range(ties)]
    same = [_of_the_same_layers(order, scores, random) for order in found if order.criterion in matched]
    return found + same + shuffled


def _of_the_same_layers(order: Order, scores: pl.DataFrame, random: np.random.Generator) -> Order:
    """An order that takes as many units of each layer at every step, but any."""
    layers = scores["layer"].to_numpy()[order.units]
    units = order.units.copy()
    for layer in dict.fromkeys(layers):
        units[layers == layer] = random.permutation(units[layers == layer])
    return Order(f"{order.criterion}{SAME_LAYERS}", order.trial, units)


def units_of(scores: pl.DataFrame, places: np.ndarray) -> UnitSet:
    """The units in some places of a table, by layer."""
    found: dict[str, list[int]] = {}
    for layer, unit in scores[places].select("layer", "unit").iter_rows():
        found.setdefault(layer, []).append(unit)
    return found


def steps(order: Order, fractions: Sequence[float] = FRACTIONS) -> list[np.ndarray]:
    """The units ablated at each fraction of all: the first ⌊fraction · units⌋ of an order."""
    # The fractions are decimals: .58 of 50 units is 29, though .58 × 50 is 28.999….
    return [order.units[: int(round(fraction * len(order.units), 9))] for fraction in fractions]
