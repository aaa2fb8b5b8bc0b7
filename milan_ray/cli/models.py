"""``milan-ray models``: lists registered models and their layers."""

from __future__ import annotations

import argparse
import fnmatch
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from milan_ray.cli import options
from milan_ray.cli.arguments import choice, flag, integer, string
from milan_ray.cli.refusals import refuse
from milan_ray.errors import MilanError


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's options."""
    parser.add_argument(
        "name",
        nargs="?",
        help="a model whose layers to list, with shapes and unit counts, or a pattern ('*/places365')",
    )
    string(parser, "--weights", "WEIGHTS", "weights of that model: a file, a name or a URL")
    group = parser.add_argument_group("conformance")
    flag(
        group, "--conformance", "compare maps of layers with those of torchvision, timm, transformers, family by family"
    )
    string(group, "--families", "PATTERN", "only these families ('swin*')", "*")
    choice(group, "--library", ("torchvision", "timm", "transformers"), "only this library's")
    integer(
        group, "--side", None, "side of the images in pixels, for networks that take any (default: own, at most 256)"
    )
    group.add_argument(
        "--earlier",
        metavar="FILE",
        action="append",
        default=[],
        help="what an earlier run printed with --json: its families are not run again, but stand in the table; "
        "may be given several times",
    )
    string(group, "--out", "FILE", "write the table as Markdown")
    options.plugins(parser)
    options.common(parser, json="print JSON, an object per model or layer and line")


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand; returns the exit status."""
    from milan_ray.models.describe import layer_table
    from milan_ray.models.registry import get_model, model_names
    from milan_ray.models.resolve import resolve_model
    from milan_ray.plugins import load_plugins

    load_plugins(args.plugin)
    if args.conformance:
        return _conformance(args)
    if args.families != "*" or args.library or args.side or args.out or args.earlier:
        raise MilanError("--families, --library, --side, --earlier and --out belong to --conformance: give that too.")
    if args.name is None or set(args.name) & set("*?["):
        refuse(args, ["weights"], "without the name of one model", "name it")
        names = fnmatch.filter(model_names(), args.name or "*")
        if args.json:
            _print_json(map(_model, names))
        else:
            _print_models(names, args.name is None)
        return 0
    spec = resolve_model(args.name, args.weights) if args.weights else get_model(args.name)
    if args.json:
        _print_json(map(asdict, layer_table(spec)))
        return 0
    print(f"{'layer':40} {'module':24} {'shape':20} {'units':>6}  default  reading")
    for layer in layer_table(spec):
        shape = "×".join(map(str, layer.shape)) if layer.shape else "-"
        units = layer.units if layer.units is not None else "-"
        row = (
            f"{layer.path:40} {layer.kind:24} {shape:20} {units:>6}  {'*' if layer.default else '':7}  {layer.reading}"
        )
        print(row.rstrip())
    return 0


def _conformance(args: argparse.Namespace) -> int:
    """Checks the conformance of families one by one; the exit status is 1 if one is wrong."""
    from milan_ray.benchmarks.conformance import check, page, read_rows, summary, to_row
    from milan_ray.benchmarks.conformance_cases import cases

    if args.name is not None:
        raise MilanError(f"--conformance takes no model's name ({args.name}): choose families with --families.")
    earlier = [result for file in args.earlier for result in read_rows(Path(file))]
    known = {(result.library, result.family): result for result in earlier}
    results = []
    for case in cases(args.library, args.families, args.side):
        result = known.get((case.library, case.family)) or check(case)
        results.append(result)
        if args.json:
            print(json.dumps(to_row(result), ensure_ascii=False), flush=True)
        else:
            print(f"{case.library:13} {case.family:40} {result.verdict}", flush=True)
    if not results:
        raise MilanError(f"no family is called {args.families!r}: `python -m jobs.models --conformance` runs them all.")
    if not args.json:
        print(summary(results))
    if args.out:
        Path(args.out).write_text(page(results), encoding="utf-8")
    return int(any(result.wrong for result in results))


def _model(name: str) -> dict[str, Any]:
    """Describes a model: its default layers, the names of its published weights, and those available locally."""
    from milan_ray.models.registry import get_model

    spec = get_model(name)
    here = [version for version, file in spec.published.items() if file.is_here()]
    return {"name": name, "layers": list(spec.layers), "published": list(spec.published), "here": here}


def _print_json(rows: Iterable[Mapping[str, Any]]) -> None:
    for row in rows:
        print(json.dumps(row, ensure_ascii=False))


def _print_models(names: Sequence[str], families: bool) -> None:
    """Lists models, with the number of layers dissected by default and the published weights available locally."""
    from milan_ray.models.registry import family_names

    for model in map(_model, names):
        here, absent = ", ".join(model["here"]), "absent" if model["published"] else "its own"
        print(f"{model['name']:40} {len(model['layers']):>3} layers   weights {f'here: {here}' if here else absent}")
    if families:
        for prefix, about in family_names().items():
            print(f"{prefix + '/…':40} {about}")
