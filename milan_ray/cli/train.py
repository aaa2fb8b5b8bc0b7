"""``milan-ray train``: trains captioners on annotated units."""

from __future__ import annotations

import argparse
from dataclasses import replace

from milan_ray.cli import options
from milan_ray.cli.arguments import choice, flag, fraction, gib, integer, name, string, strings
from milan_ray.cli.build_configs import annotated_layers, cluster, encoder_ref, open_storage, read_text, resources_of
from milan_ray.cli.summary import note, show_plan
from milan_ray.config import STOP_BY, TrainingConfig
from milan_ray.errors import MilanError
from milan_ray.names import checked_name


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's options."""
    string(
        parser,
        "--name",
        "NAME",
        "name of the captioner in the storage (default: the group's, else the source's)",
        type=name,
    )
    string(parser, "--annotations", "SOURCE", "source of the annotations to train on", "milannotations")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--group", "--groups", nargs="+", metavar="GROUP",
        help="a captioner each: base, cls, gen, imagenet, places365, alexnet, resnet152, biggan, not-MODEL-DATASET, "
        "the same of the built-in world (world-base, …), an annotated model, NAME=MODEL,MODEL for your own, or all",
    )  # fmt: skip
    strings(which, "--model", "NAME", "only annotated units of these models (default: all)")
    string(
        parser,
        "--setting",
        "FILE",
        "learning rate, sizes, dropout, regulariser and encoder of the decoder, as jobs.tune chose them; the "
        "language model keeps the options below",
    )
    string(parser, "--encoder", "NAME", "image encoder (default: the setting's, else resnet101)")
    string(parser, "--encoder-weights", "FILE", "weights file of the encoder (default: its own)")
    fitting(parser)
    options.add_to(parser, options.download, options.quirks, options.stages)


def fitting(parser: argparse.ArgumentParser) -> None:
    """Adds options for the training of captioners: sizes, epochs, workers."""
    config = TrainingConfig()
    integer(parser, "--epochs", config.max_epochs, "epochs at most, of each model")
    integer(parser, "--patience", config.patience, "epochs without improvement forgiven", least=0)
    fraction(parser, "--hold-out", config.hold_out, "share of units held out to stop early, at least one unit")
    choice(parser, "--stop-by", STOP_BY, "what of held-out units chooses the decoder's epoch", config.stop_by)
    integer(parser, "--hidden", 512, "LSTM state, units")
    integer(parser, "--embedding", 128, "token embedding, units")
    flag(parser, "--bf16", "compute in bfloat16 where that is safe")
    integer(parser, "--seed", config.seed, "seed of weights, dropout and order", least=0)
    integer(parser, "--workers", 1, "data-parallel training workers of each captioner")
    about = "GiB of features a worker keeps in memory; more are read from disk as needed"
    string(parser, "--memory-limit", "GIB", about, "2", type=gib)


def training_config(args: argparse.Namespace) -> TrainingConfig:
    """Converts the options of :func:`fitting` to :class:`TrainingConfig`."""
    return TrainingConfig(
        max_epochs=args.epochs,
        patience=args.patience,
        hold_out=args.hold_out,
        seed=args.seed,
        bf16=args.bf16,
        keep_last_weights=args.reference_quirks,
        stop_by=args.stop_by,
    )


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand; returns the exit status."""
    from milan_ray.annotations.groups import training_groups
    from milan_ray.captioner.fit import Sizes
    from milan_ray.engine.cluster import gpus_each
    from milan_ray.engine.planner import Plan
    from milan_ray.engine.stage import run_stage
    from milan_ray.plugins import load_plugins
    from milan_ray.stages.decoder_space import DecoderSetting, read_decoder_setting
    from milan_ray.stages.encodings import Encodings
    from milan_ray.stages.training import Training, TrainingJob, run_trainings

    load_plugins(args.plugin)  # plug-ins may register groups
    storage, resources = open_storage(args), resources_of(args)
    annotated = annotated_layers(storage, args.annotations, args.model)
    if args.group:
        groups = training_groups(args.group, annotated)
        if args.name and len(groups) > 1:
            raise MilanError(f"--name is for one captioner, and these are {len(groups)} groups: leave it out.")
        names = {args.name or group: models for group, models in groups.items()}
    else:
        names = {args.name or checked_name("the captioner", args.annotations): tuple(annotated)}
    setting = None
    if args.setting:
        setting = read_decoder_setting(read_text("--setting", args.setting), args.setting)
        setting = replace(setting, encoder=args.encoder or setting.encoder)
    encoder = encoder_ref(args, args.encoder or (setting or DecoderSetting()).encoder)
    config = training_config(args)
    jobs = [
        TrainingJob(
            name,
            args.annotations,
            tuple((model, layer) for model in models for layer in annotated[model]),
            encoder,
            config,
            Sizes(args.embedding, args.hidden),
            args.workers,
            resources.cpus_per_actor,
            threads=resources.threads,
            memory_limit=args.memory_limit,
            decoder=setting,
        )
        for name, models in names.items()
    ]
    if args.dry_run:
        plans = (
            Plan.of(storage, [Encodings({model: annotated[model] for model in models}, encoder), Training(job)])
            for job, models in zip(jobs, names.values(), strict=True)
        )
        return max(show_plan(args, plan) for plan in plans)
    with cluster(args):
        wanted = {model: annotated[model] for models in names.values() for model in models}
        run_stage(Encodings(wanted, encoder), storage, resources)
        run_trainings(storage, [replace(job, gpus=gpus_each(resources)) for job in jobs])
    note(args, f"captioner{'s' * (len(names) > 1)} {', '.join(names)}", captioners=list(names))
    return 0
