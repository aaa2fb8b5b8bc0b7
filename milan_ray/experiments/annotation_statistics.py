"""How people, and captioners, describe units: the corpus statistics of the paper's Tables 4, 5 and 6."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import spacy
from spacy.language import Language

from milan_ray.errors import MilanError
from milan_ray.scoring.bootstrap import interval, ratio, resampling_counts
from milan_ray.scoring.text import ROUGE_KEYS, References, normalize, rouge_statistics
from milan_ray.textfiles import clean, delimiter, read_text

TextScore = Callable[[Sequence[str], References, Sequence[str]], np.ndarray]
"""From N texts, the references of each, and documents that words are weighed by, to (N, 3): precision, recall, F."""

TEXT_COLUMNS = ("text", "summary", "description", "caption", "annotation")
"""Names of the column of texts, in the order they are looked for: ours, MILANNOTATIONS', those of generated files."""

PARTS_OF_SPEECH = {"noun": "NOUN", "adjective": "ADJ", "preposition": "ADP"}
"""Column of the statistics → Universal part-of-speech tag."""

_UNUSED = ("parser", "ner", "senter")  # pipeline components that decide neither tags nor lemmas, and take most time


def read_texts(path: str | Path) -> pl.DataFrame:
    """Reads a CSV of texts about units: MILANNOTATIONS' ``annotations.csv``, or descriptions from any captioner.

    Args:
        path: A file with columns ``layer``, ``unit`` and one of :data:`TEXT_COLUMNS`; others are left out.

    Returns:
        Columns layer (string, so that ``0`` stays a name), unit, text; rows as in the file, empty texts as ``""``.

    Raises:
        MilanError: It cannot be read, or lacks a column, or a unit is not a number.
    """
    try:
        text = read_text(path)
        table = pl.read_csv(text.encode(), infer_schema=False, separator=delimiter(text))
    except (OSError, UnicodeDecodeError, pl.exceptions.PolarsError) as error:
        raise MilanError(f"cannot read {path} ({error}): give a CSV file of layer, unit and text.") from error
    table = table.rename({name: clean(name) for name in table.columns})
    column = next((name for name in TEXT_COLUMNS if name in table.columns), None)
    if column is None or not {"layer", "unit"} <= set(table.columns):
        raise MilanError(
            f"{path} has the columns {', '.join(table.columns)}: it needs layer, unit and one of "
            f"{', '.join(TEXT_COLUMNS)}."
        )
    try:
        unit = pl.col("unit").str.strip_chars().cast(pl.Int64)
        return table.select(pl.col("layer").str.strip_chars(), unit, pl.col(column).fill_null("").alias("text"))
    except pl.exceptions.InvalidOperationError as error:
        raise MilanError(f"{path} has units that are not whole numbers ({error}): number them from 0.") from error


def load_language(name: str | Path | None = None) -> Language:
    """A spaCy pipeline for the statistics.

    Args:
        name: Installed pipeline (``en_core_web_sm``) or a directory with one; None takes English tokenizer rules
            alone, which give lengths and surface forms but no parts of speech.

    Raises:
        MilanError: There is no such pipeline.
    """
    if name is None:
        return spacy.blank("en")
    try:
        return spacy.load(name)
    except (OSError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise MilanError(f"no spaCy pipeline {str(name)!r} ({reason}): install it, or give its directory.") from error


def tag_words(texts: Sequence[str], nlp: Language) -> pl.DataFrame:
    """The words of texts; punctuation and white space are none.

    Args:
        texts: Any texts; equal ones are parsed once.
        nlp: From :func:`load_language`.

    Returns:
        One row per word, in order: place (of its text), word (lower-cased lemma; the lower-cased form itself where
        the pipeline has no lemmatizer), tag (Universal part of speech; null where the pipeline has no tagger).
    """
    distinct = list(dict.fromkeys(texts))
    with nlp.select_pipes(disable=[name for name in _UNUSED if name in nlp.pipe_names]):
        parsed = {
            text: [
                ((token.lemma_ or token.text).lower(), token.pos_ or None)
                for token in doc
                if not token.is_punct and not token.is_space
            ]
            for text, doc in zip(distinct, nlp.pipe(distinct, batch_size=256), strict=True)
        }
    rows = [(place, word, tag) for place, text in enumerate(texts) for word, tag in parsed[text]]
    return pl.DataFrame(rows, {"place": pl.Int64, "word": pl.String, "tag": pl.String}, orient="row")


def annotation_statistics(
    texts: pl.DataFrame, nlp: Language, by: Sequence[str] = ("layer",), words: pl.DataFrame | None = None
) -> pl.DataFrame:
    """Corpus statistics per group (paper, Tables 5 and 6).

    Words are counted as the paper's figures have it: punctuation left out, and as distinct lemmas. On MILANNOTATIONS of
    ResNet152-ImageNet lengths agree with Table 5 within .05 and words within 3 %; shares depend on the tagger.

    Args:
        texts: Columns layer, unit, text and those of ``by``: :func:`read_texts`, or the table of annotations.
        nlp: From :func:`load_language`.
        by: Columns to group by; none gives one row for all.
        words: What :func:`tag_words` found in the texts, where they are grouped in several ways.

    Returns:
        The columns of ``by``, then units, texts, words (distinct), length (mean words per text), and noun, adjective,
        preposition (% of words; null without a tagger); groups in the order they first occur.
    """
    keys = list(by) or ["all"]
    group = [pl.col(name) for name in by] or [pl.lit("").alias("all")]
    unit = [name for name in ("model", "layer", "unit") if name in texts.columns]
    place = texts.with_row_index("place").with_columns(pl.col("place").cast(pl.Int64))
    counts = place.group_by(group, maintain_order=True).agg(
        pl.struct(unit).n_unique().alias("units"), pl.len().alias("texts")
    )
    tagged = tag_words(texts["text"].to_list(), nlp) if words is None else words
    said = (
        tagged.join(place, on="place", maintain_order="left")
        .group_by(group)
        .agg(
            pl.col("word").n_unique().alias("words"),
            pl.len().alias("count"),
            *(
                pl.when(pl.col("tag").is_not_null().any()).then((pl.col("tag") == tag).mean() * 100).alias(name)
                for name, tag in PARTS_OF_SPEECH.items()
            ),
        )
    )
    return counts.join(said, on=keys, how="left", maintain_order="left").select(
        *by,
        "units",
        "texts",
        pl.col("words").fill_null(0),
        (pl.col("count").fill_null(0) / pl.col("texts")).alias("length"),
        *PARTS_OF_SPEECH,
    )


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
