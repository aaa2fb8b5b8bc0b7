"""``milan-ray benchmark``: compares the time of a stage with that of its bare computation."""

from __future__ import annotations

import argparse
from pathlib import Path

from milan_ray.benchmarks import BENCHMARKS
from milan_ray.cli import options
from milan_ray.cli.refusals import refuse

PHOTOGRAPHS = ("exemplars", "encode", "end-to-end", "merge", "ray-overhead")
"""Benchmarks that read photographs."""

CAPTIONS = ("describe", "end-to-end", "tune")
"""Benchmarks whose captioner is trained on human annotations."""


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's options."""
    parser.add_argument("name", choices=BENCHMARKS, metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--repeats", type=options.positive, default=3, help="interleaved runs of subject and baseline")
    parser.add_argument("--threads", type=options.positive, default=2, help="torch threads of both")
    parser.add_argument("--photos", metavar="DIR", help="folder of JPEG photographs (default: generated noise)")
    parser.add_argument("--annotations", metavar="DIR", help="folder of human annotations (default: invented ones)")
    parser.add_argument("--short", action="store_true", help="tiny sizes, to see that it works; figures mean nothing")
    parser.add_argument("--json", metavar="FILE", help="write machine and figures there")
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
