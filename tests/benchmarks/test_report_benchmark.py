"""The report's benchmark: its zoo is what it says, and every part of the report is measured."""

from __future__ import annotations

from dataclasses import replace

import pytest

from milan_ray.benchmarks import report
from milan_ray.benchmarks.harness import Options
from milan_ray.benchmarks.report import LABELERS, Zoo, write_zoo
from milan_ray.report import write_report
from milan_ray.schema import DESCRIPTIONS, EXEMPLARS, UNIT_SCORES
from milan_ray.storage import Storage

SHORT = Zoo.of(Options(short=True))


def test_zoo_has_fifty_thousand_units_and_the_short_one_is_written_whole(tmp_path):
    assert Zoo().units == 50_000 and SHORT.units == 90
    storage = Storage(tmp_path)
    write_zoo(storage, SHORT)
    assert [storage.count(EXEMPLARS, **keys) for keys in storage.partitions(EXEMPLARS)] == [30, 60] * 3
    for table, systems in ((DESCRIPTIONS, 1), (UNIT_SCORES, 3)):
        assert sum(storage.count(table, **keys) for keys in storage.partitions(table)) == 90 * len(LABELERS) * systems
    again = Storage(tmp_path / "again")
    write_zoo(again, replace(SHORT, names=("synthetic/0",)))  # is the same alone
    keys = {"model": "synthetic/0", "layer": "layer2"}
    assert again.read(EXEMPLARS, **keys).equals(storage.read(EXEMPLARS, **keys))


def test_report_of_the_zoo_leaves_nothing_out(tmp_path, capsys):
    write_zoo(Storage(tmp_path), SHORT)
    write_report(Storage(tmp_path), tmp_path / "report")
    assert "left out" not in capsys.readouterr().err
    card = next((tmp_path / "report").glob("layers/*0-*/layer1-*/cards/0.js")).read_text(encoding="ascii")
    assert '"metric":"simulation"' in card and '"near":[[' in card and card.count('"best":[[') == 2 * 10


def test_report_short_measures_a_report_and_another_one(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    first, again = report.run(Options(repeats=1, threads=1, short=True))
    for result in (first, again):
        facts = {name: float(value) for name, value in result.facts.items()}
        kinds = ("indices", "cards", "masks", "thumbnails", "the rest")
        assert result.work == 90 and result.seconds[0] > facts["slowest layer, seconds"] > 0
        assert facts["all bytes, MB"] == pytest.approx(sum(facts[f"{kind}, MB"] for kind in kinds))
        assert facts["masks, MB"] > facts["indices, MB"] > 0
        assert facts["peak memory, MB"] > facts["of it before anything is written, MB"]
    assert first.facts["files"] == again.facts["files"]
