"""The benchmarks' own arithmetic, and that each of them runs."""

from __future__ import annotations

import json
import math

from milan_ray.benchmarks.harness import Options, Result, alone, compare, photographs


def test_compare_runs_subject_and_baseline_in_turns():
    calls = []
    result = compare("x", lambda: calls.append("ours"), lambda: calls.append("bare"), 2, warm_up=False)
    assert calls == ["ours", "bare", "bare", "ours"]
    assert len(result.seconds) == len(result.baseline) == 2


def test_result_ratio_is_the_median_over_pairs_with_its_spread():
    result = Result("x", (2.0, 3.0, 8.0), (1.0, 2.0, 2.0), work=6, unit="images")
    assert result.ratios == (2.0, 1.5, 4.0)
    assert result.record()["ratio"] == 2.0 and result.record()["spread"] == [1.5, 4.0]
    assert "2 images/s" in str(result) and "ratio 2.000 (1.500 to 4.000)" in str(result)
    assert json.loads(json.dumps(result.with_facts(peak_memory=3).record()))["facts"] == {"peak memory": 3}


def test_result_against_a_figure_measured_elsewhere_and_none():
    assert compare("x", lambda: None, 10.0, 2).ratio < 1
    assert math.isnan(compare("x", lambda: None, None, 2).ratio)


def allocate(megabytes: int) -> int:
    return len(bytearray(b"x") * (megabytes * 10**6))


def test_alone_measures_the_memory_of_that_call_only():
    held = bytearray(b"x") * 400_000_000
    _, little = alone(allocate, 1)
    answer, much = alone(allocate, 300)
    assert answer == 300_000_000 and len(held) == 400_000_000
    assert 250 < much - little < 400


def test_photographs_generated_are_as_many_as_asked_for():
    with photographs(Options(), 3) as folder:
        assert [path.name for path in sorted(folder.iterdir())] == ["00000.jpg", "00001.jpg", "00002.jpg"]
