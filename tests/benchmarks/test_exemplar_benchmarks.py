"""The short forms of the benchmarks of exemplars, zoos, merging and Ray run to the end, through the command line."""

from __future__ import annotations

import json

import pytest

from milan_ray import cli


@pytest.mark.parametrize(
    "name",
    [
        "merge",
        "ratings",
        "zoo",
        "effects",
        "features",
        pytest.param("exemplars", marks=pytest.mark.slow),
        pytest.param("feeding", marks=pytest.mark.slow),
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


@pytest.mark.slow
def test_scale_benchmark_counts_the_job_asked_for(ray_session, tmp_path):
    """An object for each shard and model, whatever the number of layers; a merge reads little more than its layer."""
    file = tmp_path / "figures.json"
    size = ["--images", "1280", "--models", "3"]
    assert (
        cli.main(["benchmark", "scale", "--short", "--repeats", "1", "--threads", "1", *size, "--json", str(file)]) == 0
    )
    stored, resumed, finished, merged, masked, encoded, *actors, rows = json.loads(file.read_text())["results"]
    assert stored["work"] == merged["work"] == rows["work"] == 16
    assert stored["facts"]["objects of the job"] == 16 * 3
    assert resumed["facts"]["requests: LIST"] == 3 and "requests: GET" not in resumed["facts"]
    assert finished["work"] == 1280 and finished["facts"]["requests: PUT"] == 2  # skipped, and the manifest's digests
    assert 16 <= merged["facts"]["requests: GET"] <= 16 * 2 and merged["facts"]["requests: HEAD"] == 16
    assert merged["facts"]["requests: PUT"] == 3  # exemplars, levels, a row of the run log
    assert 1e3 * merged["facts"]["requests: MB"] < 1e6 * stored["facts"]["GB of the job"] / 3
    requests = {name: [found["facts"][f"requests: {name}"] for found in (masked, encoded)] for name in ("PUT", "GET")}
    assert masked["work"] <= 1280 and requests["PUT"][0] == -(-masked["work"] // 128)  # blocks, not one per layer too
    chunks = -(-encoded["work"] // 32)
    assert requests["PUT"][1] == chunks + 3 * 5  # and an object per layer of what is scattered
    assert requests["GET"][1] <= 2 * 15 + 3 * 15 * chunks  # indexes, what is scattered, and parts of pieces
    assert [actor["unit"] for actor in actors] == ["images"] * 4
