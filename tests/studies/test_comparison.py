from __future__ import annotations

import io
from pathlib import Path

import polars as pl
import pytest
from PIL import Image

from milan_ray.config import Fingerprint
from milan_ray.errors import MilanError
from milan_ray.report.figures import files
from milan_ray.schema import (
    CANDIDATES,
    DESCRIPTIONS,
    DRAWINGS,
    ENCODINGS,
    EXEMPLARS,
    IMAGE_EMBEDDINGS,
    RUNS,
    Table,
)
from milan_ray.schema.operations import SHARES
from milan_ray.scoring.bootstrap import Interval
from milan_ray.scoring.evaluation import score_table
from milan_ray.storage import Storage
from milan_ray.studies.comparison.plot import plot_comparison
from milan_ray.studies.comparison.statistics import (
    EVERYBODY,
    PER_HOUR,
    SECONDS,
    common_units,
    cost_rows,
    unit_score_rows,
    with_trivial_labels,
)


def test_units_compared_are_those_that_all_have_labelled() -> None:
    rows = [("a", "m", "1", unit, f"a{unit}") for unit in (3, 1, 2)] + [
        ("b", "m", "1", unit, f"b{unit}") for unit in (1, 3)
    ]
    frame = pl.DataFrame(rows, ["labeler", "model", "layer", "unit", "description"], orient="row")
    assert common_units(frame) == ([("m", "1", 1), ("m", "1", 3)], {"a": ["a1", "a3"], "b": ["b1", "b3"]})
    with pytest.raises(MilanError, match="no unit is labelled by all of these"):
        common_units(frame.filter(pl.col("unit").is_in([2]) | ((pl.col("labeler") == "b") & (pl.col("unit") == 1))))


def test_every_labeler_has_its_own_shuffled_row() -> None:
    systems = with_trivial_labels({"a": ["x", "x", "y"], "b": ["1", "2", "3"]}, None)
    assert list(systems) == ["a", "b", "constant", "shuffled", "b, shuffled"]
    assert systems["constant"] == ["x"] * 3
    assert sorted(systems["b, shuffled"]) == ["1", "2", "3"]
    assert all(mine != other for mine, other in zip(systems["b"], systems["b, shuffled"], strict=True))


def test_unit_scores_count_where_all_labels_are_those_of_today_and_scored() -> None:
    units = [("m", "1", unit) for unit in range(4)]
    rows = []
    for labeler, gain in (("a", 0.0), ("b", 0.5)):
        for unit in range(4):
            label = "old" if (labeler, unit) == ("b", 3) else f"{labeler}{unit}"
            for system, value in (("own", unit + gain), ("shuffled", -1.0), ("constant", 0.0)):
                unknown = (labeler, unit, system) == ("a", 0, "own")
                row = ("p", labeler, "m", "1", unit, system, label, "simulation", None if unknown else value, 9)
                rows.append(row)
    rows += [("p", "a", "m", "1", 0, "own", "a0", "auprc", 0.5, 9)]  # of one labeler alone
    columns = ["predictor", "labeler", "model", "layer", "unit", "system", "description", "metric", "value", "images"]
    scores = pl.DataFrame(rows, columns, orient="row").with_columns(pl.col("unit").cast(pl.Int32))
    found = unit_score_rows(scores, units, {name: [f"{name}{unit}" for unit in range(4)] for name in "ab"})
    values = {system: (score.value, n) for system, _, score, n, _ in found}
    assert values["a"] == (1.5, 2) and values["b"] == (2.0, 2)  # units 1 and 2
    assert values["constant"] == (0.0, 2) and values["b, shuffled"] == values["shuffled"] == (-1.0, 2)
    assert values["a − shuffled"] == (2.5, 2) and {metric for _, metric, *_ in found} == {"simulation"}


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """Two layers of a model: exemplars → encodings → candidates → milan; and netdissect, all with runs."""
    found = Storage(tmp_path)

    def write(table: Table, fingerprint: Fingerprint, rows: int, seconds: float, stage: str, **keys: str) -> None:
        columns: dict[str, object] = {column.name: [None] * rows for column in table.columns}
        columns["unit"] = list(range(rows))
        columns |= {name: [value] * rows for name, value in keys.items()}
        columns |= {"description": ["x"] * rows, "score": [1.0] * rows, "n_best": [[]] * rows}
        data = table.table({name: columns[name] for name in (column.name for column in table.columns)})
        found.write(table, data, fingerprint, **keys)
        record(stage, fingerprint, seconds, keys["layer"], "m")

    def record(stage: str, fingerprint: Fingerprint, seconds: float, layer: str, model: str) -> None:
        run = {"stage": stage, "run": fingerprint.hash, "model": model, "layer": layer, "rows": 4, "images": 9,
               "seconds": seconds, "images_per_second": None, "finished_at": "", "versions": "{}"}  # fmt: skip
        run_row = RUNS.table({name: [value] for name, value in run.items()}, SHARES)
        found.write(RUNS, run_row, "r", stage=stage, run=fingerprint.hash, model=model)

    for layer, seconds in (("1", 10.0), ("2", 8.0)):
        keys = {"model": "m", "layer": layer}
        first = Fingerprint.of({"layer": layer})
        write(EXEMPLARS, first, 0, seconds, "exemplars", **keys)
        encoded = Fingerprint.of({"exemplars": first.hash})
        write(ENCODINGS, encoded, 0, seconds / 2, "encodings", encoder="e", **keys)
        searched = Fingerprint.of({"encodings": encoded.all_units})
        write(CANDIDATES, searched, 0, 1.0 + float(layer), "candidates", decoder="d", **keys)
        write(CANDIDATES, Fingerprint.of({"encodings": "others"}), 0, 100.0, "candidates", decoder="other", **keys)
        ranked = Fingerprint.of({"candidates": searched.all_units, "lam": 0.2})
        write(DESCRIPTIONS, ranked, 4, 0.0, "none", labeler="milan", **keys)
        write(
            DESCRIPTIONS, Fingerprint.of({"exemplars": first.hash}), 4, 6.0, "netdissect", labeler="netdissect", **keys
        )
        drawn = Fingerprint.of({"exemplars": first.hash, "scoring": "mean"})
        write(DRAWINGS, drawn, 0, 1.0 + float(layer), "dnd-x", labeler="dnd-x", **keys)
        write(DESCRIPTIONS, Fingerprint.of({"drawings": drawn.all_units}), 4, 0.0, "none", labeler="dnd-x", **keys)
        embedded = Fingerprint.of({"probe": "p"})
        found.write(IMAGE_EMBEDDINGS, IMAGE_EMBEDDINGS.schema.empty_table(), embedded, encoder="clip", probe="p")
        record("image_embeddings", embedded, 3.0, "", "clip")
        named = Fingerprint.of({"exemplars": first.hash, "image_embeddings": embedded.hash})
        write(DESCRIPTIONS, named, 4, 2.0 * float(layer), "clip-dissect", labeler="clip-dissect", **keys)
    return found


def test_cost_follows_what_labels_were_made_from_and_adds_the_shares_of_passes(storage: Storage) -> None:
    rows = cost_rows(storage, ["milan", "netdissect"], [("m", "1"), ("m", "2")])
    found = {(system, metric): score.value for system, metric, score, _, _ in rows}
    # Encodings: 5 and 4 s of one pass; candidates: 2 and 3 s; netdissect: 6 s each, which are no guess at one pass.
    assert found["milan", SECONDS] == (5 + 4 + 2 + 3) / 8
    assert found["netdissect", SECONDS] == (6 + 6) / 8
    assert found[EVERYBODY, SECONDS] == (10 + 8) / 8
    assert found["netdissect", PER_HOUR] == pytest.approx(2400)
    assert {note for system, _, _, _, note in rows if system == "milan"} == {"candidates, encodings"}


def test_cost_of_every_labeler_is_found(storage: Storage) -> None:
    rows = cost_rows(storage, ["dnd-x", "clip-dissect"], [("m", "1"), ("m", "2")])
    found = {(system, metric): score.value for system, metric, score, _, _ in rows}
    assert found["dnd-x", SECONDS] == (2 + 3) / 8
    assert found["clip-dissect", SECONDS] == (2 + 4 + 3) / 8  # the probe is embedded once


def test_cost_of_labels_without_records_is_left_out(storage: Storage) -> None:
    for keys in storage.partitions(RUNS):
        if keys["stage"] in ("candidates", "encodings"):
            storage.remove_file(storage.path(RUNS, **keys))
    assert {row[0] for row in cost_rows(storage, ["milan", "netdissect"], [("m", "1"), ("m", "2")])} == {
        "netdissect",
        EVERYBODY,
    }


def test_cost_of_layers_alone_is_their_share(storage: Storage) -> None:
    def total(*layers: tuple[str, str]) -> dict[str, float]:
        rows = cost_rows(storage, ["milan", "netdissect"], layers)
        return {labeler: value.value * units for labeler, metric, value, units, _ in rows if metric == SECONDS}

    both, one, other = total(("m", "1"), ("m", "2")), total(("m", "1")), total(("m", "2"))
    assert both == {labeler: pytest.approx(one[labeler] + other[labeler]) for labeler in one}


def test_cost_by_records_of_earlier_versions_is_left_out(storage: Storage) -> None:
    """Their seconds do not add up, and do not say of how many layers a pass was."""
    for keys in storage.partitions(RUNS):
        if keys["stage"] == "encodings":
            storage.write(RUNS, storage.read(RUNS, **keys).replace_schema_metadata(), "r", **keys)
    assert {row[0] for row in cost_rows(storage, ["milan", "netdissect"], [("m", "1"), ("m", "2")])} == {
        "netdissect",
        EVERYBODY,
    }


def test_figure_is_the_same_for_the_same_scores() -> None:
    def table(experiment: str, metrics: dict[str, float]) -> pl.DataFrame:
        rows = [
            (system, metric, Interval(value, value - 0.1, value + 0.1), 5, "")
            for metric, value in metrics.items()
            for system in ("milan", "netdissect", "constant", "shuffled")
        ]
        return pl.DataFrame(pl.from_arrow(score_table(experiment, rows)))

    scores = pl.concat(
        [table("c", {"rouge-l-f": 0.3, "auroc": 0.7, PER_HOUR: 900.0}), table("k", {"face": 0.9, "colour": 0.4})]
    )
    drawn, again = files(plot_comparison(scores, "k")), files(plot_comparison(scores, "k"))
    assert drawn == again and set(drawn) == {"svg", "png"}
    assert Image.open(io.BytesIO(drawn["png"])).size[0] > 600
