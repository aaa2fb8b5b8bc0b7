"""Effects of a layer's units on the classes, as its cards show them."""

from __future__ import annotations

from collections.abc import Mapping

from milan_ray.progress import say
from milan_ray.report.pages import Row, short
from milan_ray.schema import EFFECTS
from milan_ray.storage import Storage, inputs_of

SAME = ("weights", "structure", "layer", "features", "inputs")
"""Inputs that effects share with the exemplars of the same layer of the same network."""

_RANDOM = "random"


def read_effects(storage: Storage, model: str, layer: str, exemplars: Mapping[str, str]) -> dict[int, Row]:
    """Reads a layer's effects.

    Args:
        storage: The run directory.
        model: The model's name.
        layer: The layer's name.
        exemplars: Metadata of the layer's exemplars; effects of another network of that name are left out.

    Returns:
        Unit → ``images``, ``active``, ``random`` (probability moved by the baseline), and ``changes``, first of them
        the ablation.

    Raises:
        DamagedTable: The table is damaged.
    """
    keys = {"model": model, "layer": layer}
    metadata = storage.metadata(EFFECTS, **keys)
    if metadata is None:
        return {}
    own, other = inputs_of(metadata), inputs_of(exemplars)
    if other and any(own.get(name) != other.get(name) for name in SAME):
        say(f"report: left out effects of {model} {layer}: they are of other weights than the exemplars")
        return {}
    found: dict[int, Row] = {}
    for row in storage.read(EFFECTS, **keys).to_pylist():
        figures = {"images": row["images"], "active": row["active"], "changes": []}
        card = found.setdefault(row["unit"], {**figures, "factor": metadata["factor"]})
        if row["change"] == _RANDOM:
            card["random"] = short(row["moved"])
            continue
        card["changes"].append(
            {
                "change": row["change"],
                "moved": short(row["moved"]),
                "flipped": short(row["flipped"]),
                "peer": row["peer"],
                "peer_moved": short(row["peer_moved"]),
                **{
                    side: [
                        [one["name"] or f"class {one['class']}", *(short(one[key]) for key in ("probability", "logit"))]
                        for one in row[side]
                    ]
                    for side in ("gained", "lost")
                },
            }
        )
    return found
