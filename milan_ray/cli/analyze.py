"""``milan-ray analyze``: measures how much units matter, grouped by their descriptions."""

from __future__ import annotations

import argparse
from dataclasses import replace

from milan_ray.cli import options
from milan_ray.cli.arguments import integer, string
from milan_ray.cli.build_configs import cluster, opened
from milan_ray.cli.summary import note, report_on, say_figure, show_plan
from milan_ray.progress import say


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's options."""
    options.experiment(parser)
    group = parser.add_argument_group("analysis")
    string(group, "--labeler", "NAME", "whose descriptions of the units to read", "milan")
    options.supported(group)
    options.language(group)
    group.add_argument(
        "--words", nargs="*", metavar="WORD", help="words that descriptions are compared with (default: the paper's)"
    )
    integer(group, "--trials", 5, "random orders, in addition to the others")
    integer(group, "--seed", 0, "seed of the random orders", least=0)
    integer(group, "--ties", 0, "orders per criterion, ties at random (default: one, ties by layer)", least=0)


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand; returns the exit status."""
    from milan_ray.engine.planner import Plan
    from milan_ray.schema import ABLATIONS
    from milan_ray.studies.analysis.run import Analysis, AnalysisConfig, examples, summary
    from milan_ray.studies.spacy_pipeline import find_spacy_pipeline, language_name

    storage, models, probe = opened(args)
    config = AnalysisConfig(
        args.labeler, trials=args.trials, seed=args.seed, ties=args.ties, supported_by=args.supported_by
    )
    if args.words is not None:
        config = replace(config, words=tuple(args.words))
    if args.dry_run:
        studies = [Analysis(model, probe, language_name(args.language), config) for model in models]
        return show_plan(args, Plan.of(storage, studies))
    nlp, language = find_spacy_pipeline(args.language)
    with cluster(args) as resources:
        for model in models:
            study = Analysis(model, probe, language, config)
            say(f"{model.name}: {summary(study.run(storage, nlp, resources))}")
            say(examples(storage, model.name))
            say_figure(storage, ABLATIONS, experiment=study.name, model=model.name)
    report_on(args, storage, [model.name for model in models])
    note(args, f"{', '.join(model.name for model in models)} analysed", models=[model.name for model in models])
    return 0
