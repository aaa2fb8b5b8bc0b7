"""``milan-ray analyze``: measures how much units matter, grouped by their descriptions."""

from __future__ import annotations

import argparse
from dataclasses import replace

from milan_ray.cli import options
from milan_ray.cli.build_configs import opened, resources_of
from milan_ray.cli.summary import note, report_on, show_plan
from milan_ray.progress import say


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's options."""
    options.experiment(parser)
    group = parser.add_argument_group("analysis")
    group.add_argument("--labeler", default="milan", help="whose descriptions of the units to read")
    options.language(group)
    group.add_argument(
        "--words", nargs="*", metavar="WORD", help="words that descriptions are compared with (default: the paper's)"
    )
    group.add_argument("--trials", type=options.positive, default=5, help="random orders beside the others")
    group.add_argument("--seed", type=options.count, default=0, help="seed of the random orders")
    group.add_argument(
        "--ties", type=options.count, default=0, metavar="N",
        help="orders per criterion, ties broken at random (default: one order, ties layer by layer as in the paper)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand; returns the exit status."""
    from milan_ray.engine.cluster import connected
    from milan_ray.engine.planner import Plan
    from milan_ray.report.figures import figure_path
    from milan_ray.schema import ABLATIONS
    from milan_ray.studies.analysis.run import Analysis, AnalysisConfig, examples, summary
    from milan_ray.studies.spacy_pipeline import find_spacy_pipeline, language_name

    storage, models, probe = opened(args)
    config = AnalysisConfig(args.labeler, trials=args.trials, seed=args.seed, ties=args.ties)
    if args.words is not None:
        config = replace(config, words=tuple(args.words))
    if args.dry_run:
        studies = [Analysis(model, probe, language_name(args.language), config) for model in models]
        return show_plan(args, Plan.of(storage, studies))
    nlp, language = find_spacy_pipeline(args.language)
    with connected(resources_of(args)):
        for model in models:
            study = Analysis(model, probe, language, config)
            say(f"{model.name}: {summary(study.run(storage, nlp, resources_of(args)))}")
            say(examples(storage, model.name))
            figure = figure_path(storage, ABLATIONS, experiment=study.name, model=model.name)
            say(f"figure: {storage.uri(figure)}")
    report_on(args, storage, [model.name for model in models])
    note(args, f"{', '.join(model.name for model in models)} analysed", models=[model.name for model in models])
    return 0
