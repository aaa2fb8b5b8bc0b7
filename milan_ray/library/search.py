"""Search the descriptions of a run directory, and compare two networks by them (docs/search.md)."""

from __future__ import annotations

import os
from collections.abc import Sequence

import polars as pl

from milan_ray.errors import MilanError
from milan_ray.labelers.milan import MILAN
from milan_ray.models.sentences import load_text_model
from milan_ray.scoring.comparable import same_features
from milan_ray.scoring.differences import Difference, diff_descriptions
from milan_ray.scoring.search import scan_descriptions, search_descriptions
from milan_ray.scoring.supported import verdicts_by as read_verdicts
from milan_ray.storage import Storage

Descriptions = str | os.PathLike[str] | Storage | pl.LazyFrame | pl.DataFrame
"""Where descriptions are: a run directory, or a frame, which may be lazy."""


def search(
    source: Descriptions,
    query: str,
    *,
    models: Sequence[str] | None = None,
    layers: Sequence[str] | None = None,
    labelers: Sequence[str] | None = None,
    text_model: str | os.PathLike[str] | None = None,
    any_word: bool = False,
    top: int | None = None,
    verdicts_by: str | None = None,
) -> pl.DataFrame:
    """Finds the units whose descriptions match a query, the best first (docs/search.md).

    Args:
        source: See :data:`Descriptions`.
        query: Words, all of which must occur in any inflection; ``red|blue`` is either, ``"left of"`` a phrase.
        models: Names or patterns (``resnet*``); None for all. Of a run directory only, as the next two.
        layers: The same, of layers.
        labelers: The same, of labelers.
        text_model: Rank by meaning instead: folder of CLIP or SigLIP, or of a BERT-like language model.
        any_word: One of the words suffices.
        top: Rows at most; None for all.
        verdicts_by: Judge whose verdicts rank before relevance, supported descriptions first; of a run directory only.

    Returns:
        Columns relevance, mentions, labeler, model, layer, unit, description, score; of a frame, its own columns. With
        ``verdicts_by`` also verdict.

    Raises:
        MilanError: There are no such descriptions, there is no word in the query, or no such model.
    """
    meaning = None if text_model is None else load_text_model(os.fspath(text_model))
    frame = _descriptions(source, models, layers, labelers, leave_out=True)
    verdicts = None
    if verdicts_by is not None:
        if isinstance(source, (pl.LazyFrame, pl.DataFrame)):
            raise MilanError("verdicts are tables of a run directory: give one instead of a frame, or no verdicts_by.")
        verdicts = read_verdicts(source if isinstance(source, Storage) else Storage(source), verdicts_by)
    return search_descriptions(frame, query, model=meaning, any_word=any_word, top=top, verdicts=verdicts)


def diff(
    source: Descriptions,
    model: str,
    other: str,
    *,
    labeler: str = MILAN,
    words: Sequence[str] = (),
    by_layer: bool = False,
) -> Difference:
    """Compares what two networks' units say: words gained and lost, and units that changed (docs/search.md).

    Args:
        source: See :data:`Descriptions`.
        model: The network to start from.
        other: The one to compare with it.
        labeler: Whose descriptions; of a run directory only.
        words: Count these only, as in a query; empty for every word there is.
        by_layer: Compare the layers that both have one by one, too.

    Raises:
        MilanError: One has no descriptions.
    """
    frame = _descriptions(source, [model, other], None, [labeler])
    same: Sequence[str] = ()
    if not isinstance(source, (pl.LazyFrame, pl.DataFrame)):  # which do not say by what dictionary features were made
        same = same_features(_opened(source), model, other)
    return diff_descriptions(frame, model, other, words=words, by_layer=by_layer, same=same)


def _descriptions(
    source: Descriptions,
    models: Sequence[str] | None,
    layers: Sequence[str] | None,
    labelers: Sequence[str] | None,
    leave_out: bool = False,
) -> pl.LazyFrame:
    if isinstance(source, (pl.LazyFrame, pl.DataFrame)):
        return source.lazy()
    return scan_descriptions(_opened(source), models, layers, labelers, leave_out=leave_out)


def _opened(source: str | os.PathLike[str] | Storage) -> Storage:
    return source if isinstance(source, Storage) else Storage(source)
