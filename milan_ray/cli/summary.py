"""What a verb says and writes when it is done: the plan, the report, the summary."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from milan_ray.cli.build_configs import absolute
from milan_ray.progress import say

if TYPE_CHECKING:
    from milan_ray.engine.planner import Plan
    from milan_ray.storage import Storage


@dataclass
class Summary:
    """What a verb has done, for people a line on standard error, for programs an object on standard output.

    Attributes:
        verb: The verb.
        title: What the closing line begins with.
        what: What is there now, in words; None for no closing line.
        facts: What programs may want of it: files, counts, the plan of a dry run.
        skipped: What is not there → why.
        error: Why the verb failed.
        started: When it began, by the monotonic clock.
    """

    verb: str
    title: str = ""
    what: str | None = "done"
    facts: dict[str, object] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    error: str | None = None
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Seconds since the verb began."""
        return time.monotonic() - self.started

    def say(self) -> None:
        """The closing lines: what, how long, where, and what was skipped and why."""
        where = f", in {self.facts['storage']}" if "storage" in self.facts else ""
        if self.error is None and self.what is not None:
            say(f"{self.title or self.verb}: {self.what} in {duration(self.seconds)}{where}")
        for name, reason in self.skipped.items():
            say(f"skipped {name}: {reason}", level="warning")

    def json(self, status: int) -> str:
        """The same as a JSON object: verb, status (``done``, ``partly`` or ``failed``), seconds, what else there is."""
        word = "failed" if self.error is not None else "partly" if status else "done"
        told: dict[str, object] = {"verb": self.verb, "status": word, "exit": status, "seconds": round(self.seconds, 3)}
        if self.error is not None:
            told["error"] = self.error
        elif self.what is not None:
            told["what"] = self.what
        return json.dumps({**told, **self.facts, "skipped": self.skipped}, ensure_ascii=False)


def duration(seconds: float) -> str:
    """Seconds as people say them: ``7 s``, ``3 min 20 s``, ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def note(args: argparse.Namespace, what: str | None = None, **facts: object) -> None:
    """Tells the closing summary what was done, and what programs may want to know of it.

    Args:
        args: The verb's options.
        what: What is there now, in words.
        **facts: Names and values for the JSON object: paths, counts.
    """
    if what is not None:
        args.summary.title, args.summary.what = args.summary.verb, what
    args.summary.facts |= facts


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
    target = report_folder(args, storage)
    if target is None:
        say("report: skipped; give --report DIR to write one beside a remote storage")
        return
    index = write_report(storage, target, models=models, labelers=labelers_of(storage, models), notes=notes)
    say(f"report: {index}")
    note(args, report=str(index))


def report_folder(args: argparse.Namespace, storage: Storage) -> Path | None:
    """The folder of the HTML report; None where the storage is remote and no other was given."""
    if args.report is not None:
        return Path(absolute("--report", args.report))
    return Path(storage.root) / "report" if storage.is_local else None


def labelers_of(storage: Storage, models: Sequence[str] | None) -> list[str] | None:
    """The labelers of some models (or all) in the order that a report shows them: MILAN first; None without any."""
    from milan_ray.schema import DESCRIPTIONS

    described = storage.partitions(DESCRIPTIONS)
    found = {keys["labeler"] for keys in described if models is None or keys["model"] in models}
    return sorted(found, key=lambda labeler: (labeler != "milan", labeler)) or None


def show_plan(args: argparse.Namespace, plan: Plan) -> int:
    """Prints a plan, or leaves it to the summary of ``--json``; returns the exit status."""
    args.summary.what = None
    if args.json:
        steps = [*plan.due, *plan.later]
        told = [{"table": step.table, "keys": step.keys, "reason": step.reason} for step in steps]
        note(args, planned=[*args.summary.facts.get("planned", ()), *told])
        args.summary.skipped |= plan.failed
    else:
        print(plan.text())
    return 1 if plan.failed else 0


def show_downloads(args: argparse.Namespace, absent: Sequence[tuple[str, str]]) -> int:
    """Prints the plan of a dry run that would begin with downloads: what follows is not known before them.

    Args:
        args: The verb's options.
        absent: Files that would be fetched, and from where.
    """
    from milan_ray.engine.planner import DOWNLOADS, Plan, Step

    files = [Step(DOWNLOADS, (file,), f"missing: would be fetched from {url}") for file, url in dict.fromkeys(absent)]
    return show_plan(args, Plan(files, [Step("tables", (args.verb,), f"not known before: {DOWNLOADS}")]))


def close(args: argparse.Namespace, stage: str, done: Mapping[str, Sequence[str]], failed: Mapping[str, str]) -> int:
    """Tells the summary which layers are there now, and which models are not and why; returns the exit status."""
    layers = sum(map(len, done.values()))
    note(args, f"{layers} layers of {len(done)} models", layers={model: list(names) for model, names in done.items()})
    args.summary.title = stage
    args.summary.skipped |= failed
    return 1 if failed else 0
