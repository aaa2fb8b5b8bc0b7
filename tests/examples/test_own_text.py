"""The recipe for own text: exemplars, import, training, descriptions, and the table of held-out units."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = str(ROOT / "tests/plugins/tiny_models.py")
EXAMPLE = str(ROOT / "examples/own_text.py")
TRAIN = "layer,unit,summary\n0,0,red dogs\n0,1,people's dogs\n0,1,dogs\n2,3,houses\n2,6,red cats\n2,7,cats\n"
HELD = "layer,unit,summary\n0,2,red dogs\n2,1,cats\n2,4,houses\n"


def arguments(photos: Path, folder: Path, held: str = HELD) -> list[str]:
    (folder / "train.csv").write_text(TRAIN, encoding="utf-8")
    (folder / "held.csv").write_text(held, encoding="utf-8")
    files = ["--train", str(folder / "train.csv"), "--held", str(folder / "held.csv"), "--storage", str(folder / "run")]
    return [EXAMPLE, "--model", "tiny/cnn", "--plugin", PLUGIN, "--probe", str(photos), "--encoder", "tiny", *files]


@pytest.mark.slow
def test_own_text_is_learned_and_held_out_units_are_scored(ray_session, photos, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", [*arguments(photos, tmp_path), "--epochs", "2", "--beam-size", "6"])
    runpy.run_path(EXAMPLE, run_name="__main__")
    printed = capsys.readouterr().out
    for system in ("milan", "milan-pdE", "constant", "shuffled", "nearest-copy"):
        assert re.search(rf"rouge-l-f +{system} +[01]\.\d+ \[.*\] n = 3\n", printed), printed


def test_a_unit_may_not_train_and_judge(photos, tmp_path, monkeypatch) -> None:
    held = f"{HELD}0,1,dogs\n"
    monkeypatch.setattr(sys, "argv", [*arguments(photos, tmp_path, held)])
    with pytest.raises(SystemExit, match=r"1 units are in both files, the first \('0', 1\)"):
        runpy.run_path(EXAMPLE, run_name="__main__")
