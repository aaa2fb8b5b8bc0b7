"""``milan-ray status``: what a storage holds."""

from __future__ import annotations

import argparse

from milan_ray.cli import options
from milan_ray.cli.build_configs import open_storage


def add(parser: argparse.ArgumentParser) -> None:
    """Gives the verb its options."""
    options.storage(parser)
    parser.add_argument(
        "--verify", action="store_true", help="read every table, so that damage behind an intact footer is found, too"
    )
    options.common(parser, json="print JSON")


def run(args: argparse.Namespace) -> int:
    """Does the verb's work; returns the exit status."""
    from milan_ray.engine.status import status

    found = status(open_storage(args), args.verify)
    print(found.json() if args.json else found.text())
    return 0
