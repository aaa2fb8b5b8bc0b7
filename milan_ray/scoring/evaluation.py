"""Scores descriptions against human annotations, and compares them with trivial baselines.

A text measure means little alone: on MILANNOTATIONS, the phrase "rounded edges in pictures" has a higher BLEU than real
descriptions. Every evaluation therefore scores the same units also with one phrase for all, with the descriptions
shuffled between units, with the nearest training unit's caption, and with the annotators against each other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.helpers import extract_all_word_ngrams

from milan_ray.schema import SCORES
from milan_ray.scoring.bootstrap import Interval, Measure, difference, interval, ratio, resampling_counts
from milan_ray.scoring.text import (
    ROUGE_KEYS,
    BertScore,
    bleu_statistics,
    bleu_values,
    normalize,
    rouge_statistics,
)

CONSTANT, SHUFFLED, NEAREST, RANDOM = TRIVIAL = ("constant", "shuffled", "nearest-copy", "random-weights")
"""Trivial baselines; callers use ``RANDOM`` for descriptions of an untrained network."""

METRICS = ("bleu", "bleu-2", "rouge-1-f", "rouge-2-f", "rouge-l-f", "bertscore-f")
"""Metrics of descriptions against annotations; higher is better for all of them."""

ANNOTATORS = "annotators (leave one out)"
NO_BERTSCORE = "skipped: no language model for BERTScore; pip install 'milan-ray[minilm]' or give a local model folder"

_NOTES = {
    CONSTANT: "the same caption for every unit: the training caption with the highest BLEU on the training annotations",
    SHUFFLED: "the system's own descriptions, each given to another unit: what its style earns without looking",
    NEAREST: "a caption of the training unit whose mean exemplar feature is nearest: what copying earns",
    RANDOM: "descriptions of the same network with untrained weights",
    ANNOTATORS: "each annotation against the unit's other annotations, so with one reference fewer than the other rows",
}
_READING = (
    "against all annotations of the unit; BLEU (n-grams to 4; bleu-2: to 2) runs to 100, ROUGE and BERTScore to 1; "
    "compare with the other rows"
)

Row = tuple[str, str, Interval, int, str]
"""(system, metric, value with its interval, number of units, note)."""


def score_table(experiment: str, rows: Sequence[Row]) -> pa.Table:
    """Converts rows of one evaluation into a table of schema SCORES; NaN ends of an interval become null."""
    flat = [(system, metric, *score, n, note) for system, metric, score, n, note in rows]
    names = ("system", "metric", "value", "low", "high", "n", "note")
    columns: dict[str, list[Any]] = {name: [row[place] for row in flat] for place, name in enumerate(names)}
    for end in ("low", "high"):
        columns[end] = [None if np.isnan(value) else value for value in columns[end]]
    return SCORES.table({"experiment": [experiment] * len(rows), **columns})


def system_rows(
    metric: str, reading: str, statistics: Mapping[str, np.ndarray], measure: Measure, counts: np.ndarray
) -> list[Row]:
    """Computes one metric of several systems on the same units, and the first system's margin over each baseline.

    Args:
        metric: Name of the metric.
        reading: How to interpret the metric; becomes the note of systems that are not ``TRIVIAL``.
        statistics: System → additive statistics (N, K), the main system first.
        measure: Maps sums of statistics to values.
        counts: (B, N) from :func:`~milan_ray.scoring.bootstrap.resampling_counts`.
    """
    main, of_main = next(iter(statistics.items()))
    rows = []
    for system, of_units in statistics.items():
        score = interval(of_units, measure, counts)
        rows.append((system, metric, score, len(of_units), _NOTES.get(system, reading)))
    for system, of_units in statistics.items():
        if system in TRIVIAL and system != main:
            gap = difference(of_main, of_units, measure, counts)
            rows.append(
                (f"{main} − {system}", metric, gap, len(of_units), f"paired difference; above 0: {main} is better")
            )
    return rows


def mean_rows(metric: str, reading: str, values: Mapping[str, np.ndarray], counts: np.ndarray) -> list[Row]:
    """Computes :func:`system_rows` of means over units.

    Args:
        metric: Name of the metric.
        reading: How to interpret the metric.
        values: System → a value per unit, (N,); the main system first.
        counts: (B, N) from :func:`~milan_ray.scoring.bootstrap.resampling_counts`.
    """
    statistics = {system: unit_values(of_units) for system, of_units in values.items()}
    return system_rows(metric, reading, statistics, ratio, counts)


def summary_lines(scores: pl.DataFrame) -> str:
    """A line per experiment and metric of a table of scores: every system with its value, or why there is none."""
    lines = []
    for (experiment, metric), rows in scores.group_by("experiment", "metric", maintain_order=True):
        shown = (f"{row['system']} {row['value']:.3g}" if row["n"] else row["note"] for row in rows.to_dicts())
        lines.append(f"  {experiment}, {metric}: {' · '.join(shown)}")
    return "\n".join(lines)


def unit_values(values: np.ndarray) -> np.ndarray:
    """Builds statistics (N, 2) for which :func:`~milan_ray.scoring.bootstrap.ratio` is the mean of values (N,)."""
    return np.stack([np.ones(len(values)), values], axis=1)


def shuffled(descriptions: Sequence[str], seed: int = 0) -> list[str]:
    """Gives every unit the description of another unit (or its own, if it is the only unit)."""
    order = np.random.default_rng(seed).permutation(len(descriptions))
    given = np.empty(len(descriptions), object)
    given[order] = [descriptions[i] for i in np.roll(order, 1)]
    return given.tolist()


def best_constant(references: Sequence[Sequence[str]]) -> str:
    """Finds the caption with the highest corpus BLEU when given to every unit (ties: alphabetically first).

    The search is exact over all distinct captions: a constant caption matches an n-gram in every unit that has it in a
    reference.

    Args:
        references: Per training unit its annotations.

    Raises:
        ValueError: There are no annotations.
    """
    tokenize = BLEU().tokenizer
    groups = [[text for text in map(normalize, group) if text] for group in references]
    counted = [[extract_all_word_ngrams(tokenize(text), 1, 4) for text in group] for group in groups if group]
    units_with: Counter[tuple[tuple[str, ...], int]] = Counter()  # (n-gram, k) → units with ≥ k of it in a reference
    for group in counted:
        most = Counter[tuple[str, ...]]()
        for ngrams, _ in group:
            most |= ngrams
        units_with.update((ngram, k) for ngram, count in most.items() for k in range(1, count + 1))
    lengths = [sorted({length for _, length in group}) for group in counted]
    closest: dict[int, int] = {}  # length of the constant → summed closest reference lengths
    best, best_bleu = None, -1.0
    for text in sorted({text for group in groups for text in group}):
        ngrams, length = extract_all_word_ngrams(tokenize(text), 1, 4)
        if length not in closest:
            closest[length] = sum(min(known, key=lambda other: abs(other - length)) for known in lengths)
        matched, total = [0] * 4, [0] * 4
        for ngram, count in ngrams.items():
            matched[len(ngram) - 1] += sum(units_with[ngram, k] for k in range(1, count + 1))
            total[len(ngram) - 1] += count * len(counted)
        score = bleu_values(np.array([[length * len(counted), closest[length], *matched, *total]]))[0]
        if score > best_bleu:
            best, best_bleu = text, score
    if best is None:
        raise ValueError("there are no annotations to choose a constant caption from")
    return best


def nearest_copy(train_features: np.ndarray, train_captions: Sequence[str], features: np.ndarray) -> list[str]:
    """Copies for each unit the caption of the nearest training unit.

    The distance is Euclidean, after scaling every dimension to unit variance over the training units, so that no
    encoder layer dominates because its activations are larger.

    Args:
        train_features: (M, F), mean over the exemplars of each training unit.
        train_captions: M captions.
        features: (N, F), the same for the units to describe.

    Returns:
        N captions.
    """
    centre, scale = train_features.mean(0), train_features.std(0)
    scale = np.where(scale > 0, scale, 1)
    known = (train_features - centre) / scale
    wanted = (features - centre) / scale
    # |a − b|² without |a|², which is the same for all candidates.
    nearest = ((known**2).sum(1) - 2 * wanted @ known.T).argmin(1)
    return [train_captions[i] for i in nearest]


def with_trivial_rows(
    predictions: Mapping[str, Sequence[str]], constant: str, nearest: Sequence[str] | None = None
) -> dict[str, list[str]]:
    """Adds the trivial baselines to the systems to compare.

    Args:
        predictions: System → description of each of N units; the first system is the one that is shuffled.
        constant: The caption for all units (:func:`best_constant`).
        nearest: Caption of each unit's nearest training unit (:func:`nearest_copy`); None adds no such row.
    """
    main = next(iter(predictions.values()))
    systems = {system: list(texts) for system, texts in predictions.items()}
    systems[CONSTANT] = [constant] * len(main)
    systems[SHUFFLED] = shuffled(main)
    if nearest is not None:
        systems[NEAREST] = list(nearest)
    return systems


def evaluate_text(
    experiment: str,
    systems: Mapping[str, Sequence[str]],
    references: Sequence[Sequence[str]],
    bert_score: BertScore | None = None,
    *,
    owners: Sequence[int] | None = None,
    orders: Sequence[int] = (4, 2),
    samples: int = 1000,
    seed: int = 0,
) -> pa.Table:
    """Scores descriptions against annotations: BLEU (0 to 100), ROUGE and BERTScore (0 to 1), higher is better.

    Every value has a 95 % bootstrap interval over units. Rows ``<first> − <trivial row>`` hold the difference between
    the first system and each baseline, with its paired interval.

    Args:
        experiment: Name of the evaluation.
        systems: System → description of each of N units (see :func:`with_trivial_rows`), the main one first.
        references: Per unit its annotations, at least one with words in it.
        bert_score: The scorer; None writes one row with the note that it was skipped.
        owners: The unit, 0 to U − 1, of each of N descriptions, if units were described more than once; the bootstrap
            resamples units. None means that each description belongs to a different unit.
        orders: Longest n-grams of each BLEU.
        samples: Bootstrap resamples.
        seed: Seed of the bootstrap.

    Returns:
        A table of schema SCORES.

    Raises:
        MilanError: A unit has no annotation with words in it.
        ValueError: A system does not describe every unit.
    """
    n = len(references)
    for system, descriptions in systems.items():
        if len(descriptions) != n:
            raise ValueError(f"{system} describes {len(descriptions)} units, the annotations are of {n}")
    # The annotators are another system. Its items are (unit, annotation), whose statistics are summed per unit.
    held_out = [
        (place, text, rest)
        for place, group in enumerate(references)
        for i, text in enumerate(group)
        if normalize(text) and any(map(normalize, rest := [*group[:i], *group[i + 1 :]]))
    ]
    unit = np.arange(n) if owners is None else np.asarray(owners)
    of_annotators = unit[[place for place, _, _ in held_out]]
    texts = [text for descriptions in systems.values() for text in descriptions] + [text for _, text, _ in held_out]
    answers = [group for _ in systems for group in references] + [rest for _, _, rest in held_out]

    counts = resampling_counts(int(unit.max()) + 1, samples, seed)
    rows = []
    for metric, statistics, measure in text_statistics(texts, answers, references, bert_score, orders):
        of_systems = statistics[: len(systems) * n].reshape(len(systems), n, -1)
        per_unit = [_per_unit(of_system, unit, counts.shape[1]) for of_system in of_systems]
        rows += system_rows(metric, _READING, dict(zip(systems, per_unit, strict=True)), measure, counts)
        if held_out:
            of_units = _per_unit(statistics[len(systems) * n :], of_annotators, counts.shape[1])
            agreement = interval(of_units, measure, counts)
            rows.append((ANNOTATORS, metric, agreement, len(np.unique(of_annotators)), _NOTES[ANNOTATORS]))
    if bert_score is None:
        rows.append((next(iter(systems)), "bertscore-f", Interval(np.nan, np.nan, np.nan), 0, NO_BERTSCORE))
    return score_table(experiment, rows)


def _per_unit(statistics: np.ndarray, owners: np.ndarray, units: int) -> np.ndarray:
    """Sums statistics (N, K) over the items of each unit: (units, K)."""
    sums = np.zeros((units, statistics.shape[1]))
    np.add.at(sums, owners, statistics)
    return sums


def text_statistics(
    texts: Sequence[str],
    answers: Sequence[Sequence[str]],
    references: Sequence[Sequence[str]],
    bert_score: BertScore | None,
    orders: Sequence[int] = (4, 2),
) -> Iterator[tuple[str, np.ndarray, Measure]]:
    """Yields each metric of :data:`METRICS` with its additive statistics, (number of texts, K), and its measure.

    Args:
        texts: Descriptions.
        answers: For each description, the annotations to score it against.
        references: All units' annotations, each once; they determine BERTScore's token weights.
        bert_score: The scorer; None leaves BERTScore out.
        orders: Longest n-grams of each BLEU.
    """
    statistics = bleu_statistics(texts, answers)
    for order in orders:
        yield "bleu" if order == 4 else f"bleu-{order}", statistics, partial(bleu_values, order=order)
    pairs = rouge_statistics(texts, answers)
    for kind in "12l":
        yield f"rouge-{kind}-f", pairs[:, [0, 1 + ROUGE_KEYS.index(f"rouge-{kind}-f")]], ratio
    if bert_score is not None:
        # One call for all systems, so that every distinct text is embedded once.
        f = bert_score(texts, answers, [text for group in references for text in group])[:, 2]
        yield "bertscore-f", unit_values(f), ratio
