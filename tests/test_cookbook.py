"""Every block of docs/cookbook.md, run in order over a small run directory, and what it finds there."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from milan_ray.schema import ANNOTATIONS, DESCRIPTIONS, EXEMPLARS, LEVELS, MANIFEST, POOLED, VIEWS, Table
from milan_ray.storage import Storage

PAGE = Path(__file__).resolve().parents[1] / "docs/cookbook.md"
SIDE = 8

TEXTS = {  # model → layer → description of each unit
    "net/plain": {"conv1": ("Red lines", "Blue dots", "Dog faces", "Dogs"), "0": ("Words on signs", "Faces")},
    "net/blurred": {"conv1": ("Red lines", "Blue dots", "Dog legs", "Dogs"), "0": ("Words on signs", "Hotdogs")},
}


def write(
    storage: Storage,
    table: Table,
    rows: Sequence[tuple[object, ...]],
    metadata: dict[str, str] | None = None,
    **keys: str,
) -> None:
    columns = _columns(table, rows)
    keys = keys or {key: str(columns[key][0]) for key in table.partition}
    storage.write(table, table.table(columns, metadata), "by hand", **keys)


def _columns(table: Table, rows: Sequence[tuple[object, ...]]) -> dict[str, list[object]]:
    return dict(zip((column.name for column in table.columns), map(list, zip(*rows, strict=True)), strict=True))


def n_best(unit: int, text: str) -> list[dict[str, object]]:
    """The description, and a second that is the further behind the higher the unit; unit 3 has none."""
    found = [("second", 9.5 - 2 * unit)] if unit != 3 else []
    best = [(text, 10.0 - unit), *found]
    return [{"text": text, "score": score, "logp_d_given_e": -2.0, "logp_d": -9.0} for text, score in best]


def write_layer(storage: Storage, model: str, layer: str, texts: tuple[str, ...]) -> None:
    for labeler in ("milan", "milan-pdE"):
        said = [text if labeler == "milan" or unit != 1 else "Things" for unit, text in enumerate(texts)]
        rows = [
            (labeler, model, layer, unit, text, 10.0 - unit, -2.0, -9.0, 0.2, n_best(unit, text))
            for unit, text in enumerate(said)
        ]
        write(storage, DESCRIPTIONS, rows)
    mask = np.packbits(np.eye(SIDE, dtype=bool)).tobytes()
    exemplars = [
        (model, layer, unit, rank, (unit + rank) % 4, 5.0 - rank, mask)
        for unit in range(len(texts))
        for rank in range(2)
    ]
    metadata = {"mask_height": str(SIDE), "mask_width": str(SIDE), "probe": "p", "view": "v"}
    write(storage, EXEMPLARS, exemplars, metadata)
    levels = [(model, layer, unit, 5.0 if unit == 1 else 4.0, 100, int(unit == 2), True) for unit in range(len(texts))]
    write(storage, LEVELS, levels)
    pooled = [
        (model, layer, image, [float(image == unit) + image for unit in range(len(texts))], [0.0] * len(texts))
        for image in range(4)
    ]
    pieces = (POOLED.table(_columns(POOLED, [row])) for row in pooled)
    storage.write_stream(POOLED, pieces, "by hand", {"probe": "p"}, model=model, layer=layer)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The names that the page's blocks leave behind."""
    folder = tmp_path_factory.mktemp("cookbook")
    storage = Storage(folder / "results/demo")
    for model, layers in TEXTS.items():
        for layer, texts in layers.items():
            write_layer(storage, model, layer, texts)
    notes = [("people", "net/plain", "conv1", 2, who, text) for who, text in (("A", "a dog"), ("B", "a face"))]
    write(storage, ANNOTATIONS, notes)
    images = [(i, "/photos", f"{c}/{i}.jpg", None, None, None, c, None) for i, c in enumerate("aabb")]
    write(storage, MANIFEST, images, probe="p")
    png = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), "red").save(png, "PNG")
    write(storage, VIEWS, [("p", "v", "000000", i, png.getvalue()) for i in range(4)])

    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for number, block in enumerate(re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)):
            exec(compile(block, f"{PAGE.name}, block {number + 1}", "exec"), names)
    return names


def test_cookbook_specific_units_are_the_highest_of_every_layer(found: dict[str, Any]) -> None:
    conv1 = found["specific"].filter(model="net/plain", layer="conv1")
    assert conv1["unit"].to_list() == [0, 1, 2] and len(found["specific"]) == 10


def test_cookbook_words_are_whole_words_of_any_case(found: dict[str, Any]) -> None:
    assert sorted(found["dogs"]["description"]) == ["Dog faces", "Dog legs", "Dogs", "Dogs"]
    assert found["per_layer"].sort("model", "layer")["share"].to_list() == [0, 0.5, 0, 0.5]


def test_cookbook_profiles_count_kinds_of_words(found: dict[str, Any]) -> None:
    row = found["profiles"].row(
        by_predicate=(found["pl"].col("model") == "net/plain") & (found["pl"].col("layer") == "conv1"), named=True
    )
    assert row == {
        "model": "net/plain", "layer": "conv1", "units": 4, "distinct": 1.0, "length": 1.75,
        "colour": 0.5, "texture": 0.5, "animal": 0.5,
    }  # fmt: skip
    statistics = found["statistics"].filter(model="net/plain", layer="conv1").to_dicts()[0]
    assert (statistics["units"], statistics["words"], statistics["length"]) == (4, 7, 1.75)


def test_cookbook_pairs_show_what_changed_and_what_is_gone(found: dict[str, Any]) -> None:
    assert found["changed"].rows() == [("0", 1, "Faces", "Hotdogs"), ("conv1", 2, "Dog faces", "Dog legs")]
    gone = found["concepts"].filter(found["pl"].col("gone") != 0)
    assert gone.select("description", "gone").rows() == [
        ("dog faces", 1),
        ("faces", 1),
        ("dog legs", -1),
        ("hotdogs", -1),
    ]


def test_cookbook_margins_are_smallest_first(found: dict[str, Any]) -> None:
    margins = found["margins"]
    assert margins["margin"].to_list() == [0.5] * 4 + [1.5] * 4 + [2.5] * 2 + [None] * 2
    assert margins["second"].to_list() == ["second"] * 10 + [None] * 2
    assert len(found["every_candidate"]) == 12 * 2 - 2


def test_cookbook_labelers_and_people_stand_side_by_side(found: dict[str, Any]) -> None:
    assert found["both"]["milan-pdE"].to_list() == ["Things"] * 4 and set(found["both"]["unit"]) == {1}
    assert found["beside"].rows() == [("net/plain", "conv1", 2, "a dog / a face", "Dog faces")]


def test_cookbook_pooled_activations_cover_every_image(found: dict[str, Any]) -> None:
    assert found["per_class"].rows() == [("b", 3.0, 2), ("a", 0.5, 2)]
    maxima = np.arange(4)[:, None] + np.eye(4)
    np.testing.assert_allclose(found["correlation"], np.corrcoef(maxima.T))


def test_cookbook_images_classes_and_distrust(found: dict[str, Any]) -> None:
    assert found["one_unit"]["path"].to_list() == ["b/2.jpg", "b/3.jpg"]
    purity = found["purity"].filter(model="net/plain", layer="conv1").sort("unit")
    assert purity.select("class", "purity").rows() == [("a", 1.0), ("a", 0.5), ("b", 1.0), ("a", 0.5)]
    assert found["popular"].rows()[0] == ("a/1.jpg", 8)
    flat = found["flat"].filter(model="net/plain")
    assert flat.select("layer", "unit").rows() == [("0", 1), ("conv1", 1), ("conv1", 2)]


def test_cookbook_picture_shows_the_exemplars(found: dict[str, Any]) -> None:
    assert found["unit"].description == "Dog faces"
    assert found["unit"].annotations == ("a dog", "a face")
    assert found["picture"].size == (2 * (SIDE + 2) + 2, SIDE + 4)
