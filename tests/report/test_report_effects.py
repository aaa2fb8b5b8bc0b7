"""Effects on classes in the report: beside the description, sortable, and only of the network that is shown."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa

from milan_ray.report import write_report
from milan_ray.schema import EFFECTS, EXEMPLARS
from milan_ray.storage import INPUTS_KEY, Storage

MODEL, LAYER = "toy/<b>\"x\"&'y'", "Conv1"
ONE = {"class": 3, "name": "<b>tench</b>", "probability": 0.125, "logit": 1.5, "predicted": 0.5}
OTHER = {"class": 4, "name": None, "probability": -0.25, "logit": -2.0, "predicted": -0.5}


def write_effects(storage: Storage, **facts: str) -> None:
    rows = [
        {
            "model": MODEL, "layer": LAYER, "unit": unit, "change": change, "images": 20, "active": 7, "strength": 0.5,
            "moved": moved * (1 + unit), "flipped": 0.1, "gained": [] if change == "random" else [ONE],
            "lost": [] if change == "random" else [OTHER], "peer": 1 - unit, "peer_moved": 0.03,
        }
        for unit in (0, 1)
        for change, moved in (("ablated", 0.01), ("amplified", 0.02), ("random", 0.005))
    ]  # fmt: skip
    columns = {column.name: [row[column.name] for row in rows] for column in EFFECTS.columns}
    storage.write(EFFECTS, EFFECTS.table(columns, {"factor": "2", **facts}), "e1", model=MODEL, layer=LAYER)


def layer_of(folder: Path) -> Path:
    return next(path.parent for path in folder.glob("layers/*/*/units.js") if '"Conv1"' in path.read_text())


def card(folder: Path, unit: int) -> dict[str, object]:
    text = (layer_of(folder) / "cards/0.js").read_text(encoding="ascii")
    cards = json.loads(f"[{text[text.index('(') + 1 : text.rindex(')')]}]")[2]
    return next(one for one in cards if one["unit"] == unit)


def test_cards_have_the_effects_of_their_unit_and_units_sort_by_them(sheet_storage, tmp_path):
    write_effects(sheet_storage)
    write_report(sheet_storage, tmp_path / "report")
    effect = card(tmp_path / "report", 1)["effect"]
    assert isinstance(effect, dict)
    assert (effect["images"], effect["active"], effect["factor"], effect["random"]) == (20, 7, "2", 0.01)
    ablated, amplified = effect["changes"]
    assert (ablated["change"], ablated["moved"], ablated["peer"], ablated["peer_moved"]) == ("ablated", 0.02, 0, 0.03)
    assert amplified["gained"] == [["<b>tench</b>", 0.125, 1.5]] and amplified["lost"] == [["class 4", -0.25, -2.0]]
    assert card(tmp_path / "report", 2)["effect"] is None
    assert "probability moved when ablated" in (layer_of(tmp_path / "report") / "units.js").read_text()


def test_effects_of_other_weights_are_left_out(sheet_storage, tmp_path, capsys):
    exemplars = sheet_storage.read(EXEMPLARS, model=MODEL, layer=LAYER)
    metadata = sheet_storage.metadata(EXEMPLARS, model=MODEL, layer=LAYER) or {}
    for weights, shown in (("w1", True), ("w2", False)):
        inputs = json.dumps({"weights": "w1", "k": "9"})
        told = pa.Table.from_arrays(
            exemplars.columns, schema=exemplars.schema.with_metadata({**metadata, INPUTS_KEY: inputs})
        )
        sheet_storage.write(EXEMPLARS, told, "a1b2", model=MODEL, layer=LAYER)
        write_effects(sheet_storage, **{INPUTS_KEY: json.dumps({"weights": weights, "effects": "1"})})
        write_report(sheet_storage, tmp_path / weights)
        assert (card(tmp_path / weights, 0)["effect"] is not None) == shown
    assert "they are of other weights than the exemplars" in capsys.readouterr().err
