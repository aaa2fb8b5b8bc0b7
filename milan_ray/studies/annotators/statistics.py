"""Corpus statistics of annotations and of generated descriptions (the paper's Tables 4, 5 and 6)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import polars as pl
import spacy
from spacy.language import Language

from milan_ray.errors import MilanError
from milan_ray.textfiles import clean, delimiter, read_text

TEXT_COLUMNS = ("text", "summary", "description", "caption", "annotation")
"""Accepted names of the column of texts; the first one present is read."""

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


def load_spacy_pipeline(name: str | Path | None = None) -> Language:
    """A spaCy pipeline for the statistics.

    Args:
        name: Installed pipeline (``en_core_web_sm``) or its directory; None uses only English tokenizer rules, which
            give lengths and surface forms but no parts of speech.

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
    """The words of texts, without punctuation and white space.

    Args:
        texts: Any texts; equal ones are parsed once.
        nlp: From :func:`load_spacy_pipeline`.

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
        nlp: From :func:`load_spacy_pipeline`.
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
    by_group = (
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
    return counts.join(by_group, on=keys, how="left", maintain_order="left").select(
        *by,
        "units",
        "texts",
        pl.col("words").fill_null(0),
        (pl.col("count").fill_null(0) / pl.col("texts")).alias("length"),
        *PARTS_OF_SPEECH,
    )
