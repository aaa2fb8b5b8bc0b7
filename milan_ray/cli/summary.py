"""Output of a subcommand at its end: the plan, the report, the summary."""

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
    from milan_ray.schema import Table
    from milan_ray.storage import Storage


@dataclass
class Summary:
    """Summary of a subcommand: a line on standard error for people, a JSON object on standard output for programs.

    Attributes:
        verb: The subcommand.
        title: Start of the closing line.
        what: The results, in words; None for no closing line.
        facts: Entries of the JSON object: files, counts, the plan of a dry run.
        skipped: Skipped item → reason.
        error: Why the subcommand failed.
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
        """Seconds since the subcommand began."""
        return time.monotonic() - self.started

    def say(self) -> None:
        """Prints the closing lines: results, duration, location, and skipped items with reasons."""
        where = f", in {self.facts['storage']}" if "storage" in self.facts else ""
        if self.error is None and self.what is not None:
            say(f"{self.title or self.verb}: {self.what} in {duration(self.seconds)}{where}")
        for name, reason in self.skipped.items():
            say(f"skipped {name}: {reason}", level="warning")

    def json(self, status: int) -> str:
        """Formats the summary as JSON: verb, status (``done``, ``partly`` or ``failed``), seconds, and other facts."""
        word = "failed" if self.error is not None else "partly" if status else "done"
        entries: dict[str, object] = {
            "verb": self.verb,
            "status": word,
            "exit": status,
            "seconds": round(self.seconds, 3),
        }
        if self.error is not None:
            entries["error"] = self.error
        elif self.what is not None:
            entries["what"] = self.what
        return json.dumps({**entries, **self.facts, "skipped": self.skipped}, ensure_ascii=False)


def duration(seconds: float) -> str:
    """Formats seconds for display: ``7 s``, ``3 min 20 s``, ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def note(args: argparse.Namespace, what: str | None = None, **facts: object) -> None:
    """Adds results to the closing summary.

    Args:
        args: The subcommand's options.
        what: The results, in words.
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
    """Writes the HTML report and prints its path, unless the user declined it or it has no local folder."""
    if args.no_report:
        return
    from milan_ray.report import write_report

    target = report_folder(args, storage)
    if target is None:
        say("report: skipped; give --report DIR to write one for a remote storage")
        return
    index = write_report(storage, target, models=models, labelers=labelers_of(storage, models), notes=notes)
    say(f"report: {index}")
    note(args, report=str(index))


def report_folder(args: argparse.Namespace, storage: Storage) -> Path | None:
    """Returns the folder of the HTML report; None if the storage is remote and ``--report`` was not given."""
    if args.report is not None:
        return Path(absolute("--report", args.report))
    return Path(storage.root) / "report" if storage.is_local else None


def labelers_of(storage: Storage, models: Sequence[str] | None) -> list[str] | None:
    """Lists the labelers of some models (or all) in the report's order, MILAN first; None if there are none."""
    from milan_ray.schema import DESCRIPTIONS

    described = storage.partitions(DESCRIPTIONS)
    labelers = {keys["labeler"] for keys in described if models is None or keys["model"] in models}
    return sorted(labelers, key=lambda labeler: (labeler != "milan", labeler)) or None


def say_distinct(args: argparse.Namespace, storage: Storage, done: Mapping[str, Sequence[str]], labeler: str) -> None:
    """Prints, and adds to the summary, how many distinct descriptions a labeler gives the units of each model.

    Args:
        args: The subcommand's options.
        storage: The run directory.
        done: Model → layers.
        labeler: The labeler.
    """
    from milan_ray.schema import DESCRIPTIONS

    distinct: dict[str, int] = {}
    every: set[str] = set()
    units = 0
    for model, layers in done.items():
        said: set[str] = set()
        for layer in layers:
            keys = {"labeler": labeler, "model": model, "layer": layer}
            if storage.metadata(DESCRIPTIONS, **keys) is not None:
                texts = storage.read(DESCRIPTIONS, ["description"], **keys)["description"]
                units += len(texts)
                said.update(texts.to_pylist())
        distinct[model] = len(said)
        every |= said
    per_model = ", ".join(f"{name} {count:,}" for name, count in sorted(distinct.items(), key=lambda item: item[1])[:5])
    fewest = f"; fewest: {per_model}" if len(distinct) > 1 else ""
    say(f"distinct descriptions ({labeler}): {len(every):,} among {units:,} units{fewest}")
    note(args, distinct=distinct)


def say_figure(storage: Storage, table: Table, **keys: str) -> None:
    """Prints where the figure of a partition is."""
    from milan_ray.report.figures import figure_path

    say(f"figure: {storage.uri(figure_path(storage, table, **keys))}")


def show_plan(args: argparse.Namespace, plan: Plan) -> int:
    """Prints a plan, or adds it to the summary of ``--json``; returns the exit status."""
    args.summary.what = None
    if args.json:
        steps = [*plan.due, *plan.later]
        planned = [{"table": step.table, "keys": step.keys, "reason": step.reason} for step in steps]
        note(args, planned=[*args.summary.facts.get("planned", ()), *planned])
        args.summary.skipped |= plan.failed
    else:
        print(plan.text())
    return 1 if plan.failed else 0


def show_downloads(args: argparse.Namespace, absent: Sequence[tuple[str, str]]) -> int:
    """Prints the plan of a dry run that starts with downloads; later steps are unknown until these are done.

    Args:
        args: The subcommand's options.
        absent: Files that would be downloaded, and their URLs.
    """
    from milan_ray.engine.planner import DOWNLOADS, Plan, Step

    files = [Step(DOWNLOADS, (file,), f"missing: would be fetched from {url}") for file, url in dict.fromkeys(absent)]
    return show_plan(args, Plan(files, [Step("tables", (args.verb,), f"not known before: {DOWNLOADS}")]))


def close(args: argparse.Namespace, stage: str, done: Mapping[str, Sequence[str]], failed: Mapping[str, str]) -> int:
    """Adds the finished layers, and the failed models with reasons, to the summary; returns the exit status."""
    layers = sum(map(len, done.values()))
    note(args, f"{layers} layers of {len(done)} models", layers={model: list(names) for model, names in done.items()})
    args.summary.title = stage
    args.summary.skipped |= failed
    return 1 if failed else 0
