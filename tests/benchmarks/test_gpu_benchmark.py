"""The benchmark of a GPU: it keeps to its time, writes what it measured, and says what is missing."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from milan_ray import cli
from milan_ray.benchmarks import gpu, gpu_parts
from milan_ray.benchmarks.agreement import agreement
from milan_ray.benchmarks.gpu import PARTS, Report
from milan_ray.benchmarks.gpu_parts import Bench, tf32, timed
from milan_ray.benchmarks.harness import Options, Result
from milan_ray.schema import EXEMPLARS, LEVELS
from milan_ray.storage import Storage

ABOUT = {"cpu": "a CPU", "gpu": "a GPU", "cores": 4, "threads": 4, "torch": "2"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_benchmark_without_a_gpu_says_what_is_missing_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["benchmark", "gpu"]) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: benchmark gpu measures a GPU, but ") and "--device cpu --short" in message


def test_gpu_benchmark_without_time_leaves_out_every_part_and_says_so(tmp_path: Path) -> None:
    out = tmp_path / "figures"
    command = ["benchmark", "gpu", "--device", "cpu", "--short", "--minutes", "0", "--out", str(out)]
    assert cli.main([*command, "--json", str(tmp_path / "all.json")]) == 0
    figures = json.loads((out / "gpu.json").read_text())
    assert list(figures["left_out"]) == [part.name for part in PARTS] and not figures["results"]
    assert "left out: it takes at least 20 s, and 0 s were left" in (out / "gpu.md").read_text()
    assert json.loads((tmp_path / "all.json").read_text())["results"] == []


def test_parts_share_the_time_that_is_left_and_those_that_do_not_fit_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    shares = []

    def part(bench: Bench, seconds: float):
        shares.append(seconds)
        now[0] += 40
        yield Result("measured", (1.0,))

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(gpu, "PARTS", tuple(gpu.Part(name, part, 10, 1) for name in "abcd"))
    monkeypatch.setattr(gpu_parts, "photo_count", lambda options: 1)
    results = list(gpu.run(Options(device="cpu", minutes=1.5, out=tmp_path)))
    figures = json.loads((tmp_path / "gpu.json").read_text())
    assert shares == [90 / 4, 50 / 3, 10 / 2] and len(results) == 3
    assert figures["seconds"] == {"a": 40, "b": 40, "c": 40}
    assert figures["left_out"] == {"d": "it takes at least 10 s, and 0 s were left"}


def test_timing_repeats_as_often_as_the_time_allows(tmp_path: Path) -> None:
    bench = Bench(Options(repeats=3, device="cpu"), torch.device("cpu"), tmp_path)
    calls = []
    plenty = timed("x", lambda: calls.append("ours"), lambda: calls.append("bare"), bench, 1e6, 1, "runs")
    assert len(plenty.seconds) == len(plenty.baseline) == 3
    assert calls == ["ours", "bare", "ours", "bare", "bare", "ours", "ours", "bare"]
    assert len(timed("x", lambda: None, None, bench, 0.0, 1, "runs").seconds) == 1


def test_tf32_is_set_for_a_while() -> None:
    def flags() -> tuple[bool, bool]:
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    before = flags()
    for allowed in (False, True):
        with tf32(allowed):
            assert flags() == (allowed, allowed)
        assert flags() == before


def test_report_has_a_row_for_each_result_under_the_gpus_name() -> None:
    report = Report(ABOUT, "cuda", {"forward": [Result("kernels", (2.0,), (1.0,), 10, "images", {"memory": 3.0})]})
    lines = report.markdown().splitlines()
    assert lines[0].startswith("a GPU; 4 cores")
    assert lines[-1] == "| forward | kernels | 5 images/s | 10 images/s | 2.00 (2.00 to 2.00) | memory: 3 |"
    assert Report(ABOUT, "cpu").markdown().startswith("a CPU, without a GPU")


def stored(folder: Path, images: list[list[int]], values: list[list[float]], levels: list[float], mask: int) -> Storage:
    storage = Storage(str(folder))
    units, k = np.shape(images)
    columns = {"model": ["m"] * units * k, "layer": ["l"] * units * k, "unit": np.repeat(np.arange(units), k)}
    columns |= {"rank": np.tile(np.arange(k), units), "image_id": np.ravel(images), "activation": np.ravel(values)}
    columns["mask"] = [bytes([mask])] * units * k
    storage.write(EXEMPLARS, EXEMPLARS.table(columns), "exemplars", model="m", layer="l")
    counts = {"positions": [9] * units, "nonfinite": [0] * units, "exact": [True] * units}
    table = {"model": ["m"] * units, "layer": ["l"] * units, "unit": np.arange(units), "level": levels, **counts}
    storage.write(LEVELS, LEVELS.table(table), "levels", model="m", layer="l")
    return storage


@pytest.mark.parametrize(
    "images, values, levels, mask, same, equal",
    [
        ([[3, 1], [2, 0]], [[1.0, 1.0], [1.0, 1.0]], [1.0, 1.0], 0, 2, "yes"),
        ([[1, 3], [2, 0]], [[1.00001, 1.0], [1.0, 1.0]], [1.0, 1.0], 0, 1, "yes"),  # a tie
        ([[3, 7], [2, 0]], [[1.0, 0.99999], [1.0, 1.0]], [1.0, 1.0], 0, 1, "yes"),  # a tie at the end
        ([[3, 1], [2, 0]], [[1.01, 1.0], [1.0, 1.0]], [1.0, 1.0], 0, 2, "NO"),
        ([[3, 1], [2, 0]], [[1.0, 1.0], [1.0, 1.0]], [1.0, 1.1], 0, 2, "NO"),
    ],
)
def test_agreement_forgives_ties_and_nothing_else(tmp_path, images, values, levels, mask, same, equal) -> None:
    reference = stored(tmp_path / "a", [[3, 1], [2, 0]], [[1.0, 1.0], [1.0, 1.0]], [1.0, 1.0], 0)
    found = agreement(reference, stored(tmp_path / "b", images, values, levels, mask), "m", ["l"])
    assert (found.units, found.same_images) == (2, same)
    assert found.facts(ties=1e-4)["equal up to ties within 0.0001"] == equal


def test_agreement_counts_pixels_of_masks_that_differ(tmp_path: Path) -> None:
    arguments = [[3]], [[1.0]], [1.0]
    found = agreement(stored(tmp_path / "a", *arguments, 0), stored(tmp_path / "b", *arguments, 3), "m", ["l"])
    assert found.pixels == 2 / 8


@pytest.mark.slow
def test_gpu_benchmark_runs_on_a_cpu_from_tables_to_ray(tmp_path: Path) -> None:
    command = ["benchmark", "gpu", "--device", "cpu", "--short", "--repeats", "1", "--threads", "1", "--minutes", "60"]
    assert cli.main([*command, "--out", str(tmp_path)]) == 0
    figures = json.loads((tmp_path / "gpu.json").read_text())
    assert list(figures["results"]) == [part.name for part in PARTS] and not figures["left_out"]
    results = [result for part in figures["results"].values() for result in part]
    assert all(seconds > 0 for result in results for seconds in result["seconds"])
    agreements = [value for result in results for fact, value in result["facts"].items() if fact.startswith("equal up")]
    assert agreements == ["yes"] * 3  # two arithmetics, and Ray
