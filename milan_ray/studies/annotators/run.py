"""Statistics of annotations: number, length, words, and agreement of annotators (the paper's Tables 1, 4 and 5)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import polars as pl
from spacy.language import Language

from milan_ray.config import config_hash
from milan_ray.errors import MilanError, unknown_name
from milan_ray.progress import say
from milan_ray.schema import ANNOTATION_STATISTICS, ANNOTATIONS
from milan_ray.scoring.agreement import TextScore, leave_one_out, mean_agreement, rouge_l
from milan_ray.scoring.text import BertScore
from milan_ray.storage import Storage
from milan_ray.studies.annotators.statistics import annotation_statistics, read_texts, tag_words
from milan_ray.studies.tables import frame_of, read_frame, table_of

KERNEL_VERSION = "annotation-statistics-1"

LEVELS: tuple[tuple[str, ...], ...] = (("model", "layer"), ("model",), ())
"""Keys that annotations are grouped by: the rows of Table 5, those of Tables 1 and 4, and the totals."""


def find_score(folder: str | Path | None) -> tuple[TextScore, str]:
    """The measure of agreement, and its name: BERTScore if there is a language model, otherwise ROUGE-L.

    Args:
        folder: Folder of the language model; None uses ROUGE-L.
    """
    if folder is None:
        say("agreement is measured by ROUGE-L; --bertscore takes a language model")
        return rouge_l, "ROUGE-L"
    place = Path(folder)
    name = place.parent.name if place.name == "model" else place.name  # wheels keep the model in a folder of this name
    return BertScore(folder), f"BERTScore by {name}"


def stored_annotations(storage: Storage, source: str | None, models: Sequence[str] | None = None) -> pl.DataFrame:
    """All annotations of a source.

    Args:
        storage: The run directory.
        source: The source; None uses the only one.
        models: Names of models; None for all.

    Returns:
        Columns source, model, layer, unit, annotator, text; layers in their model's order, rows as stored.

    Raises:
        MilanError: There are no annotations, several sources, or no source or model of such a name.
    """
    every = storage.partitions(ANNOTATIONS)
    sources = sorted({keys["source"] for keys in every})
    if source is None and len(sources) > 1:
        raise MilanError(f"there are annotations of {', '.join(sources)}: say which with --source.")
    if not every:
        raise MilanError(f"{storage.root} holds no annotations: import some, or give a CSV file.")
    if source is not None and source not in sources:
        raise unknown_name("source of annotations", source, sources)
    partitions = storage.in_model_order(keys for keys in every if keys["source"] == (source or sources[0]))
    known = {keys["model"] for keys in partitions}
    for name in models or ():
        if name not in known:
            raise unknown_name("model with annotations", name, known)
    columns = [column.name for column in ANNOTATIONS.columns]
    return pl.concat(
        read_frame(storage, ANNOTATIONS, columns, **keys)
        for keys in partitions
        if models is None or keys["model"] in models
    )


def file_annotations(path: str | Path, model: str | None = None, source: str | None = None) -> pl.DataFrame:
    """Annotations of a CSV file (layer, unit, summary).

    Args:
        path: The file.
        model: The annotated model; None uses the file's name.
        source: Name of the source; None uses the file's name.

    Returns:
        Columns source, model, layer, unit, text.
    """
    name = Path(path).stem
    return read_texts(path).select(
        pl.lit(source or name).alias("source"), pl.lit(model or name).alias("model"), pl.all()
    )


def run_statistics(
    storage: Storage, texts: pl.DataFrame, nlp: Language, language: str, score: TextScore, measure: str
) -> pl.DataFrame:
    """Computes statistics and agreement of annotations, and writes the table unless it is up to date.

    Args:
        storage: The run directory.
        texts: Columns source (one value), model, layer, unit, text.
        nlp: The spaCy pipeline that tags words.
        language: Its name.
        score: The measure of agreement.
        measure: Its name.

    Returns:
        Rows of schema ANNOTATION_STATISTICS.
    """
    source = texts["source"][0]
    rows = texts.select("model", "layer", "unit", "text").rows()
    stamp = config_hash({"kernel": KERNEL_VERSION, "language": language, "score": measure, "texts": rows})
    if storage.is_current(ANNOTATION_STATISTICS, stamp, source=source):
        say(f"statistics of {source}: up to date")
        return read_frame(storage, ANNOTATION_STATISTICS, source=source)
    words = tag_words(texts["text"].to_list(), nlp)
    scores = leave_one_out(texts, score)
    frames = []
    for by in LEVELS:
        counts = annotation_statistics(texts, nlp, by, words)
        agreement = mean_agreement(scores, by).select(*by, "agreement", "low", "high")
        joined = counts.join(agreement, on=by, how="left", maintain_order="left") if by else counts.hstack(agreement)
        absent = [pl.lit("").alias(name) for name in LEVELS[0] if name not in by]
        absent.append(pl.lit(source).alias("source"))
        frames.append(joined.with_columns(absent).select(column.name for column in ANNOTATION_STATISTICS.columns))
    table = table_of(ANNOTATION_STATISTICS, pl.concat(frames), {"language": language, "score": measure})
    storage.write(ANNOTATION_STATISTICS, table, stamp, source=source)
    return frame_of(table)


def of_layers(rows: pl.DataFrame) -> pl.DataFrame:
    """The rows of single layers (Table 5)."""
    return rows.filter(pl.col("layer") != "")


def of_models(rows: pl.DataFrame) -> pl.DataFrame:
    """The rows of whole models (Tables 1 and 4)."""
    return rows.filter(pl.col("model") != "", pl.col("layer") == "")


def total(rows: pl.DataFrame) -> pl.DataFrame:
    """The row of all models together."""
    return rows.filter(pl.col("model") == "")


def summary(rows: pl.DataFrame, language: str, measure: str) -> str:
    """Tables 1, 4 and 5 on one screen."""
    layers = of_layers(rows)
    lines = [f"{'model':24} {'layers':>6} {'units':>7} {'annotations':>11}  agreement ({measure})"]
    for row in pl.concat([of_models(rows), total(rows)]).iter_rows(named=True):
        count = len(layers.filter(pl.col("model") == row["model"])) if row["model"] else len(layers)
        agreed = "–" if row["agreement"] is None else f"{row['agreement']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
        name = row["model"] or "all"
        lines.append(f"{name:24} {count:>6} {row['units']:>7,} {row['texts']:>11,}  {agreed}")
    lines += ["", f"words are tagged by {language}"]
    lines.append(
        f"{'model':24} {'layer':14} {'units':>7} {'words':>7} {'length':>6} {'noun %':>7} {'adj %':>6} {'prep %':>7}"
    )
    for row in pl.concat([layers, total(rows)]).iter_rows(named=True):
        shares = ["–" if row[name] is None else f"{row[name]:.1f}" for name in ("noun", "adjective", "preposition")]
        lines.append(
            f"{row['model'] or 'all':24} {row['layer']:14} {row['units']:>7,} {row['words']:>7,} {row['length']:>6.2f} "
            f"{shares[0]:>7} {shares[1]:>6} {shares[2]:>7}"
        )
    return "\n".join(lines)
