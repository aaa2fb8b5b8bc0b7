"""``milan-ray exemplars``: computes every unit's exemplars and masks."""

from __future__ import annotations

import argparse

from milan_ray.cli import options
from milan_ray.cli.build_configs import cluster, exemplar_config, opened
from milan_ray.cli.summary import close, report_on, show_plan


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's options."""
    options.probe(parser, required=True)
    options.dissection(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand; returns the exit status."""
    from milan_ray.engine.planner import Plan
    from milan_ray.stages.exemplars import Exemplars

    storage, models, probe = opened(args)
    exemplars = Exemplars(models, probe, exemplar_config(args))
    if args.dry_run:
        return show_plan(args, Plan.of(storage, [exemplars]))
    with cluster(args) as resources:
        done = exemplars.run(storage, resources)
    report_on(args, storage, list(done.models))
    return close(args, "exemplars", done.models, done.failed)
