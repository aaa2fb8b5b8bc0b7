"""``milan-ray plan``: estimates the cost of a large run from a short measured sample."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import TYPE_CHECKING

from milan_ray.cli import options
from milan_ray.cli.arguments import integer, number, strings
from milan_ray.cli.build_configs import (
    encoder_ref,
    exemplar_config,
    find_captioner,
    model_names,
    model_ref,
    open_storage,
    probe_ref,
    resolved,
    resources_of,
)
from milan_ray.cli.refusals import refuse
from milan_ray.errors import MilanError
from milan_ray.progress import say

if TYPE_CHECKING:
    from milan_ray.engine.references import ModelRef

SAMPLE = 48


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's options."""
    group = parser.add_argument_group("the run")
    integer(group, "--images", None, "probe images (default: all of --probe)")
    integer(group, "--copies", 1, "so many models, and their units, like each of those given")
    number(group, "--price", None, "price of one actor's hour, in any currency (default: none is said)")
    integer(group, "--sample", SAMPLE, "images that are measured, of the probe")
    number(
        group, "--speed-up", 1.0, "speed of forward and encoder passes on the actors, as a multiple of this machine's"
    )
    strings(
        group, "--probe", "SOURCE", "folders, Parquet, Arrow or tar files, URIs, a registered probe (default: noise)"
    )
    options.columns(group)
    parser.set_defaults(labels=None, reference_quirks=False, max_bad=options.EXEMPLARS.max_bad)
    options.add_to(parser, options.models, options.exemplars)
    options.captioner(parser, required=False)
    options.add_to(parser, options.download, options.storage, options.plugins, options.resources)
    options.common(parser, json="print JSON")


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand; returns the exit status."""
    from milan_ray.benchmarks.sample import measure, note
    from milan_ray.engine.cluster import sized_for
    from milan_ray.engine.costs import Wanted, estimate, faster, text
    from milan_ray.plugins import load_plugins
    from milan_ray.stages.captioners import load_captioner
    from milan_ray.stages.descriptions import Search

    load_plugins(args.plugin)
    if args.probe is None and args.images is None:
        raise MilanError("how many images: give --images N, or --probe, whose images are counted.")
    refuse(args, ["address"], "the sample is measured on this machine, where", "measure where it is to run")
    if args.decoder is None and args.milan is None:
        refuse(args, ["encoder_weights"], "without --decoder or --milan", "give one of these too")
    if args.speed_up <= 0:
        raise MilanError(f"--speed-up is {args.speed_up:g}: give a number above 0.")
    config, resources = exemplar_config(args), resources_of(args)
    probe = None if args.probe is None else probe_ref(args)
    search = encoder = None
    if args.decoder is not None or args.milan is not None:
        storage = open_storage(args)
        search = Search(find_captioner(args, storage))
        encoder = encoder_ref(args, load_captioner(storage, search.decoder).encoder_name, storage, search.decoder)
    here = replace(resources, address="local", actors=None)  # the sample runs on this machine, with one actor
    sample, total, failed = measure(_models(args), probe, config, here, args.sample, search, encoder)
    note(failed)
    images = args.images or total
    assert images is not None  # one of the two options was given
    wanted = Wanted(
        images=images,
        copies=args.copies,
        k=config.k,
        quantile=config.quantile,
        samples=config.samples,
        map_budget=config.map_budget,
        shard_size=sized_for(resources, config, images).shard(images),
        actors=args.actors or 1,
        pooled=config.pooled,
        price=args.price,
    )
    sample = faster(sample, args.speed_up)
    estimated = estimate(sample, wanted)
    print(json.dumps(estimated.record(), indent=1, ensure_ascii=False) if args.json else text(estimated, sample))
    return 1 if failed else 0


def _models(args: argparse.Namespace) -> list[ModelRef]:
    """Resolves the requested models. Models without local weights are measured untrained, which takes as long."""
    from milan_ray.models.registry import RANDOM

    refs = []
    for name in model_names(args):
        weights = args.weights
        try:
            weights = resolved(args, name, weights).weights
        except MilanError:
            if weights is not None:
                raise
            weights = RANDOM
            say(f"{name}: its weights are not here; measured with random ones: as long, other masks")
        refs.append(model_ref(args, name, weights))
    return refs
