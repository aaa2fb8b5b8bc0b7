"""What the words of descriptions say about units, and orders of ablation by it (paper, Section 5; REFERENCE §10)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from spacy.language import Language
from spacy.tokens import Doc, Token

from milan_ray.models.ablation import UnitSet

WORDS = ("airliner", "finch", "gazelle", "ship", "tabby", "truck")
"""Words that descriptions are compared with, the reference's."""

TAGS = {"nouns": "NOUN", "verbs": "VERB", "adpositions": "ADP", "adjectives": "ADJ"}
"""Criterion → Universal part-of-speech tag that is counted."""

FRACTIONS = tuple(round(0.02 * step, 2) for step in range(10))
"""Shares of all units that are ablated, the reference's."""

RANDOM = "random"
"""The criterion beside which the others are read: units in random order."""

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


@dataclass(frozen=True)
class Missing:
    """Criteria that a spaCy pipeline cannot give, and why."""

    criteria: tuple[str, ...]
    reason: str


def missing_criteria(nlp: Language, words: Sequence[str] = WORDS) -> list[Missing]:
    """What cannot be scored with a pipeline: parts of speech without a tagger, depth without a parser, and so on."""
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
    """Levels below the last root of a parsed text, 0 for a lone word (REFERENCE §10).

    A text that was taken for several sentences has several roots; the reference looks at the last.
    """
    roots = [token for token in doc if token.dep_ == "ROOT"]
    if not roots:
        return 0

    def below(token: Token) -> int:
        return max((1 + below(child) for child in token.children), default=0)

    return below(roots[-1])


def max_word_difference(doc: Doc) -> float:
    """The largest squared Euclidean distance between the vectors of two of a text's tokens (REFERENCE §10)."""
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
        Columns layer, property, share, units; layers in the order they first occur.
    """
    shown = {name: pl.col(column) > above for name, (column, above) in PROPERTIES.items() if column in scores.columns}
    if "max-word-difference" in scores.columns:
        bar = scores["max-word-difference"].quantile(TOP_WORD_DIFFERENCE, "linear")
        shown["top 10 % word difference"] = pl.col("max-word-difference") > bar
    return (
        scores.group_by("layer", maintain_order=True)
        .agg(*(holds.mean().alias(name) for name, holds in shown.items()), pl.len().cast(pl.Int64).alias("units"))
        .unpivot(list(shown), index=["layer", "units"], variable_name="property", value_name="share")
        .select("layer", "property", "share", "units")
    )


@dataclass(frozen=True)
class Order:
    """An order in which units are ablated.

    Attributes:
        criterion: By which: a criterion, or :data:`RANDOM`.
        trial: Counted from 0; only random orders have several.
        units: Places of the units in the table of scores, first ablated first.
    """

    criterion: str
    trial: int
    units: np.ndarray


def orders(scores: pl.DataFrame, trials: int = 5, seed: int = 0) -> list[Order]:
    """Orders of all units, highest score first, and random ones.

    Units of equal score stay in the table's order, as in the reference.

    Args:
        scores: From :func:`unit_scores`.
        trials: Random orders.
        seed: Of the random orders.
    """
    found = [
        Order(name, 0, np.argsort(-scores[name].to_numpy().astype(np.float64), kind="stable"))
        for name in criteria(scores)
    ]
    random = np.random.default_rng(seed)
    return found + [Order(RANDOM, trial, random.permutation(len(scores))) for trial in range(trials)]


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
