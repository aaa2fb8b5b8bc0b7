"""``milan-ray export``: exports a captioner as a checkpoint of the reference implementation."""

from __future__ import annotations

import argparse
from dataclasses import replace

from milan_ray.cli import options
from milan_ray.cli.arguments import string
from milan_ray.cli.build_configs import absolute, encoder_ref, find_captioner, open_storage
from milan_ray.cli.summary import note


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's options."""
    string(parser, "out", "FILE", "checkpoint to write, e.g. milan-mine.pth")
    options.add_to(parser, options.captioner, options.download, options.storage, options.plugins, options.common)


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand; returns the exit status."""
    from milan_ray.captioner.checkpoints import export_reference
    from milan_ray.plugins import load_plugins
    from milan_ray.stages.captioners import load_captioner

    load_plugins(args.plugin)
    storage = open_storage(args)
    decoder = find_captioner(args, storage)
    captioner = load_captioner(storage, decoder)
    if captioner.encoder_state is None or args.encoder_weights is not None:
        encoder = encoder_ref(args, captioner.encoder_name, storage, decoder).load()
        captioner = replace(captioner, encoder_state=encoder.backbone.state_dict())
    export_reference(captioner, absolute("FILE", args.out))
    note(args, f"{args.out}, a checkpoint that MILAN's reference implementation loads,", file=args.out)
    return 0
