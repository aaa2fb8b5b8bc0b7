"""``milan-ray train``: trains captioners on annotated units."""

from __future__ import annotations

import argparse
from dataclasses import replace

from milan_ray.cli import options
from milan_ray.cli.build_configs import annotated_layers, encoder_ref, open_storage, read_text, resources_of
from milan_ray.cli.summary import note, show_plan
from milan_ray.config import TrainingConfig
from milan_ray.errors import MilanError


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's options."""
    parser.add_argument("--name", type=options.name, help="name of the captioner in the storage (default: the group's)")
    parser.add_argument(
        "--annotations", default="milannotations", metavar="SOURCE", help="source of the annotations to train on"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--group", "--groups", nargs="+", metavar="GROUP",
        help="a captioner each: base, cls, gen, imagenet, places365, alexnet, resnet152, biggan, not-MODEL-DATASET, "
        "the same of the built-in world (world-base, …), an annotated model, NAME=MODEL,MODEL for your own, or all",
    )  # fmt: skip
    which.add_argument("--model", nargs="+", metavar="NAME", help="only annotated units of these models (default: all)")
    parser.add_argument(
        "--setting", metavar="FILE",
        help="learning rate, sizes, dropout, regulariser and encoder of the decoder, as jobs.tune chose them; the "
        "language model keeps the options below",
    )  # fmt: skip
    parser.add_argument("--encoder", help="image encoder (default: the setting's, else resnet101)")
    parser.add_argument("--encoder-weights", metavar="FILE", help="weights file of the encoder (default: its own)")
    fitting(parser)
    options.add_to(
        parser,
        options.download,
        options.quirks,
        options.storage,
        options.plugins,
        options.resources,
        options.dry_run,
        options.common,
    )


def fitting(parser: argparse.ArgumentParser) -> None:
    """Adds options for the training of captioners: sizes, epochs, workers."""
    config = TrainingConfig()
    parser.add_argument(
        "--epochs", type=options.positive, default=config.max_epochs, help="epochs at most, of each model"
    )
    parser.add_argument(
        "--patience", type=options.count, default=config.patience, help="epochs without improvement forgiven"
    )
    parser.add_argument(
        "--hold-out",
        type=options.share,
        default=config.hold_out,
        help="share of units held out to stop early, at least one unit",
    )
    parser.add_argument("--hidden", type=options.positive, default=512, help="LSTM state, units")
    parser.add_argument("--embedding", type=options.positive, default=128, help="token embedding, units")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16 where that is safe")
    parser.add_argument("--seed", type=options.count, default=config.seed, help="seed of weights, dropout and order")
    parser.add_argument(
        "--workers", type=options.positive, default=1, help="data-parallel training workers of each captioner"
    )
    parser.add_argument(
        "--memory-limit", type=options.gib, default="2", metavar="GIB",
        help="GiB of features a worker keeps in memory; more are read from disk as needed",
    )  # fmt: skip


def training_config(args: argparse.Namespace) -> TrainingConfig:
    """Converts the options of :func:`fitting` to :class:`TrainingConfig`."""
    return TrainingConfig(
        max_epochs=args.epochs,
        patience=args.patience,
        hold_out=args.hold_out,
        seed=args.seed,
        bf16=args.bf16,
        keep_last_weights=args.reference_quirks,
    )


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand; returns the exit status."""
    from milan_ray.annotations.groups import training_groups
    from milan_ray.captioner.fit import Sizes
    from milan_ray.engine.cluster import connected, gpus_each
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
    elif args.name:
        names = {args.name: tuple(annotated)}
    else:
        raise MilanError("which annotations to train on: give --group, or --name for a captioner of all of them.")
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
    with connected(resources):
        wanted = {model: annotated[model] for models in names.values() for model in models}
        run_stage(Encodings(wanted, encoder), storage, resources)
        run_trainings(storage, [replace(job, gpus=gpus_each(resources)) for job in jobs])
    note(args, f"captioner{'s' * (len(names) > 1)} {', '.join(names)}", captioners=list(names))
    return 0
