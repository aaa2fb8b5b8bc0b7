"""``milan-ray report``: writes the HTML report of a storage."""

from __future__ import annotations

import argparse

from milan_ray.cli import options
from milan_ray.cli.build_configs import open_storage
from milan_ray.cli.summary import note, report_on


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's options."""
    parser.add_argument("--model", nargs="+", metavar="NAME", help="only these models")
    parser.set_defaults(no_report=False)
    parser.add_argument("--report", metavar="DIR", help="folder for the HTML report (default: report/ in the storage)")
    options.add_to(parser, options.storage, options.common)


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand; returns the exit status."""
    report_on(args, open_storage(args), args.model)
    note(args, "written")
    return 0
