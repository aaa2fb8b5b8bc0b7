"""Figures of verdicts, of evidence whose quality is known."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from milan_ray.schema import VERDICTS
from milan_ray.storage import Storage

EXAMPLE = str(Path(__file__).resolve().parents[2] / "examples/verdicts.py")


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    found = runpy.run_path(EXAMPLE)
    found["main"].__globals__["SHUFFLES"] = 60
    return found


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+\.\d+", text)]


def test_area_is_one_where_the_true_ones_stand_out_and_a_half_where_they_do_not(example: dict[str, Any]) -> None:
    draws = np.random.default_rng(0).standard_normal((2, 200))
    assert numbers(example["area"](draws[0] + 20, draws[1])) == [1.0, 1.0, 1.0]
    found, low, high = numbers(example["area"](draws[0], draws[1]))
    assert low < found < high and low < 0.5 < high


def test_discoveries_of_clear_scores_are_all_true_ones_and_of_noise_none(example: dict[str, Any]) -> None:
    noise = np.random.default_rng(1).normal(0, 0.05, (40, 40))
    rate, _, high, power = numbers(example["discoveries"](noise + np.eye(40), 0.25))
    assert rate <= 0.1 and high <= 0.1 and power == 1.0
    assert numbers(example["discoveries"](noise, 0.25))[-1] < 0.1


def test_calibration_error_is_small_where_the_curve_fits(example: dict[str, Any]) -> None:
    draws = np.random.default_rng(2).standard_normal((2, 4000))
    error, brier = numbers(example["calibration_error"](draws[0] + 2, draws[1]))[:2]
    assert error < 0.03 and 0 < brier < 0.2


def test_excesses_are_those_of_the_system_that_are_numbers(example: dict[str, Any], tmp_path: Path) -> None:
    storage, keys = Storage(tmp_path), {"predictor": "world/truth", "labeler": "milan", "model": "m", "layer": "a"}
    rows = [("own", 1.5), ("own", None), ("shuffled", 0.5)]
    columns: dict[str, list[object]] = {column.name: [None] * len(rows) for column in VERDICTS.columns}
    for column in VERDICTS.columns:
        if not column.nullable:
            columns[column.name] = ["" if str(column.type) == "string" else 0] * len(rows)
    columns |= {name: [value] * len(rows) for name, value in keys.items()}
    columns |= {"system": [system for system, _ in rows], "excess": [excess for _, excess in rows]}
    storage.write(VERDICTS, VERDICTS.table(columns), "c", **keys)
    assert example["excesses"](storage, "m", "milan").tolist() == [1.5]
    assert example["excesses"](storage, "m", "milan", "shuffled").tolist() == [0.5]
