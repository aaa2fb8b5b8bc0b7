"""A unit's scores and verdicts, for its card and for the columns of its layer's index."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Protocol

from milan_ray.damaged import LeftOut
from milan_ray.report.pages import VERDICT_ORDER, VERDICT_SUFFIX, Row, short
from milan_ray.schema import SCORES
from milan_ray.scoring.score_sanity import JUDGED, failing
from milan_ray.storage import Storage

OWN, OF_EXEMPLARS = "own", "exemplars"
"""Names in tables ``unit_scores`` and ``verdicts``: the unit's own description; scores that need none."""

Put = Callable[[str, str, float | None], None]
"""Adds a figure of the unit to the index: key, name, value."""

Tables = Mapping[tuple[str, str], Mapping[int, Sequence[Row]]]
"""(judge, labeler) → unit → rows."""


class Layer(Protocol):
    """The part of a layer's content that scores need."""

    stale: int

    @property
    def failing(self) -> Mapping[str, Sequence[str]]:
        """Metric → tests of scores that it fails."""

    @property
    def descriptions(self) -> Mapping[str, object]:
        """Labeler → its descriptions."""


def scores_of(layer: Layer, unit: int, scores: Tables, labels: Sequence[Row | None], put: Put) -> Iterator[Row]:
    """Yields a unit's scores per judge, labeler and metric, if the scored description is the current one."""
    now = dict(zip(layer.descriptions, labels, strict=True))
    for (predictor, labeler), rows in scores.items():
        metrics: dict[str, dict[str, Row]] = defaultdict(dict)
        for row in rows.get(unit, []):
            metrics[row["metric"]][row["system"]] = row
        for metric, systems in metrics.items():
            own = systems.get(OWN)
            label = now.get(labeler)
            if own is None:
                continue
            if labeler != OF_EXEMPLARS and own["description"] != (label["text"] if label else None):
                layer.stale += 1
                continue
            who = "" if labeler == OF_EXEMPLARS or len(now) == 1 else f"{labeler}: "
            mark = failure(layer.failing.get(metric))
            put(f"{predictor} {labeler} {metric}", f"{who}{metric} ({predictor}){mark}", own["value"])
            yield {
                "judge": predictor,
                "labeler": labeler,
                "metric": f"{metric}{mark}",
                "images": own["images"],
                **{system: short(row["value"]) for system, row in systems.items()},
            }


def verdicts_of(layer: Layer, unit: int, verdicts: Tables, labels: Sequence[Row | None], put: Put) -> Iterator[Row]:
    """Yields the verdicts on a unit's current descriptions per judge and labeler, with those of trivial baselines."""
    now = dict(zip(layer.descriptions, labels, strict=True))
    for (judge, labeler), rows in verdicts.items():
        systems = {row["system"]: row for row in rows.get(unit, [])}
        own, label = systems.get(OWN), now.get(labeler)
        if own is None:
            continue
        if label is None or own["description"] != label["text"]:
            layer.stale += 1
            continue
        who = "" if len(now) == 1 else f"{labeler}: "
        put(f"{judge} {labeler}{VERDICT_SUFFIX}", f"{who}verdict ({judge})", float(VERDICT_ORDER.index(own["verdict"])))
        put(f"{judge} {labeler} probability", f"{who}probability ({judge})", own["probability"])
        yield {
            "judge": judge,
            "labeler": labeler,
            "reason": own["reason"],
            **{name: short(own[name]) for name in ("score", "others", "p", "q", "probability")},
            "verdict": own["verdict"],
            **{system: row["verdict"] for system, row in systems.items() if system != OWN},
        }


def failing_scores(storage: Storage, left_out: LeftOut) -> dict[str, list[str]]:
    """Finds the metrics that fail a test of scores in any experiment of a storage, and the tests."""
    experiments = [keys for keys in storage.partitions(SCORES) if keys["experiment"].startswith(JUDGED)]
    tables = [left_out.unless_damaged(partial(storage.read, SCORES, **keys), None) for keys in experiments]
    return failing(row for table in tables if table is not None for row in table.to_pylist())


def failure(tests: Sequence[str] | None) -> str:
    """What stands behind the name of a metric that fails tests."""
    return f" – fails: {', '.join(tests)}" if tests else ""
