"""``milan-ray paste``: makes adversarial images by pasting in what units respond to."""

from __future__ import annotations

import argparse

from milan_ray.cli import options
from milan_ray.cli.build_configs import opened, resources_of
from milan_ray.cli.summary import note, report_on, show_plan
from milan_ray.progress import say


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's options."""
    options.experiment(parser)
    group = parser.add_argument_group("adversarial images; --probe gives the images that something is pasted on")
    group.add_argument("--labeler", default="milan", help="whose descriptions of the units to read")
    options.language(group)
    group.add_argument(
        "--each", type=options.positive, default=20, metavar="N", help="units of different words, and of the others"
    )
    group.add_argument(
        "--originals", type=options.positive, default=8, metavar="N", help="images that are pasted on, per unit"
    )
    group.add_argument(
        "--distractors", type=options.positive, default=8, metavar="N", help="exemplars to cut from, per unit, at most"
    )
    group.add_argument(
        "--pool", type=options.positive, default=2000, metavar="N", help="images to look for originals among"
    )
    group.add_argument("--seed", type=options.count, default=0, help="of the choice of images and of the other units")


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand; returns the exit status."""
    from milan_ray.engine.cluster import connected
    from milan_ray.engine.planner import Plan
    from milan_ray.report.figures import figure_path
    from milan_ray.schema import PASTED
    from milan_ray.studies.cut_and_paste.run import CutAndPaste, CutAndPasteConfig, summary
    from milan_ray.studies.spacy_pipeline import find_spacy_pipeline, language_name

    storage, models, probe = opened(args)
    config = CutAndPasteConfig(args.labeler, args.each, args.originals, args.distractors, args.pool, seed=args.seed)
    if args.dry_run:
        studies = [CutAndPaste(model, probe, language_name(args.language), config) for model in models]
        return show_plan(args, Plan.of(storage, studies))
    nlp, language = find_spacy_pipeline(args.language)
    with connected(resources_of(args)):
        for model in models:
            study = CutAndPaste(model, probe, language, config)
            say(f"{model.name}: {summary(study.run(storage, nlp, resources_of(args)))}")
            figure = figure_path(storage, PASTED, experiment=study.name, model=model.name)
            say(f"figure: {storage.uri(figure)}")
    note(args, f"adversarial images for {', '.join(model.name for model in models)}", models=[m.name for m in models])
    report_on(args, storage, [model.name for model in models])
    return 0
