"""``milan-ray report``: writes the HTML report of a storage."""

from __future__ import annotations

import argparse

from milan_ray.cli import options
from milan_ray.cli.arguments import string, strings
from milan_ray.cli.build_configs import open_storage
from milan_ray.cli.summary import note, report_on


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's options."""
    strings(parser, "--model", "NAME", "only these models")
    parser.set_defaults(no_report=False)
    string(parser, "--report", "DIR", "folder for the HTML report (default: report/ in the storage)")
    options.add_to(parser, options.storage, options.common)


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand; returns the exit status."""
    report_on(args, open_storage(args), args.model)
    note(args, "written")
    return 0
