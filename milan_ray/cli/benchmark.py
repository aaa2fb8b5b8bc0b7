"""``milan-ray benchmark``: compares the time of a stage with that of its bare computation."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from milan_ray.benchmarks import BENCHMARKS
from milan_ray.cli import options
from milan_ray.cli.arguments import amount, device, flag, integer, number, string
from milan_ray.cli.refusals import refuse

PHOTOGRAPHS = ("effects", "exemplars", "encode", "end-to-end", "gpu", "merge", "ray-overhead", "versions", "zoo")
"""Benchmarks that read photographs."""

CAPTIONS = ("describe", "end-to-end", "tune", "versions")
"""Benchmarks whose captioner is trained on human annotations."""

SCALED = ("scale",)
"""Benchmarks of a job of any size."""

PAIRED = ("versions",)
"""Benchmarks that compare two versions of the package."""

ON_A_GPU = ("gpu",)
"""Benchmarks that measure one device within a given time."""


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's options."""
    parser.add_argument("name", choices=BENCHMARKS, metavar="NAME", help=", ".join(BENCHMARKS))
    integer(parser, "--repeats", 3, "interleaved runs of subject and baseline")
    integer(parser, "--threads", None, "torch threads of both (default: 2; benchmark gpu: all cores)")
    string(parser, "--photos", "DIR", "folder of JPEG photographs (default: generated noise)")
    string(parser, "--annotations", "DIR", "folder of human annotations (default: invented ones)")
    flag(parser, "--short", "tiny sizes, to see that it works; figures mean nothing")
    string(parser, "--device", "DEVICE", "device that benchmark gpu measures; cpu tries it", "cuda", type=device)
    number(parser, "--minutes", 8, "minutes that benchmark gpu may take", amount)
    string(parser, "--out", "DIR", "folder for gpu.json and gpu.md, written after each part of benchmark gpu")
    integer(parser, "--images", None, "images of the job of benchmark scale (default: 1,281,167)")
    integer(parser, "--models", None, "models of the job of benchmark scale (default: 24)")
    string(parser, "--against", "DIR", "checkout of the version that benchmark versions compares with")
    string(parser, "--json", "FILE", "write machine and figures there")
    options.common(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand; returns the exit status."""
    from milan_ray.benchmarks.harness import Options, run_benchmark

    needs = {"photos": PHOTOGRAPHS, "annotations": CAPTIONS, **dict.fromkeys(("device", "minutes", "out"), ON_A_GPU)}
    needs |= {**dict.fromkeys(("images", "models"), SCALED), "against": PAIRED}
    for option, names in needs.items():
        if args.name not in names:
            refuse(args, [option], f"in benchmark {args.name}", f"take one of {', '.join(names)}")
    photos, annotations, out, against, json = (
        None if path is None else Path(path)
        for path in (args.photos, args.annotations, args.out, args.against, args.json)
    )
    threads = args.threads or ((os.cpu_count() or 1) if args.name in ON_A_GPU else 2)
    about = (
        args.repeats,
        threads,
        args.short,
        photos,
        annotations,
        args.device,
        args.minutes,
        out,
        args.images,
        args.models,
        against,
    )
    run_benchmark(args.name, Options(*about), json)
    return 0
