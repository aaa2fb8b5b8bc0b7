"""``milan-ray status``: what a storage holds."""

from __future__ import annotations

import argparse

from milan_ray.cli import options
from milan_ray.cli.records import open_storage


def add(parser: argparse.ArgumentParser) -> None:
    """Gives the verb its options."""
    options.storage(parser)
    options.common(parser, json="print JSON")


def run(args: argparse.Namespace) -> int:
    """Does the verb's work; returns the exit status."""
    from milan_ray.pipelines.status import status

    found = status(open_storage(args))
    print(found.json() if args.json else found.text())
    return 0
