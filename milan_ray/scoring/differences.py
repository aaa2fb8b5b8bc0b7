"""Compares the descriptions of two networks: words gained and lost, and units whose description changed.

The comparison uses shares of units, so networks of any size and architecture can be compared. Fisher's exact test
assumes that units are independent draws. Those of one network are not (many may have the same description for one
reason), so use p to rank differences, not as proof.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from milan_ray.config import config_hash
from milan_ray.errors import MilanError
from milan_ray.names import SIGN
from milan_ray.schema import CHANGES, DESCRIPTIONS, DIFFERENCES
from milan_ray.scoring.comparable import comparable
from milan_ray.scoring.words import asked_in, content_words
from milan_ray.storage import Storage

ALL_LAYERS = ""
"""Value of column ``layer`` in rows on all layers together."""

_Z = 1.959963984540054  # the normal distribution's .975 quantile
_SAME = 1 + 1e-7  # rounding tolerance for "as likely as the observed table", as in R and scipy


@dataclass(frozen=True, eq=False)
class Difference:
    """Differences between two networks' descriptions.

    Attributes:
        words: One row per word and layer (:data:`ALL_LAYERS`, then each common layer), the clearest difference first.
            Columns: word, layer, units and of (the model's units with the word, and all its units), other_units and
            other_of, difference (share in the other minus share in the model) with its 95 % interval low and high, p
            (Fisher's exact test, two-sided), q (p after Benjamini and Hochberg over the words of a layer).
        changes: Units whose description changed, in layers that have the same units in both networks. Columns: layer,
            unit, description, other_description, gained and lost (words of the other network compared to the model).
        units: Number of units that are compared one by one.
        sizes: Numbers of described units of the model and of the other.
    """

    words: pl.DataFrame
    changes: pl.DataFrame
    units: int
    sizes: tuple[int, int]


def diff_descriptions(
    descriptions: pl.LazyFrame | pl.DataFrame,
    model: str,
    other: str,
    *,
    words: Sequence[str] = (),
    by_layer: bool = False,
    same: Sequence[str] = (),
) -> Difference:
    """Compares the descriptions of two networks by one labeler.

    All forms of a word are counted as one word, named by the shortest form (*face* for *faces*). Function words are
    left out. Units that have a counterpart are also compared one by one. This is meaningful only if one network was
    made from the other, or both in the same way; the comparison of words is meaningful for any two networks. Features
    are counted where both networks have a set of the name, and have counterparts where it is the same set.

    Args:
        descriptions: Columns labeler, model, layer, unit, description.
        model: The baseline network.
        other: The network to compare with it; words that it has more often are gained.
        words: Count only these, with ``face|person`` and ``"left of"`` as in a search; empty counts all words.
        by_layer: Also compare each common layer.
        same: Layers of features that are the same in both networks, by :func:`same_features`.

    Raises:
        MilanError: A network has no descriptions, or the descriptions are by several labelers.
    """
    columns = ["labeler", "model", "layer", "unit", "description"]
    both = descriptions.lazy().filter(pl.col("model").is_in([model, other])).select(columns).collect()
    for name in (model, other):
        if name not in both["model"]:
            raise MilanError(f"there are no descriptions of {name}; describe it first, or look at `jobs.status`.")
    if both["labeler"].n_unique() > 1:
        raise MilanError(f"descriptions by {', '.join(sorted(set(both['labeler'])))}: compare those of one labeler.")
    both = comparable(both, (model, other), "difference")
    texts = both.select("description").unique().sort("description")
    texts = texts.with_columns(_heads(texts["description"], words))
    both = both.join(texts, on="description", maintain_order="left")
    tables = [_compare(both, model, other, ALL_LAYERS, words)]
    layers = both.filter(pl.col("model") == model)["layer"].unique(maintain_order=True).to_list()
    paired = _paired(both, model, other, [layer for layer in layers if SIGN not in layer or layer in same])
    if by_layer:
        shared = both.group_by("layer").agg(pl.col("model").n_unique()).filter(pl.col("model") == 2)
        for layer in [layer for layer in layers if layer in shared["layer"]]:
            tables.append(_compare(both.filter(pl.col("layer") == layer), model, other, layer, words))
    changed = paired.filter(pl.col("description") != pl.col("other_description"))
    sizes = [int((both["model"] == name).sum()) for name in (model, other)]
    return Difference(pl.concat(tables), changed, len(paired), (sizes[0], sizes[1]))


def _heads(texts: pl.Series, words: Sequence[str]) -> pl.Series:
    """Returns the words to count in each text, without duplicates: lists of strings."""
    if words:
        return asked_in(texts, words)
    contents = content_words(texts)
    return pl.Series("words", [sorted(contents[text]) for text in texts], pl.List(pl.String))


def _compare(both: pl.DataFrame, model: str, other: str, layer: str, words: Sequence[str]) -> pl.DataFrame:
    sizes = {name: int((both["model"] == name).sum()) for name in (model, other)}
    counts = (
        both.select("model", "words")
        .explode("words")
        .drop_nulls()
        .group_by(pl.col("words").alias("word"))
        .agg(
            (pl.col("model") == model).sum().cast(pl.Int64).alias("units"),
            (pl.col("model") == other).sum().cast(pl.Int64).alias("other_units"),
        )
    )
    if words:  # a word that occurs nowhere gets a row too
        asked = pl.DataFrame({"word": list(dict.fromkeys(words))})
        counts = asked.join(counts, on="word", how="left", maintain_order="left").fill_null(0)
    a, b = (counts[name].to_numpy() for name in ("units", "other_units"))
    low, high = newcombe(a, sizes[model], b, sizes[other])
    p = fisher(a, sizes[model], b, sizes[other])
    table = counts.select(
        "word",
        pl.lit(layer).alias("layer"),
        "units",
        pl.lit(sizes[model], pl.Int64).alias("of"),
        "other_units",
        pl.lit(sizes[other], pl.Int64).alias("other_of"),
        pl.Series("difference", b / sizes[other] - a / sizes[model], pl.Float64),
        pl.Series("low", low, pl.Float64),
        pl.Series("high", high, pl.Float64),
        pl.Series("p", p, pl.Float64),
        pl.Series("q", false_discovery(p), pl.Float64),
    )
    if words:
        return table
    return table.sort("p", pl.col("difference").abs(), "word", descending=[False, True, False])


def _paired(both: pl.DataFrame, model: str, other: str, layers: Sequence[str]) -> pl.DataFrame:
    """Pairs the units of those of some layers that have the same units in both networks, in the order of the layers."""
    mine, theirs = (both.filter(pl.col("model") == name).drop("model", "labeler") for name in (model, other))
    units = [side.group_by("layer").agg(pl.col("unit").sort().alias("all")) for side in (mine, theirs)]
    alike = units[0].join(units[1], on="layer").filter(pl.col("all") == pl.col("all_right"))["layer"]
    alike = alike.filter(alike.is_in(layers))
    pairs = mine.filter(pl.col("layer").is_in(alike.to_list())).join(theirs, on=["layer", "unit"], suffix="_other")
    return pairs.select(
        "layer",
        "unit",
        "description",
        pl.col("description_other").alias("other_description"),
        pl.col("words_other").list.set_difference("words").list.sort().alias("gained"),
        pl.col("words").list.set_difference("words_other").list.sort().alias("lost"),
    ).sort(pl.col("layer").cast(pl.Enum(layers)), "unit")


def fisher(a: np.ndarray, of_a: int, b: np.ndarray, of_b: int) -> np.ndarray:
    """Fisher's exact test, two-sided: the total probability of tables that are no likelier than the observed one.

    Args:
        a: Counts out of ``of_a``, (W,).
        of_a: Sample size, at least the largest count in ``a``.
        b: Counts out of ``of_b``, (W,).
        of_b: Sample size, at least the largest count in ``b``.

    Returns:
        p, float64 (W,).
    """
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, of_a + of_b + 1)))])  # logarithms of factorials

    def choose(n: int, k: np.ndarray) -> np.ndarray:
        return logs[n] - logs[k] - logs[n - k]

    p: dict[tuple[int, int], float] = {}
    for pair in set(zip(a.tolist(), b.tolist(), strict=True)):
        both = sum(pair)
        k = np.arange(max(0, both - of_b), min(of_a, both) + 1)
        chances = np.exp(choose(of_a, k) + choose(of_b, both - k) - choose(of_a + of_b, np.array(both)))
        observed = chances[pair[0] - k[0]]
        p[pair] = min(1.0, math.fsum(chances[chances <= observed * _SAME]))
    return np.array([p[pair] for pair in zip(a.tolist(), b.tolist(), strict=True)], np.float64)


def newcombe(a: np.ndarray, of_a: int, b: np.ndarray, of_b: int) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of b / of_b − a / of_a, from the Wilson interval of each share (Newcombe 1998, method 10)."""
    share_a, low_a, high_a = wilson(a, of_a)
    share_b, low_b, high_b = wilson(b, of_b)
    gap = share_b - share_a
    return gap - np.hypot(share_b - low_b, high_a - share_a), gap + np.hypot(high_b - share_b, share_a - low_a)


def wilson(count: np.ndarray, of: np.ndarray | int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the shares count / of, and the ends of their 95 % Wilson intervals (1927)."""
    share = count / of
    centre = share + _Z**2 / (2 * of)
    spread = _Z * np.sqrt(share * (1 - share) / of + _Z**2 / (4 * of**2))
    return share, (centre - spread) / (1 + _Z**2 / of), (centre + spread) / (1 + _Z**2 / of)


def false_discovery(p: np.ndarray) -> np.ndarray:
    """Adjusts p values: the lowest false discovery rate at which each is significant (Benjamini and Hochberg 1995)."""
    from scipy.stats import false_discovery_control  # imported here, because it takes half a second

    return false_discovery_control(p, method="bh") if len(p) else p


def store(
    storage: Storage, difference: Difference, labeler: str, model: str, other: str, words: Sequence[str] = ()
) -> None:
    """Writes a difference into a run directory, from where the report reads it.

    Args:
        storage: The run directory.
        difference: The difference.
        labeler: The labeler whose descriptions were compared.
        model: The baseline network.
        other: The network compared with it.
        words: The words that the user asked for.
    """
    keys = {"labeler": labeler, "model": model, "other": other}
    config = difference_config(storage, labeler, model, other, words)
    metadata = {"units": str(difference.units), "words": json.dumps(list(words))}
    for table, frame in ((DIFFERENCES, difference.words), (CHANGES, difference.changes)):
        columns: dict[str, object] = {name: [value] * len(frame) for name, value in keys.items()}
        columns |= {column.name: frame[column.name].to_list() for column in table.columns if column.name not in keys}
        storage.write(table, table.table(columns, metadata), config, **keys)


def difference_config(storage: Storage, labeler: str, model: str, other: str, words: Sequence[str]) -> str:
    """Hashes the inputs of a difference: both networks' current descriptions, and the words asked for."""
    described = [
        keys for name in (model, other) for keys in storage.partitions(DESCRIPTIONS, labeler=labeler, model=name)
    ]
    configs = [storage.config_of(DESCRIPTIONS, **keys) for keys in described]
    version = 2 if any(SIGN in keys["layer"] for keys in described) else 1  # 1 paired features of different sets
    return config_hash({"difference": version, "descriptions": configs, "words": list(words)})


def summary(difference: Difference, model: str, other: str, top: int) -> str:
    """Summarises a difference as text that fits on one screen."""
    lines = [f"{model} ({difference.sizes[0]} units) against {other} ({difference.sizes[1]} units)"]
    lines.append(f"{'word':24} {model[-16:]:>16} {other[-16:]:>16}  {'difference [95 %]':>28}  {'q':>7}")
    for row in difference.words.head(top).iter_rows(named=True):
        word = f"{row['word']} ({row['layer']})" if row["layer"] else row["word"]
        gap = f"{row['difference']:+.1%} [{row['low']:+.1%}, {row['high']:+.1%}]"
        lines.append(f"{word:24} {row['units']:>16} {row['other_units']:>16}  {gap:>28}  {row['q']:7.2g}")
    if difference.units:
        lines.append(f"unit by unit: {len(difference.changes)} of {difference.units} say something else")
        changed = difference.changes.filter((pl.col("gained").list.len() + pl.col("lost").list.len()) > 0)
        for row in changed.head(top).iter_rows(named=True):
            change = f"{row['description']} → {row['other_description']}"
            marks = [f"+{word}" for word in row["gained"]] + [f"−{word}" for word in row["lost"]]
            lines.append(f"  {row['layer']} {row['unit']}: {change}  ({', '.join(marks)})")
    else:
        lines.append("unit by unit: nothing; they have no layer of one name with the same units")
    return "\n".join(lines)
