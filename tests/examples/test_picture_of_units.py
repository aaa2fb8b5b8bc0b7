"""The picture of units: tiles of photographs in installed packages, units by a rule, exemplars and descriptions."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import polars as pl
import pytest
from PIL import Image
from toys import toy_captioner

from milan_ray.stages.captioners import save_captioner
from milan_ray.storage import Storage

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = str(ROOT / "tests/plugins/tiny_models.py")
EXAMPLE = str(ROOT / "examples/picture_of_units.py")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> dict:
    """The example's functions, with the one photograph that the tests' own packages bring."""
    names = runpy.run_path(EXAMPLE)
    only = {"matplotlib": names["PHOTOGRAPHS"]["matplotlib"]}
    monkeypatch.setitem(names["main"].__globals__, "PHOTOGRAPHS", only)
    return names


def test_units_are_the_highest_score_of_each_layer_and_one_at_random(example) -> None:
    scores = {("a", 4): 1.0, ("a", 7): 3.0, ("a", 9): 2.0, ("b", 1): 0.5}
    described = pl.DataFrame(
        [(*unit, score) for unit, score in scores.items()], ["layer", "unit", "score"], orient="row"
    )
    drawn = {tuple(example["choose_units"](described, seed)) for seed in range(20)}
    assert drawn == {(("a", 7), ("a", other), ("b", 1)) for other in (4, 9)}


def test_picture_shows_described_units_of_the_file(ray_session, example, tmp_path, monkeypatch, capsys) -> None:
    save_captioner(Storage(tmp_path / "run"), "toy", toy_captioner(length=4, beam_size=5, lam=0.5), "A toy.")
    (tmp_path / "units.csv").write_text(
        "layer,unit,summary\n0,1,a\n0,2,b\n0,2,c\n2,3,d\n2,6,e\n2,5,f\n", encoding="utf-8"
    )
    options = {"model": "tiny/cnn", "plugin": PLUGIN, "decoder": "toy", "beam-size": "5", "storage": tmp_path / "run"}
    options |= {"units": tmp_path / "units.csv", "out": tmp_path / "units.png"}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", [EXAMPLE, *words])
    example["main"]()
    printed = capsys.readouterr().out
    assert "tiles in" in printed and "4 units" in printed
    tiles = sorted((tmp_path / "run/tiles").iterdir())
    assert len(tiles) > 20 and all(len(set(Image.open(tile).size)) == 1 for tile in tiles)
    with Image.open(tmp_path / "units.png") as picture:
        assert picture.width == 2 * 88 * 5 + 12 and picture.height == 24 + 2 * (88 + 24) + 12
        assert len(picture.getcolors(maxcolors=picture.width * picture.height) or []) > 100


def test_a_package_that_is_absent_is_named(example, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(example["main"].__globals__, "PHOTOGRAPHS", {"not_there_at_all": ["a.png"]})
    with pytest.raises(SystemExit, match=r"not_there_at_all is not installed: pip install"):
        example["write_tiles"](tmp_path)
