"""``milan-ray generalize``: trains captioners on some annotated networks and tests them on others."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from milan_ray.cli import options
from milan_ray.cli.arguments import fraction, integer, name, number, string, strings
from milan_ray.cli.build_configs import (
    annotated_layers,
    bert_score_folder,
    cluster,
    encoder_ref,
    resources_of,
    writable_storage,
)
from milan_ray.cli.refusals import refuse
from milan_ray.cli.summary import report_on, say_figure, show_plan
from milan_ray.cli.train import fitting, training_config
from milan_ray.errors import MilanError
from milan_ray.progress import say

if TYPE_CHECKING:
    from milan_ray.annotations.splits import Split


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's options."""
    group = parser.add_argument_group("splits")
    strings(
        group,
        "--split",
        "SPLIT",
        "within-network, across-architectures, across-datasets, across-tasks, leave-one-out, or all of them, as "
        "far as annotations are there; TRAIN:TEST, each a group (base, cls, not-alexnet-imagenet, …), a model or "
        "MODEL,MODEL; or one of these alone, whose units are divided",
        default=["all"],
    )
    string(group, "--annotations", "SOURCE", "source of the annotations", "milannotations")
    strings(group, "--layers", "PATH", "only these layers")
    integer(group, "--trials", 5, "captioners per split, of seeds of their own")
    fraction(group, "--share", 0.1, "share of units to judge by where one network's are divided")
    integer(group, "--within-patience", 10, "--patience where one network's units are divided", least=0)
    string(group, "--name", "NAME", "name of the experiment in the tables", "generalization", type=name)
    group = parser.add_argument_group("captioners")
    string(group, "--encoder", "NAME", "image encoder", "resnet101")
    string(group, "--encoder-weights", "FILE", "weights file of the encoder (default: its own)")
    fitting(parser)
    group = parser.add_argument_group("descriptions")
    number(group, "--lam", None, "λ of log p(d|E) − λ·log p(d) (default: 0.2)")
    integer(group, "--beam-size", None, "width of the beam (default: 50)")
    options.language(group)
    options.bertscore(group)
    options.add_to(parser, options.download, options.quirks, options.job)


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand; returns the exit status."""
    from milan_ray.annotations.splits import chosen_splits
    from milan_ray.captioner.fit import Sizes
    from milan_ray.captioner.quirks import NO_QUIRKS, REFERENCE
    from milan_ray.engine.stage import run_stage
    from milan_ray.plugins import load_plugins
    from milan_ray.schema import SCORES
    from milan_ray.stages.encodings import Encodings
    from milan_ray.studies.generalization.job import GeneralizationConfig, GeneralizationJob
    from milan_ray.studies.generalization.run import plan_generalization, run_generalization
    from milan_ray.studies.generalization.statistics import summary
    from milan_ray.studies.spacy_pipeline import find_spacy_pipeline, language_name

    load_plugins(args.plugin)  # plug-ins may register splits
    storage, resources = writable_storage(args), resources_of(args)
    annotated = annotated_layers(storage, args.annotations, None)
    splits = chosen_splits(args.split, annotated)
    _refuse(args, splits)
    models = dict.fromkeys(model for split in splits for model in split.models)
    layers = {model: [path for path in annotated[model] if not args.layers or path in args.layers] for model in models}
    if bare := [model for model in models if not layers[model]]:
        raise MilanError(f"{', '.join(bare)} have no annotated layer of --layers {' '.join(args.layers)}.")
    encoder = encoder_ref(args, args.encoder)
    training = training_config(args)
    config = GeneralizationConfig(
        args.trials,
        args.share,
        replace(training, patience=args.within_patience),
        training,
        Sizes(args.embedding, args.hidden),
        args.beam_size,
        args.lam,
        REFERENCE if args.reference_quirks else NO_QUIRKS,
    )
    job = GeneralizationJob(
        args.annotations,
        layers,
        splits,
        encoder,
        config,
        bert_score_folder(args),
        args.name,
        args.workers,
        args.memory_limit,
    )
    if args.dry_run:
        return show_plan(args, plan_generalization(storage, job, language_name(args.language), resources))
    nlp, language = find_spacy_pipeline(args.language)
    with cluster(args):
        run_stage(Encodings(layers, encoder), storage, resources)
        rows = run_generalization(storage, job, nlp, language, resources)
    say(summary(rows))
    say(f"tables: {storage.uri('generalization')}")
    say_figure(storage, SCORES, experiment=job.name)
    report_on(args, storage)
    return 0


def _refuse(args: argparse.Namespace, splits: Sequence[Split]) -> None:
    """Rejects options that apply to none of these splits.

    Raises:
        MilanError: Such an option was given.
    """
    if not any(split.within for split in splits):
        remedy = "choose a split that divides one network's units"
        refuse(args, ["share", "within_patience"], "where no split divides one network's units", remedy)
    if all(split.within for split in splits):
        remedy = "give --within-patience"
        refuse(args, ["patience"], "where every split divides one network's units", remedy)
