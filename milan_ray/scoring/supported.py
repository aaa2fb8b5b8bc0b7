"""Verdicts as other jobs use them: only supported descriptions, or supported ones first (docs/verdicts.md)."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from milan_ray.errors import MilanError
from milan_ray.schema import DESCRIPTIONS, EXEMPLARS, VERDICTS
from milan_ray.schema.verdicts import SUPPORTED
from milan_ray.storage import CONFIG_KEY, EXEMPLARS_KEY, Storage

UNJUDGED = "not judged"
"""Stands for the verdict of a description that has none."""

RANKS = {SUPPORTED: 0, "partly": 1, UNJUDGED: 2, "unsupported": 3, "nothing to describe": 4}
"""Verdicts in the order in which a search shows them."""

_OWN = "own"  # system in table verdicts


def verdicts_config(storage: Storage, judge: str, labeler: str, model: str, layers: Sequence[str]) -> dict[str, str]:
    """Layer → configuration hash of the verdicts on its descriptions.

    Raises:
        MilanError: A layer has none by this judge.
    """
    hashes = {}
    for layer in layers:
        keys = {"predictor": judge, "labeler": labeler, "model": model, "layer": layer}
        if storage.metadata(VERDICTS, **keys) is None:
            judges = sorted({at["predictor"] for at in storage.partitions(VERDICTS, model=model, labeler=labeler)})
            others = f" (there are some by {', '.join(judges)})" if judges else ""
            raise MilanError(
                f"no verdicts by {judge} on what {labeler} says of {model} {layer}{others}: run "
                f"`python -m jobs.score --model {model} --clip {judge} …` first."
            )
        hashes[layer] = storage.config_of(VERDICTS, **keys)
    return hashes


def only_supported(storage: Storage, units: pl.DataFrame, judge: str, labeler: str, model: str) -> pl.DataFrame:
    """Keeps the units whose description a judge supports, in their order.

    Args:
        storage: The run directory.
        units: Columns layer, unit, description, and any others, of one model by one labeler.
        judge: The model of images and texts that gave the verdicts.
        labeler: The labeler.
        model: The model.

    Raises:
        MilanError: A layer has no verdicts, they are on earlier descriptions, or no description is supported.
    """
    layers = units["layer"].unique(maintain_order=True).to_list()
    verdicts_config(storage, judge, labeler, model, layers)
    given = pl.concat(
        verdicts_of(storage, {"predictor": judge, "labeler": labeler, "model": model, "layer": layer})
        for layer in layers
    )
    joined = units.join(given, on=["layer", "unit"], how="left", maintain_order="left")
    stale = joined.filter(pl.col("verdict").is_null() | pl.col("description").ne_missing(pl.col("judged")))
    if len(stale):
        raise MilanError(
            f"{len(stale)} units of {model} {stale['layer'][0]} are described otherwise, or by other images, than "
            f"when {judge} judged them: run `python -m jobs.score --model {model} --clip {judge} …` again."
        )
    kept = joined.filter(pl.col("verdict") == SUPPORTED).select(units.columns)
    if not len(kept):
        raise MilanError(f"{judge} supports no description of {model} by {labeler}: leave out --supported-by.")
    return kept


def verdicts_of(storage: Storage, keys: dict[str, str]) -> pl.DataFrame:
    """A layer's own verdicts: columns layer, unit, judged (the description) and verdict.

    ``judged`` is null where the exemplars were others than now: another network, other features, other images. Their
    descriptions may read the same.
    """
    table = storage.read(VERDICTS, ["layer", "unit", "system", "description", "verdict"], **keys)
    rows = pl.DataFrame(pl.from_arrow(table)).filter(pl.col("system") == _OWN)
    judged = pl.col("description") if _of_these_exemplars(storage, keys) else pl.lit(None, pl.String)
    return rows.select("layer", "unit", judged.alias("judged"), "verdict")


def _of_these_exemplars(storage: Storage, keys: dict[str, str]) -> bool:
    """Whether verdicts are on the exemplars that the present descriptions, or else the present exemplars, are of."""
    judged = (storage.metadata(VERDICTS, **keys) or {}).get(EXEMPLARS_KEY)
    of_layer = {"model": keys["model"], "layer": keys["layer"]}
    described = (storage.metadata(DESCRIPTIONS, labeler=keys["labeler"], **of_layer) or {}).get(EXEMPLARS_KEY)
    now = described or (storage.metadata(EXEMPLARS, **of_layer) or {}).get(CONFIG_KEY)
    return judged is None or now is None or judged == now


def verdicts_by(storage: Storage, judge: str) -> pl.DataFrame:
    """All verdicts of a judge on units' own descriptions: columns labeler, model, layer, unit, judged, verdict.

    Raises:
        MilanError: There are none.
    """
    partitions = storage.partitions(VERDICTS, predictor=judge)
    if not partitions:
        judges = sorted({keys["predictor"] for keys in storage.partitions(VERDICTS)})
        others = f"there are some by {', '.join(judges)}" if judges else "run jobs.score first"
        raise MilanError(f"{storage.root} holds no verdicts by {judge}: {others}.")
    return pl.concat(
        verdicts_of(storage, keys).with_columns(pl.lit(keys["labeler"]).alias("labeler"), model=pl.lit(keys["model"]))
        for keys in partitions
    )


def with_verdicts(units: pl.DataFrame, verdicts: pl.DataFrame) -> pl.DataFrame:
    """Adds ``verdict``, and its ``rank``, to units; a verdict on an earlier description is none.

    Args:
        units: Columns labeler, model, layer, unit, description, and any others.
        verdicts: From :func:`verdicts_by`.
    """
    joined = units.join(verdicts, on=["labeler", "model", "layer", "unit"], how="left", maintain_order="left")
    current = pl.when(pl.col("judged") == pl.col("description")).then("verdict").otherwise(pl.lit(UNJUDGED))
    rank = pl.col("verdict").replace_strict(RANKS, return_dtype=pl.Int32).alias("rank")
    return joined.with_columns(current.fill_null(UNJUDGED).alias("verdict")).with_columns(rank).drop("judged")
