"""``milan-ray edit``: networks without the units that are described by some words."""

from __future__ import annotations

import argparse
from pathlib import Path

from milan_ray.cli import options
from milan_ray.cli.closing import report_on
from milan_ray.cli.records import absolute, model_requests, open_storage, probe_request, resources_of
from milan_ray.errors import MilanError
from milan_ray.progress import say


def add(parser: argparse.ArgumentParser) -> None:
    """Gives the verb its options."""
    options.models(parser)
    options.probe(parser, required=True)
    group = parser.add_argument_group("editing; --probe gives the validation images, which are like those of training")
    group.add_argument(
        "--test", nargs="+", metavar="SOURCE", help="images that judge: those that the network should not fail on"
    )
    group.add_argument("--labeler", default="milan", help="whose descriptions of the units to read")
    group.add_argument(
        "--words",
        nargs="+",
        metavar="WORD",
        help="what unwanted units' descriptions contain (default: text word letter)",
    )
    group.add_argument("--most", type=options.positive, default=50, metavar="N", help="units removed at most")
    group.add_argument("--trials", type=options.positive, default=5, help="random orders beside the others")
    group.add_argument("--seed", type=int, default=0, help="of the random orders")
    group.add_argument(
        "--remove", type=options.positive, metavar="N", help="units to remove (default: by validation accuracy)"
    )
    group.add_argument(
        "--out", metavar="FILE", help="write the network's weights without these units, .pth or .safetensors"
    )
    options.add_to(
        parser, options.download, options.storage, options.report, options.plugins, options.resources, options.common
    )


def run(args: argparse.Namespace) -> int:
    """Does the verb's work; returns the exit status."""
    from milan_ray.experiments.editing import TEXT
    from milan_ray.models.weights import save_weights
    from milan_ray.pipelines.analyze import figure_path
    from milan_ray.pipelines.cluster import connected
    from milan_ray.pipelines.edit import EditingConfig, edited_weights, run_editing, summary

    storage, models, validation = open_storage(args), model_requests(args), probe_request(args)
    if len(models) > 1:
        raise MilanError("a network is edited at a time: give a single --model.")
    storage.check_writable()
    test = None
    if args.test is not None:
        args.probe = args.test
        test = probe_request(args)
    config = EditingConfig(args.labeler, tuple(args.words or TEXT), args.most, args.trials, args.seed)
    with connected(resources_of(args)):
        found = run_editing(storage, models[0], validation, test, config, resources_of(args))
    say(summary(found))
    public = {"experiment": "editing", "model": models[0].name}
    say(f"figure: {storage.uri(figure_path(storage, public, 'svg'))}")
    if args.out is not None:
        path = Path(absolute("--out", args.out))
        save_weights(edited_weights(models[0], found.removed(args.remove or found.stop), validation), path)
        say(f"edited weights: {path}")
    report_on(args, storage, [models[0].name])
    return 0
