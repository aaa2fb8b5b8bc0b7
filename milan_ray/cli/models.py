"""``milan-ray models``: models that are registered, and their layers."""

from __future__ import annotations

import argparse
import fnmatch
from collections.abc import Sequence

from milan_ray.cli import options


def add(parser: argparse.ArgumentParser) -> None:
    """Gives the verb its options."""
    parser.add_argument(
        "name",
        nargs="?",
        help="a model whose layers to list, with shapes and unit counts, or a pattern ('*/places365')",
    )
    parser.add_argument("--weights", metavar="WEIGHTS", help="weights of that model: a file, a name or a URL")
    options.add_to(parser, options.plugins, options.common)


def run(args: argparse.Namespace) -> int:
    """Does the verb's work; returns the exit status."""
    from milan_ray.models.describe import layer_table
    from milan_ray.models.registry import get_model, model_names
    from milan_ray.models.resolve import resolve_model
    from milan_ray.plugins import load_plugins

    load_plugins(args.plugin)
    if args.name is None or set(args.name) & set("*?["):
        _print_models(fnmatch.filter(model_names(), args.name or "*"), args.name is None)
        return 0
    spec = resolve_model(args.name, args.weights) if args.weights else get_model(args.name)
    print(f"{'layer':40} {'module':24} {'shape':20} {'units':>6}  default")
    for layer in layer_table(spec):
        shape = "×".join(map(str, layer.shape)) if layer.shape else "-"
        units = layer.units if layer.units is not None else "-"
        print(f"{layer.path:40} {layer.kind:24} {shape:20} {units:>6}  {'*' if layer.default else ''}")
    return 0


def _print_models(names: Sequence[str], families: bool) -> None:
    """Lists models: how many layers are dissected by default, and which published weights lie here."""
    from milan_ray.models.registry import family_names, get_model

    for name in names:
        spec = get_model(name)
        here = [version for version, file in spec.published.items() if file.is_here()]
        state = f"here: {', '.join(here)}" if here else "absent" if spec.published else "its own"
        print(f"{name:40} {len(spec.layers):>3} layers   weights {state}")
    if families:
        for prefix, about in family_names().items():
            print(f"{prefix + '/…':40} {about}")
