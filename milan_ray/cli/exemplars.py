"""``milan-ray exemplars``: every unit's exemplars and masks."""

from __future__ import annotations

import argparse

from milan_ray.cli import options
from milan_ray.cli.build_configs import exemplar_config, opened, resources_of
from milan_ray.cli.summary import close, report_on, show_plan


def add(parser: argparse.ArgumentParser) -> None:
    """Gives the verb its options."""
    options.probe(parser, required=True)
    options.dissection(parser)


def run(args: argparse.Namespace) -> int:
    """Does the verb's work; returns the exit status."""
    from milan_ray.engine.cluster import connected
    from milan_ray.engine.planner import Plan
    from milan_ray.stages.exemplars import run_exemplars
    from milan_ray.stages.plan import plan_exemplars

    storage, models, probe = opened(args)
    resources, config = resources_of(args), exemplar_config(args)
    if args.dry_run:
        plan = Plan()
        plan_exemplars(storage, plan, models, probe, config)
        return show_plan(args, plan)
    with connected(resources):
        done = run_exemplars(storage, models, probe, config, resources)
    report_on(args, storage, list(done.models))
    return close(args, "exemplars", done.models, done.failed)
