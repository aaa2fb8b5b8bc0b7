"""``milan-ray status``: lists the contents of a storage."""

from __future__ import annotations

import argparse

from milan_ray.cli import options
from milan_ray.cli.arguments import flag
from milan_ray.cli.build_configs import open_storage


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's options."""
    options.storage(parser)
    flag(parser, "--verify", "read every table, so that damage behind an intact footer is found, too")
    options.common(parser, json="print JSON")


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand; returns the exit status."""
    from milan_ray.engine.status import status

    contents = status(open_storage(args), args.verify)
    print(contents.json() if args.json else contents.text())
    return 0
