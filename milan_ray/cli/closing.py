"""What a verb says and writes when it is done: the plan, the report, the summary."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from milan_ray.cli.records import absolute
from milan_ray.progress import say

if TYPE_CHECKING:
    from milan_ray.pipelines.plan import Plan
    from milan_ray.storage import Storage


def report_on(
    args: argparse.Namespace,
    storage: Storage,
    models: Sequence[str] | None = None,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Writes the HTML report, unless it was declined or cannot be placed; says where."""
    from milan_ray.report import write_report

    if args.no_report:
        return
    if args.report is None and not storage.is_local:
        say("report: skipped; give --report DIR to write one beside a remote storage")
        return
    target = Path(absolute("--report", args.report)) if args.report else Path(storage.root) / "report"
    index = write_report(storage, target, models=models, labelers=labelers_of(storage, models), notes=notes)
    say(f"report: {index}")


def labelers_of(storage: Storage, models: Sequence[str] | None) -> list[str] | None:
    """The labelers of some models (or all) in the order that a report shows them: MILAN first; None without any."""
    from milan_ray.schema import DESCRIPTIONS

    described = storage.partitions(DESCRIPTIONS)
    found = {keys["labeler"] for keys in described if models is None or keys["model"] in models}
    return sorted(found, key=lambda labeler: (labeler != "milan", labeler)) or None


def show_plan(plan: Plan) -> int:
    """Prints a plan; returns the exit status."""
    print(plan.text())
    return 1 if plan.failed else 0


def close(
    stage: str, storage: Storage, done: Mapping[str, Sequence[str]], failed: Mapping[str, str], started: float
) -> int:
    """Says what is there now, where, how long it took, and what is not there and why; returns the exit status."""
    seconds = time.monotonic() - started
    say(f"{stage}: {sum(map(len, done.values()))} layers of {len(done)} models in {seconds:.0f} s, in {storage.root}")
    for name, reason in failed.items():
        say(f"skipped {name}: {reason}")
    return 1 if failed else 0
