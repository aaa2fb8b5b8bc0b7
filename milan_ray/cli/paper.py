"""``milan-ray paper``: runs the paper's experiments on the built-in synthetic world and checks its claims."""

from __future__ import annotations

import argparse
import os

from milan_ray.cli import options
from milan_ray.cli.arguments import flag, string, words
from milan_ray.cli.build_configs import cluster, writable_storage
from milan_ray.cli.summary import note, report_folder, report_on, show_plan
from milan_ray.config import results_dir
from milan_ray.progress import say


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's options."""
    flag(parser, "--small", "sizes of a test: minutes, and figures that mean nothing")
    string(
        parser,
        "--only",
        "NAMES",
        "only these experiments, e.g. editing,audit; the page keeps the others (default: all)",
        [],
        type=words,
    )
    options.add_to(parser, options.storage, options.report, options.resources, options.dry_run, options.common)


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand; returns the exit status."""
    from milan_ray.plugins import load_plugins
    from milan_ray.showcase.demo import DECODER
    from milan_ray.showcase.paper import EXPERIMENTS, chosen, plan_paper, prepare, run_experiments
    from milan_ray.showcase.paper.experiment_context import ExperimentContext
    from milan_ray.showcase.paper.page import stored_section, write_page
    from milan_ray.stages.captioners import about_captioner

    load_plugins()
    names = chosen(args.only)
    args.storage = args.storage or str(results_dir() / "demo")
    storage = writable_storage(args)
    if args.dry_run:
        return show_plan(args, plan_paper(storage, args.small, names))
    with cluster(args) as resources:
        context = ExperimentContext(storage, resources, args.small)
        prepare(context, max(1, (os.cpu_count() or 1) // 2 * 2))
        done = {entry.name: entry for entry in run_experiments(context, names)}
    entries = {name: done.get(name) or stored_section(storage, name) for name in EXPERIMENTS}
    folder = report_folder(args, storage)
    page = None
    if folder is not None:
        shown = [entry for entry in entries.values() if entry is not None]
        absent = [name for name, entry in entries.items() if entry is None]
        page = write_page(storage, folder, shown, absent, overview=not args.no_report)
    report_on(args, storage, notes={"About the descriptions": about_captioner(storage, DECODER)})
    claims = [claim.reproduced for entry in done.values() for claim in entry.claims]
    failed = {name: entry.error for name, entry in done.items() if entry.error}
    if page is not None:
        say(f"page: {page}")
        note(args, page=str(page))
    note(
        args,
        f"{len(claims)} claims, {claims.count(True)} reproduced in shape, {claims.count(False)} not, "
        f"{claims.count(None)} cannot be said",
        experiments=list(done),
        storage=storage.root,
    )
    args.summary.skipped |= failed
    return 1 if failed else 0
