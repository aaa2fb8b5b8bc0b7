"""Which units of several networks may be counted against each other, and which are the same."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from milan_ray.errors import MilanError
from milan_ray.names import SIGN
from milan_ray.progress import say
from milan_ray.schema import EXEMPLARS
from milan_ray.storage import Storage, inputs_of


def comparable(units: pl.DataFrame, models: Sequence[str], what: str) -> pl.DataFrame:
    """Units of all layers, and features of those sets that every network has: others would be counted on one side.

    Args:
        units: Columns model and layer.
        models: The networks.
        what: What counts them, for the line that says what is left out.

    Raises:
        MilanError: Nothing of a network is left.
    """
    having = {layer: set(some["model"]) for (layer,), some in units.group_by("layer") if SIGN in str(layer)}
    lacking = sorted(str(layer) for layer, owners in having.items() if owners != set(models))
    if lacking:
        say(f"{what}: left out {', '.join(lacking)}, features that not every network has")
    left = units.filter(~pl.col("layer").is_in(lacking))
    for model in models:
        if model not in left["model"] and model in units["model"]:
            raise MilanError(f"{what}: only features of {model} are described that others lack: describe its units.")
    return left


def same_features(storage: Storage, model: str, other: str) -> list[str]:
    """Layers of features whose feature 5 is the other network's feature 5: both were encoded by one dictionary.

    Two dictionaries of one name and width have nothing in common, unit by unit; their exemplars say by which they were
    made.
    """
    made: list[dict[str, str]] = []
    for name in (model, other):
        layers = [keys["layer"] for keys in storage.partitions(EXEMPLARS, model=name) if SIGN in keys["layer"]]
        digests = {layer: inputs_of(storage.metadata(EXEMPLARS, model=name, layer=layer) or {}) for layer in layers}
        made.append({layer: inputs.get("features", "") for layer, inputs in digests.items()})
    return [layer for layer, digest in made[0].items() if digest and made[1].get(layer) == digest]
