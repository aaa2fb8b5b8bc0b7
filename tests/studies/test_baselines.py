"""The paper's Table 2 from comparisons of single networks."""

from __future__ import annotations

import polars as pl
import pytest

from milan_ray.report.figures import files
from milan_ray.scoring.evaluation import ANNOTATORS, score_table
from milan_ray.showcase.paper.baselines import claims
from milan_ray.studies.baselines.plot import plot_baselines
from milan_ray.studies.baselines.statistics import collected, score_rows, summary, table_2

VALUES = {"milan": 0.4, "milan-pdE": 0.3, "netdissect": 0.2, "compexp": 0.1, "constant": 0.15, ANNOTATORS: 0.5}


def comparison(metric: str = "rouge-l-f", **changes: float) -> pl.DataFrame:
    from milan_ray.scoring.bootstrap import Interval

    values = VALUES | changes
    rows = [(name, metric, Interval(value, value - 0.1, value + 0.1), 7, "") for name, value in values.items()]
    rows += [
        ("milan − constant", metric, Interval(0.2, 0.1, 0.3), 7, ""),
        ("shuffled", "auroc", Interval(1, 1, 1), 0, ""),
    ]
    rows += [("netdissect, shuffled", metric, Interval(0.0, 0.0, 0.0), 7, "")]
    return pl.DataFrame(pl.from_arrow(score_table("of m: annotations", rows)))


@pytest.fixture(scope="module")
def rows() -> pl.DataFrame:
    return collected({"m": pl.concat([comparison(), comparison("auroc", milan=0.25)]), "n": comparison(milan=0.1)})


def test_table_has_a_line_per_network_and_labelers_in_the_papers_order(rows: pl.DataFrame) -> None:
    table = table_2(rows)
    assert table.columns == ["model", "units", "CE", "ND", "p(d|E)", "wPMI", "constant", ANNOTATORS]
    assert table.row(0) == ("m", 7, 0.1, 0.2, 0.3, 0.4, 0.15, 0.5) and table["wPMI"].to_list() == [0.4, 0.1]
    assert table_2(rows, "auroc")["model"].to_list() == ["m"]
    assert ("n: compexp", "rouge-l-f") in {row[:2] for row in score_rows(rows)}
    assert "wPMI 0.400" in summary(rows)
    assert files(plot_baselines(rows))["svg"].startswith(b"<?xml")


def test_claims_are_what_the_figures_say(rows: pl.DataFrame) -> None:
    agreement, networks, gain, scenes = claims(rows)
    assert agreement.reproduced and networks.reproduced and gain.reproduced and not scenes.reproduced
    assert "CE 0.100" in agreement.ours and "+0.100" in gain.ours
    worse = claims(collected({"m": comparison(milan=0.2, compexp=0.25)}))
    assert [claim.reproduced for claim in worse] == [False, False, False]
