"""Network Dissection by a plug-in's segmentation network, and by label maps that it made once: the same labels."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from milan_ray import cli
from milan_ray.schema import DESCRIPTIONS
from milan_ray.storage import Storage

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = str(ROOT / "examples/label_maps.py")
PLUGIN = str(ROOT / "tests/plugins/flags.py")
NETWORK = ["--segmentation", "flags/bright", "--plugin", PLUGIN]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of coloured fields, in two folders, and a file that is no image."""
    flags = runpy.run_path(PLUGIN, run_name="flags_of_a_test")
    for number in range(60):
        file = tmp_path / "flags" / ("even" if number % 2 == 0 else "odd") / f"{number:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(flags["Flags"]().draw(number)[0]).save(file)
    (tmp_path / "flags/odd/broken.png").write_bytes(b"no image")
    return tmp_path / "flags"


def write_maps(monkeypatch: pytest.MonkeyPatch, images: Path, out: Path, *network: str) -> None:
    monkeypatch.setattr(sys, "argv", [EXAMPLE, *(network or NETWORK), "--images", str(images), "--out", str(out)])
    runpy.run_path(EXAMPLE, run_name="__main__")


def labels(storage: Path, *probe: str) -> list[dict[str, Any]]:
    command = ["label", "--labeler", "netdissect", "--model", "flags/watcher", "--layers", "seen", "--plugin", PLUGIN]
    options = ["--k", "3", "--quantile", "0.95", "--no-report", "--max-bad", "0.1", "--storage", str(storage)]
    assert cli.main([*command, *options, "--probe", *probe]) == 0
    keys = {"labeler": "netdissect", "model": "flags/watcher", "layer": "seen"}
    rows: list[dict[str, Any]] = Storage(storage).read(DESCRIPTIONS, **keys).to_pylist()
    return rows


def test_maps_made_once_label_as_the_network_itself_does(ray_session, folder, tmp_path, monkeypatch, capsys) -> None:
    write_maps(monkeypatch, folder, tmp_path / "labelled")
    printed = capsys.readouterr().out
    assert "odd/broken.png is left out" in printed
    assert f"{tmp_path / 'labelled'}: 3 concepts: blue, green, red" in printed
    asked = labels(tmp_path / "asked", str(folder), "--segmentation", "flags/bright")
    once = labels(tmp_path / "once", str(tmp_path / "labelled"))
    assert [row["description"] for row in asked[:3]] == ["red", "green", "blue"]
    assert all(row["score"] > 0.3 for row in asked[:3])
    assert [(row["unit"], row["n_best"]) for row in once] == [(row["unit"], row["n_best"]) for row in asked]


def test_what_a_label_map_cannot_hold_is_refused(folder, tmp_path, monkeypatch) -> None:
    label_map = runpy.run_path(EXAMPLE)["label_map"]
    everywhere = np.ones((2, 2), bool)
    with pytest.raises(ValueError, match="sky overlaps another concept"):
        label_map({"day": everywhere, "sky": everywhere}, {}, (2, 2))
    numbers = {"car": 1}
    assert label_map({"sky": everywhere}, numbers, (2, 2)).tolist() == [[2, 2], [2, 2]] and numbers["sky"] == 2
    assert label_map({}, numbers, (1, 2)).tolist() == [[0, 0]]
    Image.new("RGB", (16, 16)).save(folder / "odd/001.jpg")
    with pytest.raises(SystemExit, match="two images are called 001"):
        write_maps(monkeypatch, folder, tmp_path / "labelled")
    with pytest.raises(SystemExit, match="is there already"):
        write_maps(monkeypatch, folder, tmp_path / "labelled")
