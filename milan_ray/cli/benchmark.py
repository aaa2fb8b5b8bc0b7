"""``milan-ray benchmark``: compares the time of a stage with that of its bare computation."""

from __future__ import annotations

import argparse
from pathlib import Path

from milan_ray.benchmarks import BENCHMARKS
from milan_ray.cli import options
from milan_ray.cli.arguments import flag, integer, string
from milan_ray.cli.refusals import refuse

PHOTOGRAPHS = ("exemplars", "encode", "end-to-end", "merge", "ray-overhead", "zoo")
"""Benchmarks that read photographs."""

CAPTIONS = ("describe", "end-to-end", "tune")
"""Benchmarks whose captioner is trained on human annotations."""


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's options."""
    parser.add_argument("name", choices=BENCHMARKS, metavar="NAME", help=", ".join(BENCHMARKS))
    integer(parser, "--repeats", 3, "interleaved runs of subject and baseline")
    integer(parser, "--threads", 2, "torch threads of both")
    string(parser, "--photos", "DIR", "folder of JPEG photographs (default: generated noise)")
    string(parser, "--annotations", "DIR", "folder of human annotations (default: invented ones)")
    flag(parser, "--short", "tiny sizes, to see that it works; figures mean nothing")
    string(parser, "--json", "FILE", "write machine and figures there")
    options.common(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand; returns the exit status."""
    from milan_ray.benchmarks.harness import Options, run_benchmark

    for names, option in ((PHOTOGRAPHS, "photos"), (CAPTIONS, "annotations")):
        if args.name not in names:
            refuse(args, [option], f"in benchmark {args.name}", f"take one of {', '.join(names)}")
    photos, annotations, json = (
        None if path is None else Path(path) for path in (args.photos, args.annotations, args.json)
    )
    run_benchmark(args.name, Options(args.repeats, args.threads, args.short, photos, annotations), json)
    return 0
