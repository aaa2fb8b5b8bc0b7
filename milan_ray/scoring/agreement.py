"""How much people agree: every annotation against its unit's others (paper, Table 4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import polars as pl

from milan_ray.scoring.bootstrap import interval, ratio, resampling_counts
from milan_ray.scoring.text import ROUGE_KEYS, References, normalize, rouge_statistics

TextScore = Callable[[Sequence[str], References, Sequence[str]], np.ndarray]
"""From N texts, the references of each, and documents that words are weighed by, to (N, 3): precision, recall, F."""


def rouge_l(said: Sequence[str], others: References, documents: Sequence[str] | None = None) -> np.ndarray:
    """ROUGE-L in the place of BERTScore, where there is no language model: shared words in order, not meaning.

    Args:
        said: N texts.
        others: Per text its references; the mean over them counts.
        documents: Not used; BERTScore weighs words by them.

    Returns:
        float64 (N, 3): precision, recall, F.
    """
    sums = rouge_statistics(said, others)
    columns = [1 + ROUGE_KEYS.index(key) for key in ("rouge-l-p", "rouge-l-r", "rouge-l-f")]
    return sums[:, columns] / np.maximum(sums[:, :1], 1)


def leave_one_out(texts: pl.DataFrame, score: TextScore) -> pl.DataFrame:
    """Scores every annotation against its unit's others.

    Args:
        texts: Columns layer, unit, text and any others; with ``model``, units of several models are kept apart.
        score: BERTScore, or :func:`rouge_l`.

    Returns:
        The rows that could be compared, with a column score (F). Annotations without words and units with one
        annotation are left out.
    """
    unit = [name for name in ("model", "layer", "unit") if name in texts.columns]
    spoken = texts.filter(pl.col("text").map_elements(lambda text: bool(normalize(text)), pl.Boolean))
    spoken = spoken.filter(pl.len().over(unit) > 1)
    groups = spoken.with_row_index("row").group_by(unit, maintain_order=True).agg("row", "text")
    rows: list[int] = []  # rows of a unit need not stand together
    said: list[str] = []
    others: list[list[str]] = []
    for places, group in groups.select("row", "text").iter_rows():
        rows += places
        said += group
        others += [group[:place] + group[place + 1 :] for place in range(len(group))]
    scores = np.zeros(len(said))
    if said:
        scores[rows] = score(said, others, said)[:, 2]
    return spoken.with_columns(pl.Series("score", scores, pl.Float64))


def annotator_agreement(
    texts: pl.DataFrame, bert_score: TextScore, by: Sequence[str] = ("layer",), samples: int = 1000, seed: int = 0
) -> pl.DataFrame:
    """How much annotators agree (paper, Table 4): BERTScore of every annotation against its unit's others.

    Args:
        texts: Columns layer, unit, text and those of ``by``.
        bert_score: The scorer; figures of different language models do not compare.
        by: Columns to group by, ``annotator`` among them for how much each agrees with the others; none gives one row
            for all.
        samples: Bootstrap resamples.
        seed: Seed of the bootstrap.

    Returns:
        The columns of ``by``, then units, texts (compared), agreement (mean F) and the ends low and high of its 95 %
        bootstrap interval over units; groups in the order they first occur. Annotations without words and units with
        one annotation are left out.
    """
    return mean_agreement(leave_one_out(texts, bert_score), by, samples, seed)


def mean_agreement(
    scores: pl.DataFrame, by: Sequence[str] = ("layer",), samples: int = 1000, seed: int = 0
) -> pl.DataFrame:
    """:func:`annotator_agreement` from the scores of :func:`leave_one_out`, which may be grouped in several ways."""
    keys = {name: None for name in ("model", "layer", "unit", *by) if name in scores.columns}
    units = scores.group_by(list(keys), maintain_order=True).agg(pl.len().alias("texts"), pl.col("score").sum())
    found = []
    for values, group in units.group_by(list(by) or [pl.lit(0)], maintain_order=True):
        statistics = group.select("texts", "score").to_numpy()
        agreement = interval(statistics, ratio, resampling_counts(len(group), samples, seed))
        found.append((*(values if by else ()), len(group), int(statistics[:, 0].sum()), *agreement))
    figures = {"units": pl.Int64, "texts": pl.Int64, "agreement": pl.Float64, "low": pl.Float64, "high": pl.Float64}
    return pl.DataFrame(found, schema={**{name: scores.schema[name] for name in by}, **figures}, orient="row")
