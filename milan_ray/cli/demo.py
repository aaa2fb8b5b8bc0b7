"""``milan-ray demo``: runs all stages on the built-in synthetic world, or on a folder of photographs."""

from __future__ import annotations

import argparse
import os

from milan_ray.cli import options
from milan_ray.cli.arguments import flag, string
from milan_ray.cli.build_configs import absolute, cluster, writable_storage
from milan_ray.cli.refusals import refuse
from milan_ray.cli.summary import note, report_on, show_plan
from milan_ray.config import results_dir
from milan_ray.progress import say


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's options."""
    string(
        parser,
        "--photos",
        "DIR",
        "dissect a real network over the photographs of a folder instead (needs pip install 'milan-ray[photos]')",
    )
    flag(parser, "--generator", "dissect the world's image generator too (2 minutes)")
    flag(parser, "--superposed", "dissect the world's network in superposition too (2 minutes)")
    flag(parser, "--clip", "re-rank by a small CLIP trained on the world, too (4 minutes)")
    flag(parser, "--groups", "train a captioner on each of the paper's 14 groups, played by the world's networks, too")
    options.add_to(parser, options.storage, options.report, options.resources, options.dry_run, options.common)


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand; returns the exit status."""
    from milan_ray.plugins import load_plugins
    from milan_ray.schema import DESCRIPTIONS
    from milan_ray.showcase.demo import DECODER, plan_demo, run_demo, run_generator, run_groups, run_superposed, summary
    from milan_ray.stages.captioners import about_captioner

    load_plugins()
    if args.photos is not None:
        return _run_photographs(args)
    args.storage = args.storage or str(results_dir() / "demo")
    storage = writable_storage(args)
    if args.dry_run:
        return show_plan(args, plan_demo(storage, args.clip, args.generator, args.groups, args.superposed))
    say(f"the built-in world, end to end, into {storage.root}")
    with cluster(args) as resources:
        scores = run_demo(storage, resources, max(1, (os.cpu_count() or 1) // 2 * 2), args.clip)
        if args.generator:
            run_generator(storage, resources)
        if args.superposed:
            run_superposed(storage, resources)
        if args.groups:
            run_groups(storage, resources)
    report_on(args, storage, notes={"About the descriptions": about_captioner(storage, DECODER)})
    layers = storage.partitions(DESCRIPTIONS, labeler="milan")
    units = sum(len(storage.read(DESCRIPTIONS, ["unit"], **keys)) for keys in layers)
    networks = len({keys["model"] for keys in layers})
    say(f"\n{units} units of {networks} networks described. Compared with trivial baselines:")
    say(summary(scores))
    say(f"tables: {storage.uri('descriptions')}/**/*.parquet; the others are in the same folder")
    note(args, f"{units} units described", units=units, networks=networks)
    return 0


def _run_photographs(args: argparse.Namespace) -> int:
    """Runs the demo on photographs; returns the exit status."""
    from milan_ray.engine.references import ProbeRef
    from milan_ray.showcase.photographs import CAVEAT, plan_photographs, run_photographs, summary

    refuse(args, ["generator", "superposed", "clip", "groups"], "with --photos", "leave out --photos")
    source = ProbeRef((absolute("--photos", args.photos),))
    args.storage = args.storage or str(results_dir() / "photos")
    storage = writable_storage(args)
    if args.dry_run:
        return show_plan(args, plan_photographs(storage, source))
    say(f"a real network over the photographs in {args.photos}, into {storage.root}")
    with cluster(args) as resources:
        made = run_photographs(storage, source, resources)
    say(f"\n{made.units} units labelled, {made.labels} labels. On photographs that did not make the labels:")
    say(summary(made))
    report_on(args, storage, list(made.layers), notes={"About the labels": CAVEAT})
    note(args, f"{made.units} units labelled", units=made.units, labels=made.labels)
    return 0
