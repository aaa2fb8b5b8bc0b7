"""Agreement of annotators: every annotation is scored against the other annotations of its unit (paper, Table 4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import polars as pl

from milan_ray.scoring.bootstrap import interval, ratio, resampling_counts
from milan_ray.scoring.text import ROUGE_KEYS, References, normalize, rouge_statistics

TextScore = Callable[[Sequence[str], References, Sequence[str]], np.ndarray]
"""Scores N texts, each against its references; word weights come from the documents (third argument).
Returns (N, 3): precision, recall, F."""


def rouge_l(texts: Sequence[str], references: References, documents: Sequence[str] | None = None) -> np.ndarray:
    """ROUGE-L with the signature of BERTScore, for use without a language model. Compares words, not meaning.

    Args:
        texts: N texts.
        references: References of each text; the score is the mean over them.
        documents: Not used; BERTScore computes word weights from them.

    Returns:
        float64 (N, 3): precision, recall, F.
    """
    sums = rouge_statistics(texts, references)
    columns = [1 + ROUGE_KEYS.index(key) for key in ("rouge-l-p", "rouge-l-r", "rouge-l-f")]
    return sums[:, columns] / np.maximum(sums[:, :1], 1)


def leave_one_out(texts: pl.DataFrame, score: TextScore) -> pl.DataFrame:
    """Scores every annotation against the other annotations of its unit.

    Args:
        texts: Columns layer, unit, text and any others. A ``model`` column separates the units of several models.
        score: BERTScore, or :func:`rouge_l`.

    Returns:
        The rows that can be compared, with a column score (F). Annotations without words and units with only one
        annotation are left out.
    """
    unit = [name for name in ("model", "layer", "unit") if name in texts.columns]
    annotations = texts.filter(pl.col("text").map_elements(lambda text: bool(normalize(text)), pl.Boolean))
    annotations = annotations.filter(pl.len().over(unit) > 1)
    groups = annotations.with_row_index("row").group_by(unit, maintain_order=True).agg("row", "text")
    rows: list[int] = []  # the rows of a unit need not be adjacent
    candidates: list[str] = []
    references: list[list[str]] = []
    for places, group in groups.select("row", "text").iter_rows():
        rows += places
        candidates += group
        references += [group[:place] + group[place + 1 :] for place in range(len(group))]
    scores = np.zeros(len(candidates))
    if candidates:
        scores[rows] = score(candidates, references, candidates)[:, 2]
    return annotations.with_columns(pl.Series("score", scores, pl.Float64))


def mean_agreement(
    scores: pl.DataFrame, by: Sequence[str] = ("layer",), samples: int = 1000, seed: int = 0
) -> pl.DataFrame:
    """Agreement of annotators (paper, Table 4): mean score of every annotation against the others of its unit.

    Args:
        scores: From :func:`leave_one_out`; scores by different language models cannot be compared.
        by: Columns to group by. ``annotator`` gives each annotator's agreement with the others; empty gives one row
            for all annotations.
        samples: Bootstrap resamples.
        seed: Seed of the bootstrap.

    Returns:
        The columns of ``by``, then units, texts (number compared), agreement (mean F) and the ends low and high of its
        95 % bootstrap interval over units. Groups are in order of first occurrence.
    """
    keys = {name: None for name in ("model", "layer", "unit", *by) if name in scores.columns}
    units = scores.group_by(list(keys), maintain_order=True).agg(pl.len().alias("texts"), pl.col("score").sum())
    rows = []
    for values, group in units.group_by(list(by) or [pl.lit(0)], maintain_order=True):
        statistics = group.select("texts", "score").to_numpy()
        agreement = interval(statistics, ratio, resampling_counts(len(group), samples, seed))
        rows.append((*(values if by else ()), len(group), int(statistics[:, 0].sum()), *agreement))
    figures = {"units": pl.Int64, "texts": pl.Int64, "agreement": pl.Float64, "low": pl.Float64, "high": pl.Float64}
    return pl.DataFrame(rows, schema={**{name: scores.schema[name] for name in by}, **figures}, orient="row")
