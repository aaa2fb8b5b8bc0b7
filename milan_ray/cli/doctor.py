"""``milan-ray doctor``: reports what is installed and what is missing, what works without it, and how to get it."""

from __future__ import annotations

import argparse

from milan_ray.cli import options
from milan_ray.cli.arguments import flag
from milan_ray.cli.build_configs import open_storage, resources_of
from milan_ray.cli.refusals import refuse


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's options."""
    flag(parser, "--no-ray", "do not start or join Ray, which takes some seconds")
    options.add_to(parser, options.storage, options.plugins, options.resources)
    options.common(parser, json="print JSON")


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand; returns the exit status: 1 if something essential is missing."""
    from milan_ray.doctor import diagnose
    from milan_ray.plugins import load_plugins

    load_plugins(args.plugin)
    refuse(args, ["actors", "cpus_per_actor", "gpus_per_actor"], "where no work is done", "ask jobs.plan")
    if args.no_ray:
        refuse(args, ["address"], "with --no-ray", "leave out --no-ray")
    diagnosis = diagnose(open_storage(args), resources_of(args), start_ray=not args.no_ray)
    print(diagnosis.json() if args.json else diagnosis.text())
    return 0 if diagnosis.ok else 1
