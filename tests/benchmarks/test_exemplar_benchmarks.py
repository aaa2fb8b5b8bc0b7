"""The short forms of the benchmarks of exemplars, zoos, merging and Ray run to the end, through the command line."""

from __future__ import annotations

import json

import pytest

from milan_ray import cli


@pytest.mark.parametrize(
    "name",
    [
        "merge",
        "zoo",
        pytest.param("exemplars", marks=pytest.mark.slow),
        pytest.param("ray-overhead", marks=pytest.mark.slow),
    ],
)
def test_benchmark_short_form_writes_its_figures(ray_session, name, tmp_path, capsys):
    file = tmp_path / "figures.json"
    assert cli.main(["benchmark", name, "--short", "--repeats", "1", "--threads", "1", "--json", str(file)]) == 0
    figures = json.loads(file.read_text())
    assert figures["benchmark"] == name and figures["machine"]["threads"] == 1
    assert all(seconds > 0 for result in figures["results"] for seconds in result["seconds"])
    assert figures["results"][0]["name"] in capsys.readouterr().out
