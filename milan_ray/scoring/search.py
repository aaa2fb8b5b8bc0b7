"""Searches descriptions by words and their inflections, or by meaning.

Queries run on the distinct descriptions, which are far fewer than units. A lazy frame over Parquet is read once for
the descriptions and once for the units that have them.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from milan_ray.config import config_hash
from milan_ray.damaged import LeftOut
from milan_ray.errors import DamagedTable, MilanError, unknown_name
from milan_ray.progress import Progress, say
from milan_ray.schema import DESCRIPTIONS, EXEMPLARS
from milan_ray.scoring.supported import with_verdicts
from milan_ray.scoring.words import parse, pattern, spoken, vocabulary_of, words_of
from milan_ray.storage import CONFIG_KEY, EXEMPLARS_KEY, Storage

if TYPE_CHECKING:
    from milan_ray.models.sentences import EmbedsTexts  # imports torch, which a search by words does not need

COLUMNS = ("labeler", "model", "layer", "unit", "description", "score")
"""Columns of descriptions that are read."""

SATURATION, LENGTH = 1.2, 0.75
"""BM25's k1 and b, with Lucene's defaults."""

TEXTS = 4096
"""Number of descriptions embedded between two progress messages."""

_THREADS = 16  # reading files is I/O-bound


def scan_descriptions(
    storage: Storage,
    models: Sequence[str] | None = None,
    layers: Sequence[str] | None = None,
    labelers: Sequence[str] | None = None,
    *,
    leave_out: bool = False,
) -> pl.LazyFrame:
    """Scans the descriptions of a run directory, except those that refer to exemplars that were replaced since.

    Layers are in the order of their models. Columns :data:`COLUMNS` of all files are read once; local files are read
    again when a query needs them.

    Args:
        storage: The run directory.
        models: Names or patterns (``resnet*``); None for all.
        layers: Names or patterns of layers.
        labelers: Names or patterns of labelers.
        leave_out: Leave out damaged tables with a warning, as a search does; units of the other tables are still found.

    Returns:
        :data:`COLUMNS`.

    Raises:
        DamagedTable: A table is damaged and ``leave_out`` is False, or all tables are damaged.
        MilanError: There are no descriptions, or none of a given name.
    """
    partitions = every = storage.in_model_order(storage.partitions(DESCRIPTIONS))
    if not every:
        raise MilanError(f"{storage.uri(DESCRIPTIONS.name)} holds no descriptions; run jobs.describe or jobs.label.")
    for key, wanted in (("labeler", labelers), ("model", models), ("layer", layers)):
        names = {keys[key] for keys in every}
        for name in wanted or ():
            if not any(fnmatchcase(known, name) for known in names):
                raise unknown_name(f"{key} with descriptions", name, names)
        if wanted:
            partitions = [keys for keys in partitions if any(fnmatchcase(keys[key], name) for name in wanted)]
    if not partitions:
        raise MilanError("no layer has descriptions of all that is asked for together; leave one filter out.")
    left_out = LeftOut("search")
    with ThreadPoolExecutor(_THREADS) as threads:
        states = list(threads.map(lambda keys: _state(storage, keys), partitions))
        damaged = [each for each in states if isinstance(each, DamagedTable)]
        if damaged and (len(damaged) == len(states) or not leave_out):
            raise damaged[0]
        for error in damaged:
            left_out.note(error)
        if stale := states.count(False):
            say(f"left out {stale} tables of descriptions that speak of earlier exemplars")
        partitions = [keys for keys, state in zip(partitions, states, strict=True) if state is True]
        if not partitions:
            raise MilanError(f"all descriptions in {storage.root} speak of earlier exemplars; describe again.")
        if storage.is_local:
            paths = [storage.uri(storage.path(DESCRIPTIONS, **keys)) for keys in partitions]
            return pl.scan_parquet(paths, hive_partitioning=False, glob=False).select(COLUMNS)
        tables = threads.map(lambda keys: storage.read(DESCRIPTIONS, list(COLUMNS), **keys), partitions)
        return pl.concat([pl.DataFrame(pl.from_arrow(table)) for table in tables]).lazy()


def _state(storage: Storage, keys: dict[str, str]) -> bool | DamagedTable:
    """Checks that descriptions do not refer to replaced exemplars; returns the error if descriptions cannot be read.

    Reads all their pages, because a query that meets damage cannot tell which table is damaged.
    """
    try:
        described = (storage.metadata(DESCRIPTIONS, **keys) or {}).get(EXEMPLARS_KEY)
        if storage.is_local:
            storage.read(DESCRIPTIONS, list(COLUMNS), **keys)
    except DamagedTable as error:
        return error
    try:
        exemplars = storage.metadata(EXEMPLARS, model=keys["model"], layer=keys["layer"])
    except DamagedTable:  # the exemplars cannot be checked, but the descriptions are readable
        return True
    return not described or exemplars is None or exemplars.get(CONFIG_KEY) == described


def search_descriptions(
    descriptions: pl.LazyFrame | pl.DataFrame,
    query: str,
    *,
    model: EmbedsTexts | None = None,
    any_word: bool = False,
    top: int | None = None,
    verdicts: pl.DataFrame | None = None,
) -> pl.DataFrame:
    """Finds the units whose descriptions match a query, the best first.

    A search by words requires each word, in any inflection and case, as a whole word; ``red|blue`` matches either word,
    and ``"left of"`` matches a phrase. Results are ranked by BM25 over all given descriptions, then by the labeler's
    score, then by the order of layers in the descriptions. A search by meaning (with ``model``) ranks results by the
    cosine between description and query.

    Args:
        descriptions: A column ``description`` and any others; a lazy frame is not read as a whole.
        query: The query.
        model: Embeds texts; None searches by words.
        any_word: Accept descriptions with any of the words, instead of all.
        top: Maximum number of rows; None for all, which is every unit in a search by meaning.
        verdicts: Rank by these before relevance (:func:`~milan_ray.scoring.supported.verdicts_by`), supported
            descriptions first; None ranks by relevance. The descriptions then need columns labeler, model, layer, unit.

    Returns:
        ``relevance`` (BM25 or cosine), ``mentions`` (whether the words occur), then the given columns; with
        ``verdicts`` also ``verdict``.

    Raises:
        MilanError: The query has no words.
    """
    lazy = descriptions.lazy()
    terms = parse(query)
    distinct = lazy.filter(pl.col("description").is_not_null()).group_by("description").agg(pl.len().alias("units"))
    texts = distinct.collect(engine="streaming").sort("description")
    vocabulary = vocabulary_of(texts["description"])
    counts = [
        spoken("description").str.count_matches(pattern(term, vocabulary)).alias(f"{place}")
        for place, term in enumerate(terms)
    ]
    matches = texts.with_columns(*counts, spoken("description").str.count_matches(r"\w+").alias("length"))
    has = [pl.col(f"{place}") > 0 for place in range(len(terms))]
    mentions = pl.any_horizontal(has) if any_word else pl.all_horizontal(has)
    if model is None:
        relevance = _bm25(matches, len(terms))
    else:
        relevance = pl.lit(_cosines(model, matches["description"].to_list(), query))
    matches = matches.with_columns(relevance.alias("relevance"), mentions.alias("mentions"))
    if model is None:
        matches = matches.filter("mentions")
    matches = matches.sort("relevance", "description", descending=[True, False])
    if top is not None and verdicts is None:
        before = pl.col("units").cum_sum().shift(1, fill_value=0)
        matches = matches.filter(before < top)  # keeps only texts that can be among the first rows
    names = lazy.collect_schema().names()
    chosen = matches.select("description", "relevance", "mentions").lazy()
    rows = lazy.join(chosen, on="description", how="inner").collect(engine="streaming")
    order = ["relevance", *(name for name in ("score", "labeler", "model", "layer", "unit") if name in names)]
    if "layer" in names:
        keys = [name for name in ("model", "layer") if name in names]
        layers = lazy.select(keys).unique(maintain_order=True).collect(engine="streaming").with_row_index("place")
        rows = rows.join(layers, on=keys, how="left")
        order[order.index("layer")] = "place"
    if verdicts is not None:
        rows = with_verdicts(rows, verdicts)
        order, names = ["rank", *order], [*names, "verdict"]
    rows = rows.sort(order, descending=[name in ("relevance", "score") for name in order], nulls_last=True)
    return rows.select("relevance", "mentions", *names).head(len(rows) if top is None else top)


def _bm25(texts: pl.DataFrame, terms: int) -> pl.Expr:
    """BM25 of every text: the sum over terms of idf · tf (k1 + 1) / (tf + k1 (1 − b + b · length / mean length))."""
    units = int(texts["units"].sum())
    mean = max(1.0, float(np.average(texts["length"], weights=texts["units"]))) if units else 1.0
    longer = SATURATION * (1 - LENGTH + LENGTH * pl.col("length") / mean)
    total = pl.lit(0.0)
    for place in range(terms):
        times = pl.col(f"{place}").cast(pl.Float64)
        having = int(texts.filter(pl.col(f"{place}") > 0)["units"].sum())
        idf = float(np.log1p((units - having + 0.5) / (having + 0.5)))
        total = total + idf * times * (SATURATION + 1) / (times + longer)
    return total


def _cosines(model: EmbedsTexts, texts: Sequence[str], query: str) -> pl.Series:
    wanted = model.embed_texts([" ".join(words_of(query))])[0]
    cosines = np.zeros(len(texts))
    with Progress("texts", len(texts), "descriptions") as progress:
        for start in range(0, len(texts), TEXTS):
            part = texts[start : start + TEXTS]
            cosines[start : start + len(part)] = (model.embed_texts(part) @ wanted).cpu().numpy()
            progress.advance(len(part))
    return pl.Series(cosines)


def descriptions_hash(storage: Storage, labeler: str, models: Sequence[str]) -> str:
    """Hashes the inputs of an audit: the current descriptions of its networks."""
    configs = [
        (keys["model"], keys["layer"], storage.config_of(DESCRIPTIONS, **keys))
        for keys in storage.partitions(DESCRIPTIONS, labeler=labeler)
        if keys["model"] in models
    ]
    return config_hash({"descriptions": configs})
