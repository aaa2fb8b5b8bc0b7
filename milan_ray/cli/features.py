"""``milan-ray features``: fits feature sets to a layer."""

from __future__ import annotations

import argparse

from milan_ray.cli import options
from milan_ray.cli.arguments import Help, amount, choice, fraction, integer, name, number, string
from milan_ray.cli.build_configs import absolute, cluster, opened
from milan_ray.cli.refusals import refuse
from milan_ray.cli.summary import note, show_plan
from milan_ray.config import Arithmetic, ExemplarConfig
from milan_ray.errors import MilanError

METHODS = ("pca", "nmf", "topk-sae", "jumprelu-sae")


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    about = "Fit features to a layer: principal components, non-negative parts, or a sparse autoencoder"
    fit = actions.add_parser("fit", help=about, description=about + ".", formatter_class=Help)
    _add_fit(fit)
    _add_network(fit)
    options.probe(fit, required=True)
    options.add_to(fit, options.download, options.stages)


def _add_fit(fit: argparse.ArgumentParser) -> None:
    group = fit.add_argument_group("features (docs/features.md)")
    choice(group, "--method", METHODS, "what is fitted (default: topk-sae)", "topk-sae")
    group.add_argument(
        "--width",
        nargs="+",
        type=int,
        default=(),
        metavar="N",
        help="numbers of features, a set for each (default: 16 components, or 8 times the layer's units)",
    )
    integer(group, "--k", 32, "features that are on at a position: so many (topk-sae), or on average (jumprelu-sae)")
    integer(group, "--epochs", None, "passes over the images (default: 20 for nmf, 4 for autoencoders)")
    integer(group, "--seed", 0, "seed of weights and of the order of images", least=0)
    number(group, "--lr", None, "learning rate (default: 2e-4 for 16,384 features, more for fewer)", kind=amount)
    about = "positions per step of a training (default: 4096, fewer of small probes)"
    integer(group, "--rows", None, about)
    fraction(group, "--held-out", 0.1, "share of the images that is only measured")
    about = "name of the set, with -N where there are several (default: METHOD-N)"
    string(group, "--name", "NAME", about, type=name)
    string(group, "--out", "DIR", "folder for the sets (default: features/MODEL/LAYER in the storage)")
    integer(group, "--workers", 1, "data-parallel workers of a training (Ray Train)")


def _add_network(fit: argparse.ArgumentParser) -> None:
    """Adds the options on the network and its layer."""
    group = fit.add_argument_group("network")
    string(group, "--model", "NAME", "a registered model; see jobs.models", type=lambda given: [given], required=True)
    string(group, "--layer", "PATH", "the layer", type=lambda path: [path], required=True, dest="layers")
    string(group, "--weights", "WEIGHTS", "file, URL, name of published ones (IMAGENET1K_V2) or 'random'")
    options.activations(group)
    options.reading(group)
    integer(group, "--batch-size", options.EXEMPLARS.batch_size, "images per forward pass")
    integer(group, "--shard-size", None, "images per unit of work (default: at most 256)")
    options.precision(group)
    fit.set_defaults(features=[])


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand; returns the exit status."""
    from milan_ray.engine.planner import Plan
    from milan_ray.engine.stage import run_stage
    from milan_ray.models.features.sae import SaeConfig
    from milan_ray.stages.features_fit import FeaturesFit, FitConfig, FitJob

    saes = args.method.endswith("-sae")
    if not saes:
        refuse(args, ["k", "lr", "rows", "workers"], f"for {args.method}", "choose a sparse autoencoder")
    if args.method == "pca":
        refuse(args, ["epochs", "seed"], "for pca, which is exact,", "choose another method")
    config = FitConfig(
        args.method,
        tuple(args.width),
        args.k,
        args.epochs,
        args.seed,
        args.held_out,
        args.name,
        "" if args.out is None else absolute("--out", args.out),
        SaeConfig(args.lr, args.rows),
        args.workers,
    )
    storage, models, probe = opened(args)
    if len(models) > 1:
        raise MilanError(f"--model {args.model[0]} is {len(models)} models; features are fitted to one.")
    how = ExemplarConfig(
        batch_size=args.batch_size,
        shard_size=args.shard_size,
        max_bad=args.max_bad,
        arithmetic=Arithmetic(args.precision, args.channels_last),
    )
    stage = FeaturesFit(FitJob(models[0], probe, config), how)
    if args.dry_run:
        return show_plan(args, Plan.of(storage, [stage]))
    with cluster(args) as resources:
        sets = run_stage(stage, storage, resources)
    (layer,) = {output.layer for output in sets}
    names = [output.keys["features"] for output in sets]
    note(args, f"{', '.join(names)} of {models[0].name} {layer}", features=names, folder=stage.folder(storage).root)
    return 0
