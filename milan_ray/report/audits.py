"""Audit pages of the report: one page per audit, with links from its units to their exemplars."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from milan_ray.errors import DamagedTable
from milan_ray.progress import say
from milan_ray.report.layers import LayerSummary, Sources, layer_folder
from milan_ray.report.pages import Pages, Row, slug
from milan_ray.schema import AUDITED, AUDITS, FIGURE
from milan_ray.schema.audits import REJECT
from milan_ray.scoring.search import descriptions_hash
from milan_ray.storage import FILE_NAME, natural


def card_link(model: str, layer: str, unit: int) -> str:
    """Returns the link to a unit's exemplars, relative to the report's folder, whether or not the page exists."""
    return f"{layer_folder(model, layer)}index.html#unit-{unit}"


def audits(out: Path, pages: Pages, sources: Sources, layers: Sequence[LayerSummary]) -> list[Row]:
    """Writes a page for each audit whose networks are all in the report.

    Audits are left out if their descriptions have changed since, or if one of their tables is damaged.

    Returns:
        For each audit: its name, the page, and the numbers of units that it counts on both sides.
    """
    storage = sources.storage
    place = {(layer.model, layer.layer): number for number, layer in enumerate(layers)}
    models = {layer.model for layer in layers}
    shown_audits = []
    for keys in storage.partitions(AUDITS):
        name = keys["audit"]
        figure = storage.path(AUDITS, **keys).replace(FILE_NAME, f"{FIGURE}.svg")
        try:
            pairs = storage.read(AUDITS, **keys).to_pylist()
            meta = storage.metadata(AUDITS, **keys) or {}
            named = sorted({pair[side] for pair in pairs for side in ("model", "other")})
            if not models.issuperset(named):
                continue
            if meta["descriptions"] != descriptions_hash(storage, meta["labeler"], named):
                say(f"report: left out the audit {name}: descriptions have changed")
                continue
            if not pairs or not storage.exists(figure):
                say(f"report: left out the audit {name}: it has no {'figure' if pairs else 'rows'}; run it again")
                continue
            units = storage.read(AUDITED, **keys).to_pylist()
        except DamagedTable as error:
            sources.left_out.note(error)
            continue
        units.sort(
            key=lambda row: (
                row["verdict"] == REJECT,
                row["model"],
                place.get((row["model"], row["layer"]), len(place)),
                natural(row["layer"]),
                row["unit"],
            )
        )
        for row in units:
            shown = (row["model"], row["layer"]) in place
            row["card"] = card_link(row["model"], row["layer"], row["unit"]) if shown else None
        folder = f"audits/{slug(name)}/"
        (out / folder).mkdir(parents=True, exist_ok=True)
        (out / folder / "figure.svg").write_bytes(storage.get(figure))
        audit = {
            "name": name,
            "href": f"{folder}index.html",
            "words": meta["words"],
            "labeler": meta["labeler"],
            "images": pairs[0]["images"],
            "pairs": pairs,
            "units": units,
            "unblurred": sum(pair["units"] for pair in pairs),
            "blurred": sum(pair["other_units"] for pair in pairs),
        }
        pages.write("audit.html", out / audit["href"], root="../../", audit=audit)
        shown_audits.append(audit)
    return shown_audits
