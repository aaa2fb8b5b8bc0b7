"""``milan-ray effects``: what ablating and amplifying each unit does to the classes that a network tells."""

from __future__ import annotations

import argparse

from milan_ray.cli import options
from milan_ray.cli.arguments import integer, number
from milan_ray.cli.build_configs import cluster, opened
from milan_ray.cli.summary import close, report_on, show_plan
from milan_ray.config import ExemplarConfig
from milan_ray.errors import MilanError


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's options."""
    options.probe(parser, required=True)
    group = parser.add_argument_group("effects (docs/effects.md)")
    integer(group, "--images", 200, "images of the probe at most, a fixed pseudo-random choice")
    number(group, "--amplify", 2.0, "what an amplified unit is multiplied by, more than 1")
    integer(group, "--classes", 5, "classes gained, and lost, that are stored for each unit")
    options.add_to(parser, options.units, options.models, options.download, options.job)


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand; returns the exit status."""
    from milan_ray.engine.planner import Plan
    from milan_ray.engine.stage import run_stage
    from milan_ray.stages.effects import EffectConfig, Effects

    storage, models, probe = opened(args)
    config = EffectConfig(args.images, args.amplify, args.classes)
    stage = Effects(models, probe, config, ExemplarConfig(max_bad=args.max_bad), args.units)
    if args.dry_run:
        return show_plan(args, Plan.of(storage, [stage]))
    with cluster(args) as resources:
        outputs = run_stage(stage, storage, resources)
    if not outputs:
        raise MilanError("; ".join(dict.fromkeys(stage.failed.values())))
    done: dict[str, list[str]] = {}
    for output in outputs:
        done.setdefault(output.model, []).append(output.layer)
    report_on(args, storage)
    return close(args, "effects", done, stage.failed)
